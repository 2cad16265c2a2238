"""Files in both releases' formats: recognised, converted, and told apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer, CheckpointError, read_checkpoint

from .mxnet_files import write_params

BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
MXNET_HEADS = {
    "proposal_generator.rpn_head.conv": "rpn_conv_3x3",
    "proposal_generator.rpn_head.scores": "rpn_cls_score",
    "proposal_generator.rpn_head.deltas": "rpn_bbox_pred",
    "roi_heads.head.reduction": "conv_new_1",
    "roi_heads.head.score_maps": "fcis_cls_seg",
    "roi_heads.head.box_maps": "fcis_bbox",
}
CHAINER_HEADS = dict(
    zip(MXNET_HEADS, ["rpn/conv1", "rpn/score", "rpn/loc", "head/conv1", "head/cls_seg", "head/ag_loc"], strict=True)
)
Arrays = dict[str, np.ndarray]


@pytest.fixture
def narrow_cfg(small_cfg: Callable[..., CfgNode]) -> Callable[..., CfgNode]:
    def make(*overrides: object) -> CfgNode:
        options = ["MODEL.BACKBONE.NAME", "build_fcis_resnet_backbone", "MODEL.RESNETS.STEM_OUT_CHANNELS", 4]
        options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 2]
        options += ["MODEL.FCIS.GROUP_SIZE", 7, "MODEL.FCIS.MASK_SIZE", 21]
        return small_cfg(*options, *overrides)

    return make


def randomised(cfg: CfgNode) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.5 if "var" in name else torch.randn(value.shape))
    return model


def positions(maps: torch.Tensor) -> torch.Tensor:
    """Score maps' channels as the releases have them."""
    parts = maps.unflatten(0, (7, 7, 2, -1))
    return parts.permute(3, 2, 0, 1, *range(4, parts.dim())).flatten(0, 3)


def as_mxnet(state: dict[str, torch.Tensor]) -> Arrays:
    arrays: Arrays = {}
    for name, tensor in state.items():
        layer, _, value = name.rpartition(".")
        array = tensor.float()
        if layer in MXNET_HEADS:
            if "score_maps" in layer:
                array = positions(array)
            if "box_maps" in layer:
                array = torch.cat([torch.randn_like(array), array])
            arrays[f"arg:{MXNET_HEADS[layer]}_{value}"] = array.numpy()
            continue
        if value == "num_batches_tracked":
            continue
        names = {
            "weight": "arg:{}_gamma",
            "bias": "arg:{}_beta",
            "running_mean": "aux:{}_moving_mean",
            "running_var": "aux:{}_moving_var",
        }
        block = re.fullmatch(r"backbone\.res(\d)\.(\d+)\.(\w+?)(\.norm)?", layer)
        if block:
            letter = "abc"[int(block[2])] if block[1] in "25" else "a" if block[2] == "0" else f"b{block[2]}"
            stem = f"{block[1]}{letter}_{BRANCHES[block[3]]}"
            arrays[names[value].format(f"bn{stem}") if block[4] else f"arg:res{stem}_weight"] = array.numpy()
        elif layer.endswith("norm"):
            arrays[names[value].format("bn_conv1")] = array.numpy()
        else:
            arrays["arg:conv1_weight"] = array.flip(1).numpy()
    arrays["arg:fcis_bbox_weight_test"] = arrays["arg:fcis_bbox_weight"] * 0.2
    arrays["arg:fcis_bbox_bias_test"] = arrays["arg:fcis_bbox_bias"] * 0.2
    return arrays


def as_chainercv(state: dict[str, torch.Tensor]) -> Arrays:
    arrays: Arrays = {}
    for name, tensor in state.items():
        layer, _, value = name.rpartition(".")
        array = tensor.float()
        if layer in CHAINER_HEADS:
            if "rpn_head.scores" in layer:
                array = array.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            if "rpn_head.deltas" in layer:
                array = array.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
            if "score_maps" in layer:
                array = positions(array)
            if "box_maps" in layer:
                array = array.unflatten(0, (4, 49))[[1, 0, 3, 2]].flatten(0, 1)
                array = torch.cat([torch.randn_like(array), array])
            arrays[f"{CHAINER_HEADS[layer]}/{'W' if value == 'weight' else 'b'}"] = array.numpy()
            continue
        block = re.fullmatch(r"backbone\.(res\d)\.(\d+)\.(\w+?)(\.norm)?", layer)
        stem = "extractor/conv1"
        if block:
            conv = "residual_conv" if block[3] == "shortcut" else block[3]
            stem = f"extractor/{block[1]}/{'a' if block[2] == '0' else f'b{block[2]}'}/{conv}"
        if layer.endswith("norm"):
            key = {"weight": "gamma", "bias": "beta", "running_mean": "avg_mean", "running_var": "avg_var"}.get(
                value, "N"
            )
            arrays[f"{stem}/bn/{key}"] = array.numpy()
        else:
            arrays[f"{stem}/conv/W"] = (array if block else array.flip(1)).numpy()
    return arrays


def write(path: Path, kind: str, state: dict[str, torch.Tensor]) -> Path:
    if kind == "mxnet":
        write_params(path / "fcis-0000.params", as_mxnet(state))
        return path / "fcis-0000.params"
    np.savez(path / "fcis.npz", **as_chainercv(state))
    return path / "fcis.npz"


@pytest.mark.parametrize("kind", ["mxnet", "chainercv"])
def test_every_weight_has_its_place(narrow_cfg: Callable[..., CfgNode], tmp_path: Path, kind: str) -> None:
    source = randomised(narrow_cfg("MODEL.FCIS.CONVENTION", kind))
    path = write(tmp_path, kind, source.state_dict())
    target = build_model(narrow_cfg("MODEL.FCIS.CONVENTION", kind))
    Checkpointer(target, policy="strict").load(str(path))
    for name, value in target.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["mxnet", "chainercv"])
def test_the_hint_names_the_convention_and_the_means(
    narrow_cfg: Callable[..., CfgNode], tmp_path: Path, kind: str
) -> None:
    checkpoint = read_checkpoint(str(write(tmp_path, kind, randomised(narrow_cfg()).state_dict())))
    assert f"'{kind}'" in checkpoint.hint
    assert "103.06" in checkpoint.hint
    assert not checkpoint.unused


@pytest.mark.parametrize(
    ("kind", "classes", "config"),
    [
        ("mxnet", 80, "fcis_R_101_coco_ohem.yaml"),
        ("mxnet", 20, "fcis_R_101_voc.yaml"),
        ("chainercv", 80, "fcis_R_101_coco_chainercv.yaml"),
        ("chainercv", 20, "fcis_R_101_voc_chainercv.yaml"),
        ("mxnet", 5, "Base-FCIS.yaml"),
    ],
)
def test_another_class_count_is_an_error_that_names_the_config(
    narrow_cfg: Callable[..., CfgNode], repository: Path, tmp_path: Path, kind: str, classes: int, config: str
) -> None:
    path = write(tmp_path, kind, randomised(narrow_cfg("MODEL.ROI_HEADS.NUM_CLASSES", classes)).state_dict())
    assert (repository / "configs" / "FCIS" / config).is_file()
    with pytest.raises(CheckpointError, match=rf"(?s)FCIS.*configs/FCIS/{config}"):
        Checkpointer(build_model(narrow_cfg()), policy="strict").load(str(path))


def test_fine_tuning_on_other_classes_keeps_the_rest(narrow_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    source = randomised(narrow_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 8))
    path = write(tmp_path, "mxnet", source.state_dict())
    model = build_model(narrow_cfg())
    Checkpointer(model, policy="finetune").load(str(path))
    state, expected = model.state_dict(), source.state_dict()
    assert torch.equal(state["roi_heads.head.box_maps.weight"], expected["roi_heads.head.box_maps.weight"])
    assert torch.equal(state["backbone.res5.2.conv2.weight"], expected["backbone.res5.2.conv2.weight"])
    assert state["roi_heads.head.score_maps.weight"].shape[0] == 98 * 4
