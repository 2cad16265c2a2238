"""The whole model on random images: its variants, and Detectron2's interfaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from convmask.projects.fcis import CHAINERCV, MXNET, FCISROIHeads
from convmask.projects.fcis.augmentation import unflip
from convmask.projects.fcis.boxes import clip, decode, encode, from_detectron, to_detectron
from convmask.projects.fcis.inference import (
    InferenceOptions,
    RoiPredictions,
    detect,
    paste,
    paste_rounded,
    rescale,
)

MakeCfg = Callable[..., CfgNode]
MakeInputs = Callable[..., list[dict[str, Any]]]
NODE = "MODEL.FCIS"
LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_mask", "loss_box_reg"}
VARIANTS: dict[str, tuple] = {
    "default": (),
    "chainercv": (f"{NODE}.CONVENTION", "chainercv"),
    "k1": (f"{NODE}.GROUP_SIZE", 1),
    "k5": (f"{NODE}.GROUP_SIZE", 5),
    "separate": (f"{NODE}.SEPARATE_MAPS", True),
    "one round": (f"{NODE}.ROUNDS", 1),
    "no voting": (f"{NODE}.VOTING.ENABLED", False),
    "cpu voting": (f"{NODE}.VOTING.PROCEDURE", "cpu"),
    "detectron2 paste": (f"{NODE}.PASTE", "detectron2"),
    "random": (f"{NODE}.OHEM.ENABLED", False, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    "ignore filled": (
        *(f"{NODE}.OHEM.ENABLED", False, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
        *(f"{NODE}.SAMPLING.IGNORE_FILLED", True, f"{NODE}.SAMPLING.BACKGROUND_LOW", 0.1),
    ),
    "padded": (f"{NODE}.PAD_PROPOSALS", True, "MODEL.RPN.NMS_THRESH", 0.1),
    "stride 16": (f"{NODE}.OUTPUT_STRIDE", 16),
    "stride 4": (f"{NODE}.OUTPUT_STRIDE", 4),
}


def build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(3)
    model = build_model(cfg)
    for module in model.roi_heads.modules():  # scores that differ from RoI to RoI
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    return model


def losses_and_gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    with EventStorage():
        losses = model.train()(inputs)
    assert losses.keys() == LOSSES
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    return losses


def check_result(result: dict[str, Any], inputs: dict[str, Any]) -> None:
    found = result["instances"]
    size = inputs["height"], inputs["width"]
    assert found.image_size == size
    assert found.pred_masks.shape == (len(found), *size)
    assert found.pred_masks.dtype == torch.bool
    assert found.pred_classes.dtype == torch.int64
    boxes = found.pred_boxes.tensor
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= size[1]).all()
    assert (boxes[:, 3] <= size[0]).all()
    assert ((found.scores > 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(small_cfg: MakeCfg, random_inputs: MakeInputs, variant: str) -> None:
    model = build(small_cfg(*VARIANTS[variant]))
    losses = losses_and_gradients(model, random_inputs((2, 3)))
    assert float(losses["loss_mask"].detach()) > 0
    heads = model.roi_heads.head
    for layer in (heads.score_maps, heads.box_maps, heads.mask_maps, model.proposal_generator.rpn_head.scores):
        assert layer is None or layer.weight.grad.abs().sum() > 0
    inputs = random_inputs((1, 1))
    results = model.eval()(inputs)
    assert sum(len(result["instances"]) for result in results)
    for result, given in zip(results, inputs, strict=True):
        check_result(result, given)


@pytest.mark.parametrize("rounds", [1, 2])
def test_fpn(small_cfg: MakeCfg, random_inputs: MakeInputs, rounds: int) -> None:
    """RoIs of both levels, in their own order, read what they would read alone."""
    model = build(small_cfg("MODEL.FPN.OUT_CHANNELS", 16, f"{NODE}.ROUNDS", rounds, name="fcis_fpn_synthetic"))
    losses_and_gradients(model, random_inputs((2, 3)))
    inputs = random_inputs((1,))
    check_result(model.eval()(inputs)[0], inputs[0])
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        heads: FCISROIHeads = model.roi_heads
        maps = [heads.head(features[name]) for name in heads.in_features]
        boxes = torch.tensor([[0.0, 0, 79, 63], [3, 4, 20, 30], [0, 0, 110, 120], [30, 5, 60, 40]])
        together = heads.read(maps, [boxes], None)
        for row in range(len(boxes)):
            alone = heads.read(maps, [boxes[row : row + 1]], None)
            for actual, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(actual[row : row + 1], expected)
        assert set(heads._levels(boxes).tolist()) == {0, 1}


def test_images_without_objects(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    for options in ((), VARIANTS["random"]):
        losses = losses_and_gradients(build(small_cfg(*options)), random_inputs((0, 2)))
        assert float(losses["loss_cls"].detach()) > 0
        losses = losses_and_gradients(build(small_cfg(*options)), random_inputs((0,)))
        assert float(losses["loss_mask"].detach()) == 0


def test_the_batch_does_not_change_an_image(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """Images of other sizes in the batch pad it; neither proposals nor scores may come from the padding."""
    model = build(small_cfg()).eval()
    inputs = random_inputs((1, 1), size=(64, 96))
    inputs[1] = random_inputs((1,), size=(64, 64))[0]  # padding begins at a whole cell
    together, alone = model(inputs)[1]["instances"], model(inputs[1:])[0]["instances"]
    # convolutions see the padding as zeros in either case, but only up to the border of the map
    assert abs(len(together) - len(alone)) <= max(3, len(alone) // 5)
    for found in (together, alone):
        check_result({"instances": found}, inputs[1])


def test_heads_in_a_plain_generalized_rcnn(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """With Detectron2's own RPN and pasting."""
    cfg = small_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
    cfg.MODEL.RPN.HEAD_NAME, cfg.MODEL.ANCHOR_GENERATOR.NAME = "StandardRPNHead", "DefaultAnchorGenerator"
    cfg.MODEL.RPN.BOUNDARY_THRESH = -1
    torch.manual_seed(0)
    model = build_model(cfg)
    losses_and_gradients(model, random_inputs((2, 3)))
    inputs = random_inputs((1,))
    result = model.eval()(inputs)[0]["instances"]
    assert len(result)
    assert result.pred_masks.shape[1:] == (inputs[0]["height"], inputs[0]["width"])
    given = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[2.0, 3, 40, 50]])), pred_classes=torch.tensor([1]))
    masks = model.inference(inputs, [given], do_postprocess=False)[0].pred_masks
    assert masks.shape == (1, 1, 9, 9)
    assert ((masks >= 0) & (masks <= 1)).all()


def test_without_postprocessing(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg()).eval()
    inputs = random_inputs((1,))
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)[0]
    assert found.image_size == tuple(inputs[0]["image"].shape[1:])
    assert found.pred_masks.shape[1:] == (1, 9, 9)


@pytest.mark.parametrize("convention", ["mxnet", "chainercv"])
def test_test_time_augmentation(small_cfg: MakeCfg, random_inputs: MakeInputs, convention: str) -> None:
    options = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 100)
    inputs = random_inputs((1,))
    model = build(small_cfg(*options, f"{NODE}.CONVENTION", convention)).eval()
    check_result(model(inputs)[0], inputs[0])
    with torch.no_grad():
        several = model.predictions(inputs)[0]
        one = model.predict_input(inputs)[0]
    assert len(several.boxes) > 2 * len(one.boxes)


@pytest.mark.parametrize("convention", [MXNET, CHAINERCV])
def test_mirrored_rois_are_turned_back(convention: Any) -> None:
    box = torch.tensor([[2.0, 3.0, 9.0, 8.0]])
    last = 20 - convention.offset
    mirrored = torch.tensor([[last - 9.0, 3.0, last - 2.0, 8.0]])
    masks = torch.arange(9.0).view(1, 3, 3)
    turned = unflip(RoiPredictions(mirrored, torch.ones(1, 2), masks.flip(2)), 20, convention.offset)
    assert torch.equal(turned.boxes, box)
    assert torch.equal(turned.masks, masks)


@pytest.mark.parametrize("convention", [MXNET, CHAINERCV])
def test_boxes_go_there_and_back(convention: Any) -> None:
    torch.manual_seed(0)
    corners, sides = torch.rand(2, 50, 2, dtype=torch.float64) * 80 + 1
    boxes = torch.cat([corners, corners + sides], dim=1)
    targets = boxes.flip(0)
    torch.testing.assert_close(decode(boxes, encode(boxes, targets, convention), convention), targets)
    torch.testing.assert_close(from_detectron(to_detectron(boxes, convention), convention), boxes)
    clipped = to_detectron(clip(boxes * 3 - 50, (100, 90), convention), convention)
    assert clipped[:, 2].max() == 90
    assert clipped[:, 3].max() == 100


def test_pasted_masks_fill_their_boxes() -> None:
    masks = torch.ones(3, 5, 5)
    masks[1, :, 3:] = 0
    boxes = torch.tensor([[0, 0, 4, 6], [2, 3, 12, 9], [5, 5, 5, 9]])
    pasted = paste_rounded(masks, boxes, (10, 12), 0.4)
    assert pasted[0].sum() == 24
    assert pasted[1].sum() == 6 * pasted[1, 4].sum()
    assert pasted[1, 4].nonzero()[:, 0].tolist() == list(range(2, 8))  # the value falls to 0.4 at 8.2
    assert not pasted[2].any()


@pytest.mark.parametrize("how", ["release", "detectron2"])
def test_a_whole_object_is_found_whole(how: Any) -> None:
    """One RoI with a mask that is all inside: its box is the result's, and the mask fills it."""
    predictions = RoiPredictions(
        torch.tensor([[20.0, 30.0, 59.0, 69.0]]), torch.tensor([[0.1, 0.2, 0.7]]), torch.ones(1, 7, 7)
    )
    scaled = rescale(predictions, (100, 80), (100, 80), MXNET)
    options = InferenceOptions(paste=how, score_threshold=0.5)
    found = paste(detect(scaled, (100, 80), options), options)
    assert found.pred_classes.tolist() == [1]
    assert found.pred_boxes.tensor.tolist() == [[20, 30, 60, 70]]
    assert found.pred_masks[0, 30:70, 20:60].float().mean() > 0.95
    around = found.pred_masks.sum() - found.pred_masks[0, 30:70, 20:60].sum()
    assert around == 0 if how == "release" else around < 160  # Detectron2's masks reach over their boxes
    none = replace(options, score_threshold=0.9)
    assert len(paste(detect(scaled, (100, 80), none), none)) == 0


def test_frozen_statistics_stay(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    """FixedStatsBN: weights and biases of res3 on are trained, statistics are not; stem and res2 are frozen."""
    options = ("MODEL.BACKBONE.NAME", "build_fcis_resnet_backbone", "MODEL.RESNETS.NORM", "FixedStatsBN")
    widths = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8)
    cfg = small_cfg(*options, *widths, "MODEL.RESNETS.WIDTH_PER_GROUP", 2, "MODEL.BACKBONE.FREEZE_AT", 2)
    model = build(cfg)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    losses_and_gradients(model, random_inputs((2,)))
    for name, value in model.named_buffers():
        if "running" in name:
            assert torch.equal(value, before[name]), name
    assert model.backbone.res3[0].conv1.norm.weight.grad is not None
    assert not model.backbone.res2[0].conv1.weight.requires_grad


def test_mixed_precision(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg())
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage():
        losses = model.train()(random_inputs((2,)))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
        inputs = random_inputs((2,))
        check_result(model.eval()(inputs)[0], inputs[0])


def test_divergence_is_an_error(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    model = build(small_cfg()).train()
    nn.init.constant_(model.proposal_generator.rpn_head.deltas.bias, float("nan"))
    with EventStorage(), pytest.raises(FloatingPointError, match="diverged"):
        model(random_inputs((1,)))
