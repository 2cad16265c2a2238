"""The whole model on a small scale: losses, results, edge cases and the switches of the paper's studies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from convmask.data.loader import build_test_loader
from convmask.projects.panoptic_fcn.meta_arch import PanopticFCN

MakeCfg = Callable[..., CfgNode]
MakeInputs = Callable[..., list[dict[str, Any]]]
NODE = "MODEL.PANOPTIC_FCN"
LOSSES = {"loss_pos_th", "loss_pos_st", "loss_seg_th", "loss_seg_st"}


def build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(5)
    model = build_model(cfg)
    assert isinstance(model, PanopticFCN)
    # positions and masks that vary
    for head in (model.position_head.centers, model.position_head.regions):
        nn.init.normal_(head.weight, std=0.3)
        nn.init.zeros_(head.bias)
    for layer in (model.kernel_head.kernels, model.thing_embedding, model.stuff_embedding):
        nn.init.normal_(layer.weight, std=0.3)
    return model


def losses_and_gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    model.train()
    losses = model(inputs)
    assert losses.keys() == LOSSES
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    return losses


def check_result(result: dict[str, Any], inputs: dict[str, Any], labels: int = 4) -> None:
    size = inputs["height"], inputs["width"]
    instances = result["instances"]
    assert instances.image_size == size
    assert instances.pred_masks.shape == (len(instances), *size)
    assert instances.pred_masks.dtype == torch.bool
    assert instances.pred_boxes.tensor.shape == (len(instances), 4)
    assert instances.pred_classes.dtype == torch.int64
    assert result["sem_seg"].shape == (labels, *size)
    assert result["panoptic_seg"][0].shape == size
    ids = set(result["panoptic_seg"][0].unique().tolist()) - {0}
    assert ids == {segment["id"] for segment in result["panoptic_seg"][1]}


@pytest.mark.parametrize("objects", [(2, 3), (0, 2), (0, 0), (4,)])
def test_losses_with_and_without_instances(small_cfg: MakeCfg, random_inputs: MakeInputs, objects: tuple) -> None:
    inputs = random_inputs(objects)
    if objects == (0, 0):
        for image in inputs:
            # Detectron2's mapper leaves the masks out
            del image["instances"]._fields["gt_masks"]
    losses = losses_and_gradients(build(small_cfg()), inputs)
    assert (losses["loss_seg_th"].item() == 0) == (sum(objects) == 0)


def test_nothing_is_labelled(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    inputs = random_inputs((0, 1))
    for image in inputs:
        image["sem_seg"].fill_(255)
    for negative in (True, False):
        losses = losses_and_gradients(build(small_cfg(f"{NODE}.TARGETS.IGNORED_AS_NEGATIVE", negative)), inputs)
        assert losses["loss_seg_st"].item() == 0
        assert (losses["loss_pos_st"].item() == 0) == (not negative)


def test_a_level_with_fewer_cells_than_kernels(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """P7 of 64x96 pixels has one cell; the release needs seven."""
    losses_and_gradients(build(small_cfg(f"{NODE}.NUM_KERNELS", 7)), random_inputs((3, 1)))


def test_a_batch_gives_what_its_images_give(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """The release fails on more than one image."""
    model = build(small_cfg(f"{NODE}.COMBINE.STUFF_AREA_LIMIT", 1)).eval()
    inputs = random_inputs((1, 2, 0))
    together = model(inputs)
    assert len(together) == 3
    assert any(len(result["instances"]) for result in together)
    for found, image in zip(together, inputs, strict=True):
        check_result(found, image)
        alone = model([image])[0]
        torch.testing.assert_close(found["instances"].scores, alone["instances"].scores, atol=1e-4, rtol=1e-4)
        assert (found["panoptic_seg"][0] != alone["panoptic_seg"][0]).float().mean() < 0.01


def test_images_of_different_sizes(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    inputs = random_inputs((2,), size=(64, 80)) + random_inputs((1,), size=(48, 100))
    model = build(small_cfg())
    losses_and_gradients(model, inputs)
    for found, image in zip(model.eval()(inputs), inputs, strict=True):
        check_result(found, image)


@pytest.mark.parametrize(("things", "stuff"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_nothing_found(small_cfg: MakeCfg, random_inputs: MakeInputs, things: float, stuff: float) -> None:
    options = (f"{NODE}.INFERENCE.THING_THRESH", things, f"{NODE}.INFERENCE.STUFF_THRESH", stuff)
    inputs = random_inputs((1,))
    result = build(small_cfg(*options)).eval()(inputs)[0]
    check_result(result, inputs[0])
    if things == 1.0:
        assert len(result["instances"]) == 0
    if stuff == 1.0:
        assert not result["sem_seg"].any()
        assert all(segment["isthing"] for segment in result["panoptic_seg"][1])


@pytest.mark.parametrize(
    "overrides",
    [
        (f"{NODE}.POSITION_HEAD.DEFORM", False, f"{NODE}.POSITION_HEAD.COORD", True),
        (f"{NODE}.KERNEL_HEAD.COORD", False, f"{NODE}.KERNEL_HEAD.NUM_CONVS", 1),
        (f"{NODE}.FEATURE_ENCODER.DEFORM", True, f"{NODE}.FEATURE_ENCODER.CONVS_DIM", 24),
        (f"{NODE}.FEATURE_ENCODER.COORD", False, f"{NODE}.POSITION_HEAD.NUM_CONVS", 2),
        (f"{NODE}.STUFF.KERNEL_AVERAGE", "region", f"{NODE}.TARGETS.CENTER", "box"),
        (f"{NODE}.INFERENCE.SIMILAR_THRESH", 1.5, f"{NODE}.INFERENCE.MATRIX_NMS", True),
        (f"{NODE}.INFERENCE.CLASS_SPECIFIC", False, f"{NODE}.NUM_KERNELS", 1),
    ],
)
def test_variants_of_the_studies(small_cfg: MakeCfg, random_inputs: MakeInputs, overrides: tuple) -> None:
    model = build(small_cfg(*overrides))
    inputs = random_inputs((2, 1))
    losses_and_gradients(model, inputs)
    check_result(model.eval()(inputs)[0], inputs[0])


def test_regions_of_stuff_alone(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg(f"{NODE}.STUFF.WITH_THINGS", False, f"{NODE}.STUFF.NUM_CLASSES", 3))
    inputs = random_inputs((2, 1))
    losses_and_gradients(model, inputs)
    result = model.eval()(inputs)[0]
    check_result(result, inputs[0])
    assert not result["sem_seg"][0].any()


def test_a_region_for_each_category(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """Labels of things are never painted; those of stuff become its categories, in the dataset's order."""
    cfg = small_cfg("INPUT.SEMANTIC_LAYOUT", "all", "DATASETS.TRAIN", ("convmask_cityscapes_train_panoptic",))
    node = cfg.MODEL.PANOPTIC_FCN
    node.NUM_CLASSES, node.STUFF.NUM_CLASSES, node.COMBINE.STUFF_AREA_LIMIT = 8, 19, 1
    node.INFERENCE.STUFF_THRESH = 0.0
    model = build(cfg).eval()
    inputs = random_inputs((1,))
    result = model(inputs)[0]
    check_result(result, inputs[0], labels=19)
    ids, segments = result["panoptic_seg"]
    stuff = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).categories.stuff_labels("all")
    labels = result["sem_seg"].argmax(dim=0)
    for segment in segments:
        if not segment["isthing"]:
            assert (labels[ids == segment["id"]] == stuff[segment["category_id"] - 1]).all()


def test_true_positions_and_classes(small_cfg: MakeCfg, few_images: str) -> None:
    """With both, every instance that is kept is one of the annotated classes of its image."""
    test = ("DATASETS.TEST", (few_images,), "INPUT.TARGETS_IN_TEST", True, "DATALOADER.NUM_WORKERS", 0)
    truth = (f"{NODE}.INFERENCE.TRUE_POSITIONS", True, f"{NODE}.INFERENCE.TRUE_CLASSES", True)
    cfg = small_cfg(*test, *truth)
    model = build(cfg).eval()
    inputs = next(iter(build_test_loader(cfg, few_images)))
    assert "pan_seg_file_name" in inputs[0]
    result = model(inputs)[0]["instances"]
    assert len(result)
    assert set(result.pred_classes.tolist()) <= set(inputs[0]["instances"].gt_classes.tolist())


@pytest.mark.parametrize("missing", ["instances", "sem_seg"])
def test_missing_targets_are_named(small_cfg: MakeCfg, random_inputs: MakeInputs, missing: str) -> None:
    inputs = random_inputs()
    del inputs[1][missing]
    with pytest.raises(ValueError, match=f"no '{missing}' for image 'random.png'"):
        build(small_cfg()).train()(inputs)


def test_combine_can_be_switched_off(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg(f"{NODE}.COMBINE.ENABLED", False)).eval()
    assert model(random_inputs((1,)))[0].keys() == {"sem_seg", "instances"}


def test_mixed_precision(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(random_inputs((2,)))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
        check_result(model.eval()(random_inputs((2,)))[0], random_inputs((2,))[0])
