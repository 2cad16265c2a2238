"""Checkpoints of the original releases: detectors of mmdetection, semantic models of mmsegmentation."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from convmask.checkpoint import register_converter, rename_keys
from convmask.checkpoint.inversion import inverse_rules, register_inverter
from convmask.checkpoint.openmmlab import convert_swin, fpn_rules, invert_swin, resnet_rules
from convmask.checkpoint.recognition import State

_KERNELS = "rpn_head.init_kernels.weight"
_CLASSIFIER = "rpn_head.conv_seg.weight"
_SEMANTIC_CLASSIFIER = "decode_head.kernel_generate_head.conv_seg.weight"
_SEMANTIC_ROUND = "decode_head.kernel_update_head.0.fc_mask.weight"
_SWIN = "backbone.patch_embed.projection.weight"
_HINT = (
    "The release's models expect INPUT.FORMAT RGB, PIXEL_MEAN [123.675, 116.280, 103.530], PIXEL_STD "
    "[58.395, 57.120, 57.375], RESNETS.STRIDE_IN_1X1 False, and batch normalisation that is not folded "
)
# Names within a round, from the release's to those here.
_ROUND = (
    (r"attention\.attn\.(.+)", r"attention.\1"),
    (r"(attention_norm|ffn_norm|fc_cls|fc_mask)\.(\w+)", r"\1.\2"),
    (r"kernel_update_conv\.(.+)", r"updator.\1"),
    (r"feat_transform\.conv\.(\w+)", r"feat_transform.\1"),
    (r"ffn\.layers\.0\.0\.(\w+)", r"ffn.0.\1"),
    (r"ffn\.layers\.1\.(\w+)", r"ffn.3.\1"),
    (r"cls_fcs\.(.+)", r"class_branch.\1"),
    (r"mask_fcs\.(.+)", r"mask_branch.\1"),
)


def _round_rules(source: str, target: str) -> list[tuple[str, str]]:
    rules = []
    for number in range(10):
        for pattern, replacement in _ROUND:
            rules.append((rf"{source}\.{number}\.{pattern}", f"{target}.{number}.{replacement}"))
    return rules


def _kernel_head_rules() -> list[tuple[str, str]]:
    rules = [
        (r"rpn_head\.(init_kernels|conv_seg)\.(\w+)", r"kernel_head.\1.\2"),
        *_conv_rules(r"rpn_head\.localization_fpn\.conv_pred", "kernel_head.localization.0", "gn"),
        *_conv_rules(r"rpn_head\.loc_convs\.0", "kernel_head.localization.1", "gn"),
        *_conv_rules(r"rpn_head\.localization_fpn\.aux_convs\.0", "kernel_head.semantic.0", "gn"),
        *_conv_rules(r"rpn_head\.seg_convs\.0", "kernel_head.semantic.1", "gn"),
    ]
    for level in range(4):
        for conv in range(4):
            # here an upsampling without parameters follows each convolution but the last
            target = f"kernel_head.localization_fpn.p{level + 2}.{2 * conv}"
            rules += _conv_rules(rf"rpn_head\.localization_fpn\.convs_all_levels\.{level}\.conv{conv}", target, "gn")
    return rules


def _conv_rules(source: str, target: str, norm: str) -> list[tuple[str, str]]:
    """A convolution with its normalisation; ``source`` may hold a group \\1 for ``target``."""
    return [
        (source + r"\.conv\.(?P<tensor>\w+)", target + r".\g<tensor>"),
        (rf"{source}\.{norm}\.(?P<tensor>\w+)", target + r".norm.\g<tensor>"),
    ]


def _detector_config(state: Mapping[str, torch.Tensor]) -> str:
    if _SWIN in state:
        return "configs/KNet/knet_panoptic_swin_l_3x.yaml"
    # COCO's 133 categories are things and stuff
    panoptic = len(state[_CLASSIFIER]) == 133
    depth = "R_101" if "backbone.layer3.22.conv1.weight" in state else "R_50"
    deformable = "_dcn" if "backbone.layer2.0.conv2.conv_offset.weight" in state else ""
    kernels = "_n256" if len(state[_KERNELS]) == 256 else ""
    return f"configs/KNet/knet_{'panoptic' if panoptic else 'instance'}_{depth}{deformable}{kernels}_3x.yaml"


@register_converter(
    "K-Net (mmdetection)",
    matches=lambda state: {_KERNELS, _CLASSIFIER} <= state.keys(),
    hint=_HINT + "(RESNETS.NORM 'FrozenStatisticsBN')",
    config=_detector_config,
)
def convert_detector(state: State) -> State:
    """Names of the release to those here, Swin's patch merging to torchvision's layout."""
    converted = _convert_backbone(state, "backbone.bottom_up.")
    return converted | rename_keys(state, _detector_rules())


def _detector_rules() -> list[tuple[str, str]]:
    return [*fpn_rules(), *_kernel_head_rules(), *_round_rules(r"roi_head\.mask_head", "rounds")]


@register_inverter(
    "K-Net (mmdetection)", matches=lambda state: "kernel_head.init_kernels.weight" in state, entry="state_dict"
)
def invert_detector(state: State) -> State:
    """Names of the release. Tables of positions' indices, which follow from the windows, are left out."""
    return _invert_backbone(state, "backbone.bottom_up.") | rename_keys(state, inverse_rules(_detector_rules()))


def _semantic_config(state: Mapping[str, torch.Tensor]) -> str:
    head = "fcn"
    for name, mark in (("upernet", "fpn_bottleneck"), ("deeplabv3", "aspp_modules.0"), ("pspnet", "psp_modules.0.1")):
        if f"decode_head.kernel_generate_head.{mark}.conv.weight" in state:
            head = name
            break
    backbone = "R_50"
    if _SWIN in state:
        backbone = "swin_l" if len(state[_SWIN]) == 192 else "swin_t"
    width = state["decode_head.kernel_update_head.0.kernel_update_conv.update_gate.weight"].shape[0]
    kernels = state[_SEMANTIC_ROUND].shape[0]
    narrow = "" if (kernels, width) == (512, 256) else f", with MODEL.KNET.UPDATOR_CHANNELS {width}"
    return f"configs/KNet/knet_semantic_{head}_{backbone}_80k.yaml{narrow}"


@register_converter(
    "K-Net (mmsegmentation)",
    matches=lambda state: {_SEMANTIC_CLASSIFIER, _SEMANTIC_ROUND} <= state.keys(),
    hint=_HINT + "(RESNETS.STEM_TYPE 'deeplab' for R50-V1c)",
    config=_semantic_config,
)
def convert_semantic(state: State) -> State:
    """Names of the release to those here, Swin's patch merging to torchvision's layout."""
    return _convert_backbone(state, "backbone.") | rename_keys(state, _semantic_rules())


@register_inverter(
    "K-Net (mmsegmentation)",
    matches=lambda state: "sem_seg_head.rounds.0.fc_mask.weight" in state,
    entry="state_dict",
)
def invert_semantic(state: State) -> State:
    """Names of the release. Tables of positions' indices, which follow from the windows, are left out."""
    return _invert_backbone(state, "backbone.") | rename_keys(state, inverse_rules(_semantic_rules()))


def _semantic_rules() -> list[tuple[str, str]]:
    rules = _round_rules(r"decode_head\.kernel_update_head", "sem_seg_head.rounds")
    for source, target in (
        (r"decode_head\.kernel_generate_head", "sem_seg_head.head"),
        ("auxiliary_head", "sem_seg_head.auxiliary_head"),
    ):
        rules += [
            (source + r"\.conv_seg\.(\w+)", target + r".predictor.\1"),
            *_conv_rules(source + r"\.(psp_modules\.\d+|image_pool)\.1", target + r".\1", "bn"),
            *_conv_rules(source + r"\.((?:convs|aspp_modules|lateral_convs|fpn_convs)\.\d+)", target + r".\1", "bn"),
            *_conv_rules(source + r"\.(conv_cat|bottleneck|fpn_bottleneck)", target + r".\1", "bn"),
        ]
    return rules


def _convert_backbone(state: State, target: str) -> State:
    for name in [name for name in state if name.endswith(".num_batches_tracked")]:
        state.pop(name)
    if _SWIN in state:
        return convert_swin(state, "backbone.", target)
    return rename_keys(state, resnet_rules("backbone.", target))


def _invert_backbone(state: State, target: str) -> State:
    if f"{target}features.0.0.weight" in state:
        return invert_swin(state, "backbone.", target)
    rules = resnet_rules("backbone.", target)
    if f"{target}stem.conv3.weight" in state:
        # V1c: three convolutions, where other ResNets have one
        rules = [rule for rule in rules if not rule[1].startswith(f"{target}stem.conv1.") or "stem" in rule[0]]
    return rename_keys(state, inverse_rules(rules))
