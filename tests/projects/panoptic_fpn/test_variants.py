"""What the paper has and Detectron2 lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from convmask.data.class_counts import set_class_counts

MakeCfg = Callable[..., CfgNode]
MakeInputs = Callable[..., list[dict[str, Any]]]
NODE = "MODEL.PANOPTIC_FPN"
RPN_LOSSES = {"loss_rpn_cls", "loss_rpn_loc"}
ROI_LOSSES = {"loss_cls", "loss_box_reg", "loss_mask"}
CASCADE = (
    "MODEL.ROI_HEADS.NAME",
    "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    True,
    "MODEL.ROI_HEADS.IN_FEATURES",
    ["p2", "p3"],
)


def build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg)


def losses_of(model: nn.Module, inputs: list[dict[str, Any]], iteration: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    with EventStorage(iteration):
        return model.train()(inputs)


def trained_parts(model: nn.Module, losses: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parts in which a parameter gets a gradient other than zero."""
    model.zero_grad()
    sum(losses.values()).backward()
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("aggregation", ["sum", "concat"])
@pytest.mark.parametrize("convs", [1, 2])
def test_semantic_branch_variants(small_cfg: MakeCfg, random_inputs: MakeInputs, aggregation: str, convs: int) -> None:
    cfg = small_cfg(f"{NODE}.AGGREGATION", aggregation, f"{NODE}.CONVS_PER_STAGE", convs, f"{NODE}.TASK", "semantic")
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    model = build(cfg)
    width, in_channels = 32, cfg.MODEL.FPN.OUT_CHANNELS
    stages = [in_channels] * 4 + [width] * 3
    convolutions = stages + [width] * len(stages) * (convs - 1)
    predictor = (width * (4 if aggregation == "concat" else 1) + 1) * 4
    expected = sum(c * width * 9 + 2 * width for c in convolutions) + predictor
    assert sum(p.numel() for p in model.sem_seg_head.parameters()) == expected
    losses = losses_of(model, random_inputs())
    assert losses.keys() == {"loss_sem_seg"}
    losses["loss_sem_seg"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.sem_seg_head.parameters())


def test_initial_weights_of_the_predictor(small_cfg: MakeCfg) -> None:
    detectron2s, faint = (
        build(small_cfg(f"{NODE}.TASK", "semantic", f"{NODE}.PREDICTOR_STD", std)).sem_seg_head for std in (0.0, 0.01)
    )
    assert detectron2s.predictor.weight.std().item() == pytest.approx((2 / 4) ** 0.5, rel=0.2)
    assert faint.predictor.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(detectron2s.p2[0].weight, faint.p2[0].weight)


@pytest.mark.parametrize("overrides", [(), CASCADE])
def test_task_weights_reach_every_loss(small_cfg: MakeCfg, random_inputs: MakeInputs, overrides: tuple) -> None:
    inputs = random_inputs()
    plain = losses_of(build(small_cfg(*overrides)), inputs)
    weights = (f"{NODE}.INSTANCE_TASK_WEIGHT", 0.25, f"{NODE}.INSTANCE_LOSS_WEIGHT", 2.0)
    weighted = losses_of(build(small_cfg(*overrides, *weights, "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 3.0)), inputs)
    assert plain.keys() == weighted.keys()
    assert len(plain) == (6 if not overrides else 10)
    for name, loss in plain.items():
        factor = 3.0 if name == "loss_sem_seg" else 0.5 if name.startswith(("loss_box_reg", "loss_mask")) else 0.25
        torch.testing.assert_close(weighted[name], loss * factor, msg=name)


def test_alternating_trains_one_branch_an_iteration(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    cfg = small_cfg(f"{NODE}.TRAINING", "alternating")
    model, inputs = build(cfg), random_inputs()
    combined = losses_of(build(small_cfg()), inputs)
    for iteration in (0, 7, 1000):
        losses = losses_of(model, inputs, iteration)
        parts = trained_parts(model, losses)
        if iteration % 2 == 0:
            assert losses.keys() == RPN_LOSSES | ROI_LOSSES
            assert parts == {"backbone", "proposal_generator", "roi_heads"}
        else:
            assert losses.keys() == {"loss_sem_seg"}
            assert parts == {"backbone", "sem_seg_head"}
        for name, loss in losses.items():
            torch.testing.assert_close(loss, combined[name], rtol=0, atol=0, msg=name)
        idle = [p for n, p in model.named_parameters() if n.split(".")[0] not in parts]
        assert idle
        assert all(p.grad is not None and not p.grad.any() for p in idle)


def test_alternating_under_distributed_data_parallel(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """The reducer waits for a gradient of every parameter, and would stop the second iteration otherwise."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = build(small_cfg(f"{NODE}.TRAINING", "alternating"))
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        inputs = random_inputs()
        for iteration in range(4):
            sum(losses_of(parallel, inputs, iteration).values()).backward()
    finally:
        distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters())


def test_grouped_fpn_separates_the_branches(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    cfg = small_cfg(f"{NODE}.GROUPED_FPN", True)
    model, dense = build(cfg), build(small_cfg())
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert model.backbone.fpn_output3.weight.shape == (channels, channels // 2, 3, 3)
    assert model.sem_seg_head.p2[0].in_channels == channels // 2
    assert model.proposal_generator.rpn_head.conv.in_channels == channels // 2
    losses = losses_of(model, random_inputs())
    model.zero_grad()
    losses["loss_sem_seg"].backward(retain_graph=True)
    for level in range(2, 6):
        gradient = model.backbone.get_submodule(f"fpn_output{level}").weight.grad
        assert not gradient[: channels // 2].any()
        assert gradient[channels // 2 :].any()
    model.zero_grad()
    sum(loss for name, loss in losses.items() if name != "loss_sem_seg").backward()
    assert not model.backbone.fpn_output2.weight.grad[channels // 2 :].any()
    with torch.no_grad():
        assert model.eval()(random_inputs((1,)))[0].keys() == {"sem_seg", "instances", "panoptic_seg"}


def test_all_classes_in_the_semantic_branch(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """The labels of stuff follow from the dataset: Cityscapes' train ids have things in the middle."""
    cfg = small_cfg("INPUT.SEMANTIC_LAYOUT", "all", "DATASETS.TRAIN", ("convmask_cityscapes_train_panoptic",))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8, 19
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 1
    model = build(cfg).eval()
    categories = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).categories
    inputs = random_inputs((1,))
    with torch.no_grad():
        result = model(inputs)[0]
    ids, segments = result["panoptic_seg"]
    labels = result["sem_seg"].argmax(0)
    painted_by_things = torch.isin(ids, torch.tensor([s["id"] for s in segments if s["isthing"]], dtype=torch.int32))
    for segment in segments:
        if not segment["isthing"]:
            label = categories.stuff_labels("all")[segment["category_id"] - 1]
            assert torch.equal(ids == segment["id"], (labels == label) & ~painted_by_things)
    things = torch.isin(labels, torch.tensor(categories.thing_labels("all")))
    assert not ids[things & ~painted_by_things].any()
    assert any(not s["isthing"] for s in segments)


def test_all_classes_without_a_dataset_have_things_first(small_cfg: MakeCfg) -> None:
    cfg = small_cfg("INPUT.SEMANTIC_LAYOUT", "all", "DATASETS.TRAIN", (), "DATASETS.TEST", ())
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8
    assert build(cfg).combine_options["stuff_labels"] == (5, 6, 7)


@pytest.mark.parametrize(
    ("task", "layout", "expected"),
    [
        ("panoptic", "separated", (8, 12)),
        ("panoptic", "all", (8, 19)),
        ("semantic", "all", (80, 19)),
        ("instance", "separated", (8, 54)),
    ],
)
def test_class_counts_follow_from_the_dataset(
    small_cfg: MakeCfg, task: str, layout: str, expected: tuple[int, int]
) -> None:
    cfg = small_cfg(f"{NODE}.TASK", task, "INPUT.SEMANTIC_LAYOUT", layout)
    cfg.DATASETS.TRAIN = ("convmask_cityscapes_train_panoptic",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80, 54
    set_class_counts(cfg)
    assert expected == (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)


def test_combine_can_be_switched_off(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg(f"{NODE}.COMBINE.ENABLED", False)).eval()
    with torch.no_grad():
        assert model(random_inputs((1,)))[0].keys() == {"sem_seg", "instances"}


def test_batch_without_a_labelled_pixel(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg(f"{NODE}.TASK", "semantic"))
    inputs = random_inputs((0, 0))
    for image in inputs:
        image["sem_seg"].fill_(255)
    losses = losses_of(model, inputs)
    assert losses["loss_sem_seg"].item() == 0
    losses["loss_sem_seg"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(p.grad is not None for p in model.sem_seg_head.parameters())


def test_batch_without_instances(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg())
    inputs = random_inputs((0,))
    del inputs[0]["instances"]._fields["gt_masks"]  # Detectron2's mapper leaves it out
    losses = losses_of(model, inputs)
    assert losses.keys() == RPN_LOSSES | ROI_LOSSES | {"loss_sem_seg"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_images_of_different_sizes(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """A batch gives what its images give alone, up to the padding; and padding is not labelled."""
    model = build(small_cfg())
    inputs = random_inputs((2,), size=(64, 96)) + random_inputs((1,), size=(90, 70))
    losses = losses_of(model, inputs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        results = model.eval()(inputs)
    assert [tuple(r["panoptic_seg"][0].shape) for r in results] == [(70, 87), (96, 61)]
    assert [r["instances"].image_size for r in results] == [(70, 87), (96, 61)]


RETINANET_BACKBONE = (
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{NODE}.TASK", "things"), "TASK 'things' is not one of panoptic, instance, semantic"),
        ((f"{NODE}.TRAINING", "both"), "TRAINING 'both' is not one of"),
        ((f"{NODE}.TRAINING", "alternating", f"{NODE}.TASK", "semantic"), "needs two branches"),
        (("INPUT.TARGETS", ("instances",)), "needs 'sem_seg' in INPUT.TARGETS"),
        ((f"{NODE}.GROUPED_FPN", True, f"{NODE}.TASK", "instance"), "needs two branches"),
        (("MODEL.MASK_ON", False), "needs instance masks, but MODEL.MASK_ON is False"),
        (("INPUT.SEMANTIC_LAYOUT", "all", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3), "NUM_CLASSES is 3"),
        ((*RETINANET_BACKBONE, f"{NODE}.GROUPED_FPN", True), "LastLevelP6P7"),
        ((f"{NODE}.GROUPED_FPN", True, "MODEL.FPN.OUT_CHANNELS", 33), "33 FPN channels"),
        ((f"{NODE}.GROUPED_FPN", True, "MODEL.BACKBONE.NAME", "build_resnet_backbone"), "needs an FPN backbone"),
        ((f"{NODE}.AGGREGATION", "max"), "'max' is not one of sum, concat"),
    ],
)
def test_contradictions_are_named(small_cfg: MakeCfg, overrides: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg(*overrides))


@pytest.mark.parametrize("missing", ["instances", "sem_seg"])
def test_missing_targets_are_named(small_cfg: MakeCfg, random_inputs: MakeInputs, missing: str) -> None:
    inputs = random_inputs()
    del inputs[1][missing]
    with pytest.raises(ValueError, match=f"no '{missing}' for image 'random.png'"):
        losses_of(build(small_cfg()), inputs)
