"""The default variant against Detectron2's own classes, on random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import nn

MakeCfg = Callable[..., CfgNode]
MakeInputs = Callable[..., list[dict[str, Any]]]


def pair(cfg: CfgNode, theirs_name: str, theirs_head: str = "SemSegFPNHead") -> tuple[nn.Module, nn.Module]:
    """Our model and Detectron2's, with the same weights and batch statistics."""
    torch.manual_seed(0)
    ours = build_model(cfg)
    for _ in range(20):
        ours.backbone(torch.randn(2, 3, 64, 96))
    if ours.roi_heads is not None:
        # scores that differ from each other: Detectron2 has no defined order of equal ones
        nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.1)
    theirs_cfg = cfg.clone()
    theirs_cfg.MODEL.META_ARCHITECTURE = theirs_name
    theirs_cfg.MODEL.SEM_SEG_HEAD.NAME = theirs_head
    theirs = build_model(theirs_cfg)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def losses_and_gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    model.train()
    torch.manual_seed(5)
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_same_instances(ours: Instances, theirs: Instances) -> None:
    assert len(ours) == len(theirs) > 0
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(ours.get(field), theirs.get(field)), field


def assert_same_losses(ours: nn.Module, theirs: nn.Module, inputs: list[dict[str, Any]]) -> None:
    (our_losses, our_gradients), (their_losses, their_gradients) = (
        losses_and_gradients(model, inputs) for model in (ours, theirs)
    )
    assert our_losses.keys() == their_losses.keys()
    for name, loss in their_losses.items():
        torch.testing.assert_close(our_losses[name], loss, rtol=1e-6, atol=1e-7, msg=name)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("objects", [(3,), (2, 0, 4)])
def test_panoptic_fpn(small_cfg: MakeCfg, random_inputs: MakeInputs, objects: tuple[int, ...]) -> None:
    cfg = small_cfg("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.1)
    ours, theirs = pair(cfg, "PanopticFPN")
    inputs = random_inputs(objects)
    with torch.no_grad():
        results = zip(ours.eval()(inputs), theirs.eval()(inputs), strict=True)
        raw = ours.inference(inputs, do_postprocess=False)
    for index, (our_result, their_result) in enumerate(results):
        assert our_result.keys() == their_result.keys()
        torch.testing.assert_close(our_result["sem_seg"], their_result["sem_seg"], rtol=0, atol=1e-5)
        assert_same_instances(our_result["instances"], their_result["instances"])
        assert torch.equal(our_result["panoptic_seg"][0], their_result["panoptic_seg"][0])
        assert our_result["panoptic_seg"][1] == their_result["panoptic_seg"][1]
        assert any(segment["isthing"] for segment in our_result["panoptic_seg"][1])
        assert len(raw[0][index]) >= len(our_result["instances"])
        assert raw[1][index].shape == (4, 64, 96)
    assert_same_losses(ours, theirs, inputs)


def test_instance_loss_weight_is_detectron2s(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    ours, theirs = pair(small_cfg("MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 0.3), "PanopticFPN")
    assert_same_losses(ours, theirs, random_inputs())


def test_instance_task_is_mask_rcnn(small_cfg: MakeCfg, random_inputs: MakeInputs) -> None:
    ours, theirs = pair(small_cfg("MODEL.PANOPTIC_FPN.TASK", "instance"), "GeneralizedRCNN")
    inputs = random_inputs()
    for image in inputs:
        del image["sem_seg"]
    with torch.no_grad():
        for our_result, their_result in zip(ours.eval()(inputs), theirs.eval()(inputs), strict=True):
            assert our_result.keys() == their_result.keys() == {"instances"}
            assert_same_instances(our_result["instances"], their_result["instances"])
    assert_same_losses(ours, theirs, inputs)


@pytest.mark.parametrize("head", ["SemSegFPNHead", "PanopticFPNSemSegHead"])
def test_semantic_task_is_semantic_segmentor(small_cfg: MakeCfg, random_inputs: MakeInputs, head: str) -> None:
    """Our head works in Detectron2's meta-architecture too."""
    ours, theirs = pair(small_cfg("MODEL.PANOPTIC_FPN.TASK", "semantic"), "SemanticSegmentor", head)
    inputs = random_inputs()
    for image in inputs:
        del image["instances"]
    with torch.no_grad():
        for our_result, their_result in zip(ours.eval()(inputs), theirs.eval()(inputs), strict=True):
            assert our_result.keys() == their_result.keys() == {"sem_seg"}
            torch.testing.assert_close(our_result["sem_seg"], their_result["sem_seg"], rtol=0, atol=1e-5)
    assert_same_losses(ours, theirs, inputs)


def test_a_zoo_config_needs_another_meta_architecture_only(small_cfg: MakeCfg) -> None:
    cfg = small_cfg("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.PANOPTIC_FPN.AGGREGATION", "concat")
    head = build_model(cfg).sem_seg_head
    assert head.out_channels == 4 * cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
    assert head.predictor.in_channels == head.out_channels


def test_names_of_the_zoos_weights() -> None:
    """The semantic head's part of a model-zoo file, as the dossier of the published models lists it."""
    from detectron2.layers import ShapeSpec

    from convmask.projects.panoptic_fpn import PanopticFPNSemSegHead

    convs = {"p2.0": 256, "p3.0": 256, "p4.0": 256, "p4.2": 128, "p5.0": 256, "p5.2": 128, "p5.4": 128}
    weights = {"predictor.weight": torch.randn(54, 128, 1, 1), "predictor.bias": torch.randn(54)}
    for name, channels in convs.items():
        weights[f"{name}.weight"] = torch.randn(128, channels, 3, 3)
        weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"] = torch.randn(128), torch.randn(128)
    shapes = {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in range(2, 6)}
    head = PanopticFPNSemSegHead(shapes, num_classes=54)
    head.load_state_dict(weights, strict=True)
    assert torch.equal(head.p5.get_submodule("4").norm.bias, weights["p5.4.norm.bias"])
