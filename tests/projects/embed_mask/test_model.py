"""The whole model on a small scale: losses, results, edge cases and the switches of the paper's studies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from convmask.projects.embed_mask import ConvMaskFCOS, EmbedMask

MakeCfg = Callable[..., CfgNode]
MakeInputs = Callable[..., list[dict[str, Any]]]
NODE = "MODEL.EMBED_MASK"
FCOS_LOSSES = {"loss_cls", "loss_reg", "loss_centerness"}
V2 = (
    *(f"{NODE}.EMBED_DIM", 6, f"{NODE}.POSITION_CHANNELS", True),
    *(f"{NODE}.MARGIN.SOURCE", "features", f"{NODE}.MARGIN.PER_DIMENSION", True),
    *(f"{NODE}.TRAINING.PROPOSALS", "best", f"{NODE}.TRAINING.BOX_PADDING", -1.0),
    *(f"{NODE}.TRAINING.MASK_NORMALIZER", "found", f"{NODE}.TRAINING.PROBABILITY_FLOOR", 1e-9),
    *(f"{NODE}.TRAINING.SMOOTH_WEIGHT", 0.0, f"{NODE}.INFERENCE.MASK_THRESH", 0.53),
    *(f"{NODE}.INFERENCE.MASK_VALUES", "logarithm", f"{NODE}.INFERENCE.MASK_CELLS", "wide"),
)


def build(cfg: CfgNode) -> ConvMaskFCOS:
    """With predictions that vary, and boxes of some size."""
    torch.manual_seed(5)
    model = build_model(cfg)
    nn.init.normal_(model.fcos_head.cls_logits.weight, std=0.5)
    nn.init.zeros_(model.fcos_head.cls_logits.bias)
    nn.init.constant_(model.fcos_head.bbox_pred.bias, 1.5)
    return model


def losses_and_gradients(model: nn.Module, inputs: list[dict[str, Any]], names: set[str]) -> dict[str, torch.Tensor]:
    model.train()
    losses = model(inputs)
    assert losses.keys() == names
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    return losses


def check_result(result: dict[str, Any], inputs: dict[str, Any], masks: bool = True) -> None:
    size = inputs["height"], inputs["width"]
    instances = result["instances"]
    assert instances.image_size == size
    assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
    assert instances.pred_classes.dtype == torch.int64
    boxes = instances.pred_boxes.tensor
    assert boxes.shape == (len(instances), 4)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
    assert instances.has("pred_masks") == masks
    if masks:
        assert instances.pred_masks.shape == (len(instances), *size)
        assert instances.pred_masks.dtype == torch.bool


@pytest.mark.parametrize("overrides", [(), V2])
@pytest.mark.parametrize("objects", [(2, 3), (0, 2), (0, 0), (4,)])
def test_losses_with_and_without_objects(
    small_cfg: MakeCfg, random_inputs: MakeInputs, objects: tuple, overrides: tuple
) -> None:
    inputs = random_inputs(objects)
    for image in inputs:
        if not len(image["instances"]):
            # Detectron2's mapper leaves the masks out
            del image["instances"]._fields["gt_masks"]
    names = FCOS_LOSSES | ({"loss_mask"} if overrides else {"loss_mask", "loss_smooth"})
    losses = losses_and_gradients(build(small_cfg(*overrides)), inputs, names)
    assert (losses["loss_mask"].item() == 0) == (sum(objects) == 0)
    assert (losses["loss_reg"].item() == 0) == (sum(objects) == 0)


@pytest.mark.parametrize("overrides", [(), V2])
def test_a_batch_gives_what_its_images_give(small_cfg: MakeCfg, random_inputs: MakeInputs, overrides: tuple) -> None:
    model = build(small_cfg(*overrides)).eval()
    inputs = random_inputs((1, 2, 0))
    together = model(inputs)
    assert len(together) == 3
    assert any(len(result["instances"]) for result in together)
    for found, image in zip(together, inputs, strict=True):
        check_result(found, image)
        alone = model([image])[0]["instances"]
        torch.testing.assert_close(found["instances"].scores, alone.scores, atol=1e-4, rtol=1e-4)
        assert (found["instances"].pred_masks != alone.pred_masks).float().mean() < 0.01


def test_images_of_different_sizes(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    inputs = random_inputs((2,), size=(64, 80)) + random_inputs((1,), size=(52, 100))
    model = build(small_cfg())
    losses_and_gradients(model, inputs, FCOS_LOSSES | {"loss_mask", "loss_smooth"})
    for found, image in zip(model.eval()(inputs), inputs, strict=True):
        check_result(found, image)


def test_nothing_found(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    inputs = random_inputs((1, 1))
    for found, image in zip(
        build(small_cfg(f"{NODE}.INFERENCE.SCORE_THRESH", 1.0)).eval()(inputs), inputs, strict=True
    ):
        check_result(found, image)
        assert len(found["instances"]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        (f"{NODE}.MARGIN.FIXED", True, f"{NODE}.EMBED_DIM", 4),
        (f"{NODE}.TRAINING.POSITIVE_IOU", -1.0, f"{NODE}.TRAINING.MASK_LOSS", "bce"),
        (f"{NODE}.MARGIN.DETACH_BOXES", False, f"{NODE}.MARGIN.BOX_SCALE", -1.0),
        (*V2, f"{NODE}.MARGIN.PER_DIMENSION", False, f"{NODE}.TRAINING.BOX_PADDING", 0.1),
        (*V2, f"{NODE}.MARGIN.FIXED", True),
        (f"{NODE}.PIXELS.IN_FEATURE", "p3", f"{NODE}.PIXELS.SCALE_FACTOR", 4),
        (f"{NODE}.PIXELS.SCALE_FACTOR", 4, f"{NODE}.POSITION_CHANNELS", True),
        (f"{NODE}.FCOS.INCLUSIVE_BOXES", False, f"{NODE}.FCOS.CENTER_RADIUS", 0.0),
        (f"{NODE}.FCOS.NORMALIZED_DISTANCES", False, f"{NODE}.FCOS.CENTERNESS_ON_BOXES", False),
        (f"{NODE}.IN_FEATURES", ["p3", "p4", "p5"], f"{NODE}.FCOS.SIZES_OF_INTEREST", (32, 64)),
    ],
)
def test_variants_of_the_studies(small_cfg: MakeCfg, random_inputs: MakeInputs, overrides: tuple) -> None:
    cfg = small_cfg(*overrides)
    model = build(cfg)
    assert isinstance(model, EmbedMask)
    inputs = random_inputs((2, 1))
    smooth = {"loss_smooth"} if cfg.MODEL.EMBED_MASK.TRAINING.SMOOTH_WEIGHT else set()
    losses_and_gradients(model, inputs, FCOS_LOSSES | {"loss_mask"} | smooth)
    check_result(model.eval()(inputs)[0], inputs[0])


@pytest.mark.parametrize("box_loss", ["giou", "linear_iou", "iou"])
def test_fcos_alone(small_cfg: MakeCfg, random_inputs: MakeInputs, box_loss: str) -> None:
    cfg = small_cfg("MODEL.META_ARCHITECTURE", "ConvMaskFCOS", f"{NODE}.FCOS.BOX_LOSS", box_loss)
    cfg.MODEL.EMBED_MASK.FCOS.SAMPLE_IN_MASK = False
    model = build(cfg)
    assert type(model) is ConvMaskFCOS
    inputs = random_inputs((2, 1))
    for image in inputs:
        del image["instances"]._fields["gt_masks"]
    losses_and_gradients(model, inputs, FCOS_LOSSES)
    results = model.eval()(inputs)
    assert len(results[0]["instances"])
    for found, image in zip(results, inputs, strict=True):
        check_result(found, image, masks=False)


def test_a_fixed_margin_is_that_of_the_prior(small_cfg: MakeCfg) -> None:
    """The probability at the distance of the prior is 1/2."""
    model = build(small_cfg(f"{NODE}.MARGIN.FIXED", True, f"{NODE}.MARGIN.PRIOR", 3.0))
    margin = torch.tensor(model.mask_options.fixed_margin)
    assert torch.exp(-margin * 9).item() == pytest.approx(0.5)


def test_what_is_missing_is_named(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg()).train()
    inputs = random_inputs()
    del inputs[1]["instances"]._fields["gt_masks"]
    with pytest.raises(ValueError, match=r"image 'random\.png' has boxes without masks"):
        model(inputs)
    del inputs[1]["instances"]
    with pytest.raises(ValueError, match=r"no 'instances' for image 'random\.png'"):
        model(inputs)
    inputs = random_inputs()
    inputs[0]["instances"].gt_classes[0] = 7
    with pytest.raises(ValueError, match="NUM_CLASSES is 5, but an object has class 7"):
        model(inputs)


def test_mixed_precision(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(random_inputs((2,)))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
        check_result(model.eval()(random_inputs((2,)))[0], random_inputs((2,))[0])
