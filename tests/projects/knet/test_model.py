"""The whole models on a small scale: losses, results, edge cases and the switches of the paper's studies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from convmask.projects.knet.meta_arch import KNet

MakeCfg = Callable[..., CfgNode]
MakeInputs = Callable[..., list[dict[str, Any]]]
NODE = "MODEL.KNET"
DETECTORS = ("instance", "panoptic")


def build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(5)
    model = build_model(cfg)
    assert isinstance(model, KNet)
    if model.kernel_head is not None:
        for update in model.rounds:
            # scores that vary, some of them high
            nn.init.normal_(update.fc_cls.weight, std=0.5)
            nn.init.zeros_(update.fc_cls.bias)
    return model


def loss_names(task: str, rounds: int = 3) -> set[str]:
    names = ["mask", "dice"] + (["rank"] if task == "panoptic" else [])
    own = {f"s{r}_loss_{name}" for r in range(rounds) for name in [*names, "cls"]}
    return own | {f"loss_rpn_{name}" for name in [*names, "seg"]}


def losses_and_gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    model.train()
    losses = model(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    return losses


def check_detections(result: dict[str, Any], inputs: dict[str, Any], task: str) -> None:
    size = inputs["height"], inputs["width"]
    instances = result["instances"]
    assert instances.image_size == size and len(instances) == 12
    assert instances.pred_masks.shape == (12, *size) and instances.pred_masks.dtype == torch.bool
    assert (instances.scores.diff() <= 0).all() and int(instances.pred_classes.max()) < 5
    assert instances.pred_boxes.tensor.shape == (12, 4)
    assert ("panoptic_seg" in result) == (task == "panoptic")
    if task == "panoptic":
        ids, segments = result["panoptic_seg"]
        assert ids.shape == size and ids.dtype == torch.int32
        assert set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
        for segment in segments:
            assert segment["area"] == (ids == segment["id"]).sum()


@pytest.mark.parametrize("task", DETECTORS)
@pytest.mark.parametrize("objects", [(2, 3), (0, 2), (0, 0), (4,), (1, 2, 0)])
def test_losses(small_cfg: MakeCfg, random_inputs: MakeInputs, task: str, objects: tuple[int, ...]) -> None:
    inputs = random_inputs(objects)
    if objects == (0, 0):
        for image in inputs:
            # Detectron2's mapper leaves the masks out
            del image["instances"]._fields["gt_masks"]
    losses = losses_and_gradients(build(small_cfg(task)), inputs)
    assert losses.keys() == loss_names(task)
    # stuff kernels learn masks too, but not the first ones
    assert (losses["loss_rpn_dice"].item() == 0) == (sum(objects) == 0)
    assert (losses["s0_loss_dice"].item() == 0) == (sum(objects) == 0 and task == "instance")


def test_nothing_is_labelled(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    inputs = random_inputs((0, 0))
    for image in inputs:
        image["sem_seg"].fill_(255)
    losses = losses_and_gradients(build(small_cfg("panoptic")), inputs)
    assert losses["s2_loss_mask"].item() == 0 and losses["s2_loss_rank"].item() == 0


def test_more_objects_than_kernels(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    losses_and_gradients(build(small_cfg("panoptic", f"{NODE}.NUM_KERNELS", 3)), random_inputs((5, 1)))


def test_256_kernels(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """The release's ignore label of the rank loss, 255, is a kernel here."""
    losses_and_gradients(build(small_cfg("panoptic", f"{NODE}.NUM_KERNELS", 256)), random_inputs((2,)))


@pytest.mark.parametrize("task", DETECTORS)
def test_results_do_not_depend_on_the_batch(small_cfg: MakeCfg, random_inputs: MakeInputs, task: str) -> None:
    model, inputs = build(small_cfg(task)).eval(), random_inputs((1, 1, 1))
    together = model(inputs)
    for image, result in zip(inputs, together, strict=True):
        check_detections(result, image, task)
        (alone,) = model([image])
        torch.testing.assert_close(alone["instances"].scores, result["instances"].scores, rtol=1e-4, atol=1e-5)
        if task == "panoptic":
            differing = alone["panoptic_seg"][0] != result["panoptic_seg"][0]
            assert differing.float().mean() < 0.01


def test_a_single_odd_image(small_cfg: MakeCfg) -> None:
    for task in DETECTORS:
        image = {"image": torch.randint(0, 256, (3, 37, 71), dtype=torch.uint8), "height": 37, "width": 71}
        check_detections(build(small_cfg(task)).eval()([image])[0], image, task)


@pytest.mark.parametrize(
    "overrides",
    [
        (f"{NODE}.NUM_ROUNDS", 1),
        (f"{NODE}.GATES", False),
        (f"{NODE}.INTERACTION", False),
        (f"{NODE}.POSITIONAL_ENCODING", "none"),
        (f"{NODE}.POSITIONAL_ENCODING", "joined"),
        (f"{NODE}.GROUP_ASSEMBLY", "soft"),
        (f"{NODE}.GROUP_ASSEMBLY", "none"),
        (f"{NODE}.UPDATOR_CHANNELS", 16),
        (f"{NODE}.COMMON_STRIDE", 8, f"{NODE}.MASK_STRIDE", 4),
        (f"{NODE}.COMMON_STRIDE", 4, f"{NODE}.MASK_STRIDE", 1),
        (f"{NODE}.INFERENCE.INSTANCES_OF_PANOPTIC", False),
        (f"{NODE}.DROPOUT", 0.1),
    ],
)
def test_study_switches(small_cfg: MakeCfg, random_inputs: MakeInputs, overrides: tuple[Any, ...]) -> None:
    cfg = small_cfg("panoptic", *overrides)
    model, inputs = build(cfg), random_inputs((2, 1))
    losses = losses_and_gradients(model, inputs)
    assert losses.keys() == loss_names("panoptic", cfg.MODEL.KNET.NUM_ROUNDS)
    result = model.eval()(inputs)[0]
    if cfg.MODEL.KNET.INFERENCE.INSTANCES_OF_PANOPTIC:
        check_detections(result, inputs[0], "panoptic")
    else:
        assert result.keys() == {"panoptic_seg"}


def test_hard_masks_give_no_gradient_to_masks(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    for assembly, expected in (("hard", False), ("soft", True)):
        model = build(small_cfg("instance", f"{NODE}.GROUP_ASSEMBLY", assembly))
        outputs, _ = model.predict(model.preprocess_image(random_inputs((1,))).tensor)
        masks = outputs.start.mask_logits
        update = model.rounds[0]
        kernels = update(outputs.features, outputs.start).kernels
        (gradient,) = torch.autograd.grad(kernels.sum(), masks, allow_unused=True)
        assert (gradient is not None) == expected


def test_bfloat16_autocast(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg("panoptic")).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(random_inputs((2, 1)))
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_semantic(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model, inputs = build(small_cfg("semantic")), random_inputs((1, 1))
    losses = losses_and_gradients(model, inputs)
    assert losses.keys() == {*(f"decode.loss_ce.s{number}" for number in range(4)), "aux.loss_ce"}
    for image, result in zip(inputs, model.eval()(inputs), strict=True):
        assert result["sem_seg"].shape == (9, image["height"], image["width"])
    (odd,) = model([{"image": torch.randint(0, 256, (3, 37, 71), dtype=torch.uint8)}])
    assert odd["sem_seg"].shape == (9, 37, 71)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{NODE}.TASK", "boxes"), "TASK is 'boxes'"),
        ((f"{NODE}.IN_FEATURES", ["p2", "p9"]), "IN_FEATURES"),
        ((f"{NODE}.GROUP_ASSEMBLY", "softmax"), "GROUP_ASSEMBLY 'softmax'"),
        ((f"{NODE}.POSITIONAL_ENCODING", "all"), "POSITIONAL_ENCODING 'all'"),
        ((f"{NODE}.NUM_KERNELS", 0), "NUM_KERNELS is 0"),
        ((f"{NODE}.MASK_STRIDE", 8), "MASK_STRIDE is 8"),
        ((f"{NODE}.MASK_STRIDE", 3), "MASK_STRIDE is 3"),
        ((f"{NODE}.NUM_HEADS", 5), "5 heads"),
        (("INPUT.TARGETS", ("instances",)), "needs 'sem_seg' in INPUT.TARGETS"),
        (("INPUT.SEMANTIC_LAYOUT", "all"), "SEMANTIC_LAYOUT"),
    ],
)
def test_contradictions_in_the_config(small_cfg: MakeCfg, overrides: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg("panoptic", *overrides))


def test_bad_targets(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg("panoptic")).train()
    inputs = random_inputs((1,))
    inputs[0]["instances"].gt_classes[0] = 7
    with pytest.raises(ValueError, match=r"gt_classes of image 'random.png' has class 7"):
        model(inputs)
    del inputs[0]["instances"]
    with pytest.raises(ValueError, match=r"no 'instances' for image 'random\.png'"):
        model(inputs)
    with pytest.raises(ValueError, match="no 'sem_seg'"):
        build(small_cfg("semantic")).train()([{"image": inputs[0]["image"]}])


def test_a_diverged_model_is_one_clear_error(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg("instance")).train()
    nn.init.constant_(model.kernel_head.init_kernels.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        model(random_inputs((1,)))
