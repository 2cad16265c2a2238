"""Names of OpenMMLab's backbones and necks, which the checkpoints of several methods have.

Converters of whole models use the rules; importing this module registers those of ImageNet backbones alone.
"""

from __future__ import annotations

import re

import torch

from convmask.checkpoint.inversion import inverse_rules
from convmask.checkpoint.recognition import State, register_converter, rename_keys

Rules = list[tuple[str, str]]

_RGB = "INPUT.FORMAT RGB, PIXEL_MEAN [123.675, 116.280, 103.530] and PIXEL_STD [58.395, 57.120, 57.375]"


def resnet_rules(source: str, target: str) -> Rules:
    """Rules of :func:`rename_keys` from OpenMMLab's ResNet, V1c and DCN included, to Detectron2's.

    Args:
        source: prefix of the names in the file ("backbone."), "" for none.
        target: prefix of the names here ("backbone.bottom_up.").
    """
    s, t = re.escape(source), target
    rules = [(s + r"conv1\.(\w+)", t + r"stem.conv1.\1"), (s + r"bn1\.(\w+)", t + r"stem.conv1.norm.\1")]
    for number in (1, 2, 3):
        conv, norm = 3 * number - 3, 3 * number - 2
        rules += [
            (s + rf"stem\.{conv}\.(\w+)", t + rf"stem.conv{number}.\1"),
            (s + rf"stem\.{norm}\.(\w+)", t + rf"stem.conv{number}.norm.\1"),
        ]
    for index in range(1, 5):
        block, stage = s + rf"layer{index}\.(\d+)\.", t + rf"res{index + 1}.\1."
        rules += [
            (block + r"conv2\.conv_offset\.(\w+)", stage + r"conv2.offset.\2"),
            (block + r"conv(\d)\.(\w+)", stage + r"conv\2.\3"),
            (block + r"bn(\d)\.(\w+)", stage + r"conv\2.norm.\3"),
            (block + r"downsample\.0\.(\w+)", stage + r"shortcut.\2"),
            (block + r"downsample\.1\.(\w+)", stage + r"shortcut.norm.\2"),
        ]
    return rules


def fpn_rules(target: str = "backbone.") -> Rules:
    """Rules from OpenMMLab's FPN of four levels (``neck.``) to Detectron2's p2 to p5."""
    rules = []
    for index in range(4):
        rules += [
            (rf"neck\.lateral_convs\.{index}\.conv\.(\w+)", rf"{target}fpn_lateral{index + 2}.\1"),
            (rf"neck\.fpn_convs\.{index}\.conv\.(\w+)", rf"{target}fpn_output{index + 2}.\1"),
        ]
    return rules


def swin_rules(source: str, target: str) -> Rules:
    """Rules from OpenMMLab's Swin Transformer to torchvision's, whose patch merging has another layout."""
    s, t = re.escape(source), target
    rules = [
        (s + r"patch_embed\.projection\.(\w+)", t + r"features.0.0.\1"),
        (s + r"patch_embed\.norm\.(\w+)", t + r"features.0.2.\1"),
        (s + r"(norm\d\.\w+)", t + r"\1"),
    ]
    for stage in range(4):
        block, here = s + rf"stages\.{stage}\.blocks\.(\d+)\.", t + rf"features.{2 * stage + 1}.\1."
        merging = t + rf"features.{2 * stage + 2}."
        rules += [
            (block + r"(norm\d\.\w+)", here + r"\2"),
            (block + r"attn\.w_msa\.((?:qkv|proj)\.\w+|relative_position_bias_table)", here + r"attn.\2"),
            (block + r"ffn\.layers\.0\.0\.(\w+)", here + r"mlp.0.\2"),
            (block + r"ffn\.layers\.1\.(\w+)", here + r"mlp.3.\2"),
            (s + rf"stages\.{stage}\.downsample\.((?:norm|reduction)\.\w+)", merging + r"\1"),
        ]
    return rules


def convert_swin(state: State, source: str, target: str) -> State:
    """Takes OpenMMLab's Swin Transformer out of ``state``, by the names and in the layout of torchvision's.

    Its patch merging orders the four patches within each channel, row by row; torchvision's orders the channels within
    each patch, column by column. Tables of relative positions are indexed alike.
    """
    converted = rename_keys(state, swin_rules(source, target))
    # follows from the size of the windows
    for name in [name for name in state if re.fullmatch(re.escape(source) + r".*\.relative_position_index", name)]:
        state.pop(name)
    for name in _merged(converted, target):
        converted[name] = _patch_by_patch(converted[name])
    return converted


def invert_swin(state: State, source: str, target: str) -> State:
    """The way back: takes torchvision's Swin Transformer out of ``state``, by OpenMMLab's names and in its layout."""
    for name in _merged(state, target):
        state[name] = state[name].unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].movedim(-2, -1).flatten(-2)
    for name in [name for name in state if name.startswith(target) and name.endswith(".relative_position_index")]:
        state.pop(name)
    return rename_keys(state, inverse_rules(swin_rules(source, target)))


def _merged(state: State, target: str) -> list[str]:
    """Names of the layers whose inputs are four patches."""
    pattern = re.compile(re.escape(target) + r"features\.[246]\.(norm\.\w+|reduction\.weight)")
    return [name for name in state if pattern.fullmatch(name)]


def _patch_by_patch(tensor: torch.Tensor) -> torch.Tensor:
    """Last dimension from (channel, patch) to (patch, channel), the patches from row-major to column-major order."""
    patches = tensor.unflatten(-1, (-1, 4)).movedim(-1, -2)
    return patches[..., [0, 2, 1, 3], :].flatten(-2)


@register_converter(
    "OpenMMLab ResNetV1c",
    matches=lambda state: {"stem.0.weight", "stem.6.weight", "layer1.0.conv1.weight"} <= state.keys(),
    hint=f"OpenMMLab's ResNetV1c expects {_RGB}, RESNETS.STEM_TYPE 'deeplab' and STRIDE_IN_1X1 False",
    relative=True,
)
def convert_resnet_v1c(state: State) -> State:
    """Names as of the torchvision ResNet, with a stem of three convolutions. The classifier is dropped."""
    for name in ("fc.weight", "fc.bias"):
        state.pop(name, None)
    return rename_keys(state, resnet_rules("", ""))


@register_converter(
    "Swin Transformer (original release)",
    matches=lambda state: {"patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"} <= state.keys(),
    hint=f"Swin Transformers expect {_RGB}",
    relative=True,
)
def convert_original_swin(state: State) -> State:
    """Names of torchvision's, of which the layout is the same. Classifier, last norm, and buffers are dropped."""
    useless = r"(norm|head)\.\w+|.*\.(relative_position_index|attn_mask)"
    for name in [name for name in state if re.fullmatch(useless, name)]:
        state.pop(name)
    converted = rename_keys(
        state, [(r"patch_embed\.proj\.(\w+)", r"features.0.0.\1"), (r"patch_embed\.norm\.(\w+)", r"features.0.2.\1")]
    )
    for stage in range(4):
        block, here = rf"layers\.{stage}\.blocks\.(\d+)\.", rf"features.{2 * stage + 1}.\1."
        converted |= rename_keys(
            state,
            [
                (block + r"mlp\.fc1\.(\w+)", here + r"mlp.0.\2"),
                (block + r"mlp\.fc2\.(\w+)", here + r"mlp.3.\2"),
                (block + r"(.+)", here + r"\2"),
                (rf"layers\.{stage}\.downsample\.(.+)", rf"features.{2 * stage + 2}.\1"),
            ],
        )
    return converted
