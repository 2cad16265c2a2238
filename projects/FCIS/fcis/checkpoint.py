"""Checkpoints of the authors' release (MXNet ``.params``) and of ChainerCV (``.npz``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from convmask.checkpoint import register_converter
from convmask.checkpoint.backbones import convert_mxnet_caffe_resnet
from convmask.checkpoint.inversion import register_no_inverse
from convmask.checkpoint.recognition import State

_BATCH_NORM = {"gamma": "weight", "beta": "bias", "avg_mean": "running_mean", "avg_var": "running_var"}
_CHAINER_LAYERS = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "residual_conv": "shortcut"}
_STEM = "backbone.stem.conv1.weight"
_HINT = (
    "FCIS's first layer, which took RGB, is turned to BGR: the weights expect INPUT.FORMAT BGR, PIXEL_MEAN "
    "[103.06, 115.90, 123.15], PIXEL_STD [1, 1, 1], RESNETS.STRIDE_IN_1X1 True and FCIS.CONVENTION "
)


def _config_of(maps: torch.Tensor, convention: str) -> str:
    """The config of a number of score maps, 2 k k (C + 1) with k = 7."""
    dataset = {81: "coco", 21: "voc"}.get(len(maps) // 98)
    if dataset is None:
        return "configs/FCIS/Base-FCIS.yaml"
    variant = "_chainercv" if convention == "chainercv" else "_ohem" if dataset == "coco" else ""
    return f"configs/FCIS/fcis_R_101_{dataset}{variant}.yaml"


def by_position(maps: torch.Tensor, group_size: int = 7) -> torch.Tensor:
    """Score maps' channels from (class, outside/inside, row, column) to (row, column, outside/inside, class)."""
    return (
        maps.unflatten(0, (-1, 2, group_size, group_size)).permute(2, 3, 1, 0, *range(4, maps.dim() + 3)).flatten(0, 3)
    )


def _group_size(boxes: torch.Tensor) -> int:
    """k, from the 8 k k channels of the box maps."""
    return round((len(boxes) / 8) ** 0.5)


@register_converter(
    "FCIS (MXNet, original release)",
    matches=lambda state: {"fcis_cls_seg_weight", "fcis_bbox_weight"} <= state.keys(),
    hint=f"{_HINT}'mxnet'",
    config=lambda state: _config_of(state["fcis_cls_seg_weight"], "mxnet"),
)
def convert_mxnet(state: State) -> State:
    """Names and orders of the release to those here.

    The score maps' channels are permuted; of the box maps those of the second of two "classes" are kept, since the
    first was never trained. Tensors named ``*_test`` hold a copy of the box maps with the deltas' deviations multiplied
    in, which is of no use here.
    """
    for name in [name for name in state if name.endswith("_test")]:
        state.pop(name)
    group = _group_size(state["fcis_bbox_weight"])
    converted: State = {}
    for value in ("weight", "bias"):
        for original, name in (
            ("rpn_conv_3x3", "proposal_generator.rpn_head.conv"),
            ("rpn_cls_score", "proposal_generator.rpn_head.scores"),
            ("rpn_bbox_pred", "proposal_generator.rpn_head.deltas"),
            ("conv_new_1", "roi_heads.head.reduction"),
        ):
            if f"{original}_{value}" in state:
                converted[f"{name}.{value}"] = state.pop(f"{original}_{value}")
        if f"fcis_cls_seg_{value}" in state:
            converted[f"roi_heads.head.score_maps.{value}"] = by_position(state.pop(f"fcis_cls_seg_{value}"), group)
        if f"fcis_bbox_{value}" in state:
            converted[f"roi_heads.head.box_maps.{value}"] = state.pop(f"fcis_bbox_{value}")[4 * group**2 :]
    backbone = convert_mxnet_caffe_resnet(state)
    return _to_bgr(converted | {f"backbone.{name}": value for name, value in backbone.items()})


def _is_chainercv(state: Mapping[str, torch.Tensor]) -> bool:
    return {"extractor/conv1/conv/W", "head/cls_seg/W", "head/ag_loc/W"} <= state.keys()


@register_converter(
    "FCIS (ChainerCV)",
    matches=_is_chainercv,
    hint=f"{_HINT}'chainercv'",
    config=lambda state: _config_of(state["head/cls_seg/W"], "chainercv"),
)
def convert_chainercv(state: State) -> State:
    """Names and orders of ChainerCV to those here.

    Besides what the release's weights need, deltas are turned from (dy, dx, dh, dw), and the RPN's scores from pairs
    (background, foreground) of each anchor to all backgrounds before all foregrounds. Anchors have the same order.
    """
    group = _group_size(state["head/ag_loc/W"])
    converted: State = {}
    for name in list(state):
        target = _chainer_name(name)
        if target is None:
            continue
        value = state.pop(name)
        if not target:
            continue
        if "rpn_head.scores" in target:
            value = value.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        elif "rpn_head.deltas" in target:
            value = value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
        elif "score_maps" in target:
            value = by_position(value, group)
        elif "box_maps" in target:
            value = value.unflatten(0, (2, 4, group**2))[1, [1, 0, 3, 2]].flatten(0, 1)
        converted[target] = value
    return _to_bgr(converted)


def _to_bgr(state: State) -> State:
    """With the first layer for BGR images, Detectron2's default, as its ImageNet weights are."""
    if _STEM in state:
        state[_STEM] = state[_STEM].flip(1)
    return state


def _chainer_name(name: str) -> str | None:
    """Our name of a ChainerCV weight, "" for counters, None for what is unknown."""
    parts = name.split("/")
    value = {"W": "weight", "b": "bias"}.get(parts[-1], "")
    heads = {
        "rpn/conv1": "proposal_generator.rpn_head.conv",
        "rpn/score": "proposal_generator.rpn_head.scores",
        "rpn/loc": "proposal_generator.rpn_head.deltas",
        "head/conv1": "roi_heads.head.reduction",
        "head/cls_seg": "roi_heads.head.score_maps",
        "head/ag_loc": "roi_heads.head.box_maps",
    }
    layer = heads.get("/".join(parts[:-1]))
    if layer:
        return f"{layer}.{value}" if value else None
    if parts[0] != "extractor" or len(parts) < 4 or parts[-2] not in ("conv", "bn"):
        return None
    if parts[1] == "conv1":
        layer = "backbone.stem.conv1"
    elif len(parts) == 6 and parts[1].startswith("res") and parts[3] in _CHAINER_LAYERS:
        block = 0 if parts[2] == "a" else int(parts[2].removeprefix("b"))
        layer = f"backbone.{parts[1]}.{block}.{_CHAINER_LAYERS[parts[3]]}"
    else:
        return None
    if parts[-2] == "conv":
        return f"{layer}.{value}" if value else None
    if parts[-1] == "N":
        return ""
    return f"{layer}.norm.{_BATCH_NORM[parts[-1]]}" if parts[-1] in _BATCH_NORM else None


def _is_ours(state: Mapping[str, torch.Tensor]) -> bool:
    return {"roi_heads.head.score_maps.weight", "roi_heads.head.box_maps.weight"} <= state.keys()


register_no_inverse(
    "FCIS (MXNet, original release)",
    matches=_is_ours,
    reason="its box maps have a first half, of the class that is never trained, and copies (*_test) that hold the "
    "deltas' deviations; neither is in the weights here",
)
register_no_inverse(
    "FCIS (ChainerCV)",
    matches=_is_ours,
    reason="its box maps have a first half, of the class that is never trained, which the weights here do not have",
)
