"""Converters of ImageNet backbones. Importing this module registers them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names

from convmask.checkpoint.recognition import State, register_converter, rename_keys

_BATCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
_BLOCK_LAYERS = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}


@register_converter(
    "Caffe2 / Detectron1",
    matches=lambda state: "conv1_w" in state or "conv_rpn_fpn2_w" in state or "conv_rpn_w" in state,
    hint="MSRA's R-50 and R-101 expect INPUT.FORMAT BGR, PIXEL_MEAN [103.530, 116.280, 123.675], PIXEL_STD [1, 1, 1] "
    "and RESNETS.STRIDE_IN_1X1 True; their batch norm is an affine layer, so RESNETS.NORM must be FrozenBN",
    relative=True,
)
def convert_caffe2(state: State) -> State:
    """Names by Detectron2's own rules. Solver state and ImageNet's classifier are dropped."""
    for name in [name for name in state if re.fullmatch(r"lr|.*_momentum|(fc1000|pred)_[wb]", name)]:
        state.pop(name)
    converted, _ = convert_c2_detectron_names(state)
    state.clear()
    return converted


@register_converter(
    "torchvision ResNet",
    matches=lambda state: {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= state.keys(),
    hint="torchvision's ResNets expect INPUT.FORMAT RGB, PIXEL_MEAN [123.675, 116.280, 103.530], PIXEL_STD "
    "[58.395, 57.120, 57.375] and RESNETS.STRIDE_IN_1X1 False",
    relative=True,
)
def convert_torchvision_resnet(state: State) -> State:
    """layer1..4 -> res2..5, bnX -> convX.norm, downsample -> shortcut. The classifier is dropped."""
    for name in ("fc.weight", "fc.bias"):
        state.pop(name, None)
    stages = {str(index): f"res{index + 1}" for index in range(1, 5)}
    converted = rename_keys(state, [(r"conv1\.(\w+)", r"stem.conv1.\1"), (r"bn1\.(\w+)", r"stem.conv1.norm.\1")])
    for index, stage in stages.items():
        block = rf"layer{index}\.(\d+)\."
        converted |= rename_keys(
            state,
            [
                (block + r"conv(\d)\.(\w+)", rf"{stage}.\1.conv\2.\3"),
                (block + r"bn(\d)\.(\w+)", rf"{stage}.\1.conv\2.norm.\3"),
                (block + r"downsample\.0\.(\w+)", rf"{stage}.\1.shortcut.\2"),
                (block + r"downsample\.1\.(\w+)", rf"{stage}.\1.shortcut.norm.\2"),
            ],
        )
    return converted


@register_converter(
    "torchvision Swin Transformer",
    matches=lambda state: {"features.0.0.weight", "features.1.0.attn.relative_position_bias_table"} <= state.keys(),
    hint="torchvision's Swin Transformers expect INPUT.FORMAT RGB, PIXEL_MEAN [123.675, 116.280, 103.530], PIXEL_STD "
    "[58.395, 57.120, 57.375]",
    relative=True,
)
def convert_torchvision_swin(state: State) -> State:
    """Keeps torchvision's names. The classifier and the norm before it are dropped."""
    for name in ("head.weight", "head.bias", "norm.weight", "norm.bias"):
        state.pop(name, None)
    return rename_keys(state, [(r"(features\..+)", r"\1")])


_MXNET_HINT = (
    "MXNet's resnet_v1 expects INPUT.FORMAT RGB, PIXEL_MEAN [123.68, 116.779, 103.939], PIXEL_STD [1, 1, 1] and "
    "RESNETS.STRIDE_IN_1X1 True"
)


@register_converter(
    "MXNet resnet_v1 (Caffe names)",
    matches=lambda state: {"conv1_weight", "bn_conv1_gamma", "res2a_branch2a_weight"} <= state.keys(),
    hint=_MXNET_HINT,
    relative=True,
)
def convert_mxnet_caffe_resnet(state: State) -> State:
    """``res3b2_branch2a_weight`` -> ``res3.2.conv1.weight``, ``bn3b2_branch2a_gamma`` -> ``res3.2.conv1.norm.weight``.

    The blocks of a stage are named a, b, c, ... or a, b1, b2, ....
    """
    for name in ("fc1000_weight", "fc1000_bias"):
        state.pop(name, None)
    converted: State = {}
    for name in list(state):
        target = _caffe_name(name)
        if target:
            converted[target] = state.pop(name)
    return converted


def _caffe_name(name: str) -> str:
    stem = re.fullmatch(r"conv1_(weight)|bn_conv1_(gamma|beta|moving_mean|moving_var)", name)
    if stem:
        return "stem.conv1.weight" if stem[1] else f"stem.conv1.norm.{_BATCH_NORM[stem[2]]}"
    layer = re.fullmatch(
        r"(?P<kind>res|bn)(?P<stage>[2-5])(?P<letter>[a-z])(?P<number>\d*)_(?P<branch>branch1|branch2[abc])_"
        r"(?P<value>weight|gamma|beta|moving_mean|moving_var)",
        name,
    )
    if layer is None or (layer["kind"] == "res") != (layer["value"] == "weight"):
        return ""
    block = int(layer["number"]) if layer["number"] else ord(layer["letter"]) - ord("a")
    value = "weight" if layer["kind"] == "res" else f"norm.{_BATCH_NORM[layer['value']]}"
    return f"res{layer['stage']}.{block}.{_BLOCK_LAYERS[layer['branch']]}.{value}"


def _is_mxnet_symbol_resnet(state: Mapping[str, torch.Tensor]) -> bool:
    # pre-activation ResNets (resnet_v2) share most names, and normalise before the first and after the last layer too
    return {"conv0_weight", "stage1_unit1_conv1_weight"} <= state.keys() and not {
        "bn_data_gamma",
        "bn1_gamma",
    } & state.keys()


@register_converter("MXNet resnet_v1", matches=_is_mxnet_symbol_resnet, hint=_MXNET_HINT, relative=True)
def convert_mxnet_symbol_resnet(state: State) -> State:
    """``stage1_unit1_conv1_weight`` -> ``res2.0.conv1.weight``, ``..._bn1_gamma`` -> ``res2.0.conv1.norm.weight``."""
    for name in ("fc1_weight", "fc1_bias"):
        state.pop(name, None)
    converted: State = {}
    for name in list(state):
        target = _symbol_name(name)
        if target:
            converted[target] = state.pop(name)
    return converted


def _symbol_name(name: str) -> str:
    stem = re.fullmatch(r"conv0_(weight)|bn0_(gamma|beta|moving_mean|moving_var)", name)
    if stem:
        return "stem.conv1.weight" if stem[1] else f"stem.conv1.norm.{_BATCH_NORM[stem[2]]}"
    layer = re.fullmatch(
        r"stage(?P<stage>[1-4])_unit(?P<unit>[1-9]\d*)_(?P<layer>conv[123]|bn[123]|conv1sc|sc_bn|sc)_"
        r"(?P<value>weight|gamma|beta|moving_mean|moving_var)",
        name,
    )
    if layer is None or (layer["value"] == "weight" and "bn" in layer["layer"]):
        return ""
    target = "shortcut" if "sc" in layer["layer"] else f"conv{layer['layer'][-1]}"
    value = "weight" if layer["value"] == "weight" else f"norm.{_BATCH_NORM[layer['value']]}"
    return f"res{int(layer['stage']) + 1}.{int(layer['unit']) - 1}.{target}.{value}"
