"""What the training loop does to any model holds for each method: its quick configs, on images of 64 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from convmask.config import get_cfg
from convmask.engine import load_config, prepare
from convmask.engine.model_options import checkpoint_activations
from convmask.engine.optimizer import build_optimizer
from convmask.engine.step import TrainStep

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = sorted(path.stem for path in (REPOSITORY / "configs" / "quick").glob("[a-z]*.yaml"))
BACKBONES = {
    "panoptic_fpn": "PanopticFPN/panoptic_fpn_R_50_1x",
    "panoptic_fcn": "PanopticFCN/panoptic_fcn_R_50_1x",
    "fcis": "FCIS/fcis_R_50_coco_ohem",
    "fcis_fpn": "FCIS/fcis_R_50_FPN_coco",
    "embed_mask": "EmbedMask/embed_mask_v2_R_50_1x",
    "knet": "KNet/knet_panoptic_R_50_1x",
    "knet_semantic": "KNet/knet_semantic_fcn_R_50_80k",
    "knet_swin": "KNet/knet_semantic_upernet_swin_t_80k",
    "knet_swin_fpn": "KNet/knet_panoptic_swin_l_3x",
}


@pytest.fixture
def cfg(quick: str, few_images: str) -> CfgNode:
    sets = ["DATASETS.TRAIN", f"('{few_images}',)", "DATASETS.TEST", "()"]
    cfg = load_config(f"quick/{quick}.yaml", [*sets, "MODEL.DEVICE", "cpu", "MODEL.NARROW_RESNET.WIDTH", "8"])
    prepare(cfg)
    return cfg


@pytest.fixture
def model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg).train()


def batch(*empty: bool) -> list[dict[str, Any]]:
    """Dataset dicts of 64 x 64 pixels, as the mapper gives them, with two objects or nothing that is annotated."""
    generator = torch.Generator().manual_seed(7)
    items = []
    for number, nothing in enumerate(empty):
        boxes = torch.tensor([[4, 8, 36, 44], [30, 20, 60, 56]])[: 0 if nothing else 2]
        masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = True
        instances = Instances((64, 64), gt_boxes=Boxes(boxes.float()), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.arange(len(boxes))
        semantic = torch.full((64, 64), 255)
        if not nothing:
            semantic[:32], semantic[32:] = 1, 2
        pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        names = {"file_name": f"{number}.png", "height": 64, "width": 64}
        items.append({"image": pixels, "instances": instances, "sem_seg": semantic, **names})
    return items


def gradients(
    model: nn.Module, items: list[dict[str, Any]], precision: torch.dtype = torch.float32
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The losses, and the gradient of each trainable parameter that has one; what is sampled is always the same."""
    model.zero_grad()
    torch.manual_seed(3)
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        losses = model(items)
    sum(losses.values()).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return losses, found


@pytest.mark.parametrize("quick", QUICK)
def test_images_of_nothing_give_every_parameter_a_gradient(quick: str, model: nn.Module) -> None:
    losses, found = gradients(model, batch(True, True))
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert [name for name in trainable if name not in found] == []
    assert all(torch.isfinite(value).all() for value in (*losses.values(), *found.values()))


@pytest.mark.parametrize("quick", QUICK)
def test_activation_checkpointing_changes_neither_losses_nor_gradients(model: nn.Module) -> None:
    items = batch(False, True)
    losses, expected = gradients(model, items)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    # Running statistics take no part in a training pass, so that the second one sees what the first one did.
    assert checkpoint_activations(model.backbone) > 0
    repeated, found = gradients(model, items)
    assert repeated.keys() == losses.keys() and found.keys() == expected.keys()
    assert all(torch.equal(repeated[name], value) for name, value in losses.items())
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name, value in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert value == statistics[name] + (statistics[name] > 0).long(), name


@pytest.mark.parametrize("quick", QUICK)
def test_bfloat16_on_the_cpu(model: nn.Module) -> None:
    items = batch(False, False)
    exact, _ = gradients(model, items)
    losses, found = gradients(model, items, torch.bfloat16)
    total, expected = (float(sum(terms.values()).detach()) for terms in (losses, exact))
    # What is drawn or matched may differ by the rounding: the size is what is compared.
    assert losses.keys() == exact.keys() and total == pytest.approx(expected, rel=0.25) and total != expected
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("quick", QUICK)
def test_a_step_of_two_passes_one_of_nothing(quick: str, cfg: CfgNode, model: nn.Module) -> None:
    items = batch(False, False, True, True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    cfg.SOLVER.BASE_LR = 0.01
    step = TrainStep(model, [items[:2], items[2:]], build_optimizer(cfg, model), passes=2)
    torch.manual_seed(3)
    with EventStorage() as storage:
        step.run_step()
    assert storage.latest()["total_loss"][0] > 0
    for name, value in model.named_parameters():
        assert torch.isfinite(value).all(), name
        # A weight whose gradient is exactly zero, of a class that no image has, is only changed by its decay.
        untouched = value.grad is None or not value.grad.any()
        assert untouched or not torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_of_a_release_has_blocks_that_checkpointing_knows(name: str) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(REPOSITORY / "configs" / f"{BACKBONES[name]}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.NUM_HEADS = 16, (1, 2, 4, 8)
    backbone = build_backbone(cfg)
    # ResNet-50 has 16 blocks in four stages, and the stem.
    expected = sum(cfg.MODEL.SWIN.DEPTHS) if "swin" in name else 17
    assert checkpoint_activations(backbone) == expected
