"""Checkpoints of the original release."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from convmask.checkpoint import register_converter, rename_keys
from convmask.checkpoint.inversion import inverse_rules, register_inverter
from convmask.checkpoint.recognition import State

_CENTERS = "position_head.out_inst.weight"
_EMBEDDING = "thing_generator.embed_extractor.weight"


def _is_original(state: Mapping[str, torch.Tensor]) -> bool:
    return {_CENTERS, _EMBEDDING} <= state.keys()


def _fitting_config(state: Mapping[str, torch.Tensor]) -> str:
    star = "feature_encoder.encode_head.encode_head_head_1.offset_mask_conv.weight" in state
    variant = "panoptic_fcn_star_R_50" if star else "panoptic_fcn_R_50"
    # other class counts are those of other datasets
    schedule = {8: "cityscapes", 37: "mapillary"}.get(len(state[_CENTERS]), "3x")
    if schedule == "mapillary":
        variant = "panoptic_fcn_star_R_50"
    lengths = "" if star or schedule != "3x" else " (or one of the other R_50 configs: their models are the same)"
    return f"configs/PanopticFCN/{variant}_{schedule}.yaml{lengths}"


@register_converter(
    "Panoptic FCN (original release)",
    matches=_is_original,
    hint="The release's models expect INPUT.FORMAT BGR, PIXEL_MEAN [123.675, 116.280, 103.530] (the RGB order, on BGR "
    "images), PIXEL_STD [1, 1, 1], RESNETS.STRIDE_IN_1X1 True and PANOPTIC_FCN.STUFF.KERNEL_AVERAGE 'map'",
    config=_fitting_config,
)
def convert_original(state: State) -> State:
    """Names of the release to those here; the 1x1 convolutions of the embeddings become matrices."""
    for name in ("thing_generator.embed_extractor.weight", "stuff_generator.embed_extractor.weight"):
        if name in state:
            state[name] = state[name].flatten(1)
    return rename_keys(state, _rules(deformable=("position_head", "kernel_head", "feature_encoder")))


def _rules(deformable: Collection[str]) -> list[tuple[str, str]]:
    """From the release's names to those here; ``deformable``: heads that may have deformable convolutions."""
    rules = [
        (r"((?:backbone|semantic_fpn)\..+)", r"\1"),
        (r"position_head\.out_inst\.(\w+)", r"position_head.centers.\1"),
        (r"position_head\.out_sem\.(\w+)", r"position_head.regions.\1"),
        (r"kernel_head\.out_conv\.(\w+)", r"kernel_head.kernels.\1"),
        (r"(thing|stuff)_generator\.embed_extractor\.(\w+)", r"\1_embedding.\2"),
    ]
    # the release counts the convolutions of a head from 1
    for number in range(1, 10):
        for head, part in (
            ("position_head", "position_head"),
            ("kernel_head", "kernel_head"),
            ("feature_encoder", "encode_head"),
        ):
            layer, target = rf"{head}\.{part}\.{part}_head_{number}\.", f"{head}.tower.{number - 1}."
            rules.append((layer + r"offset_mask_conv\.(\w+)", target + r"offset.\1"))
            if head in deformable:
                rules.append((layer + r"dcnv2\.((?:norm\.)?\w+)", target + r"\1"))
            rules.append((layer + r"((?:norm\.)?\w+)", target + r"\1"))
    return rules


@register_inverter(
    "Panoptic FCN (original release)",
    matches=lambda state: {"position_head.centers.weight", "thing_embedding.weight"} <= state.keys(),
)
def invert_original(state: State) -> State:
    """Names of the release; the matrices of the embeddings become 1x1 convolutions."""
    for name in ("thing_embedding.weight", "stuff_embedding.weight"):
        if name in state:
            state[name] = state[name][..., None, None]
    deformable = {name.split(".")[0] for name in state if name.endswith(".tower.0.offset.weight")}
    return rename_keys(state, inverse_rules(_rules(deformable)))
