"""Checkpoints of the original releases: maskrcnn-benchmark's names, three generations of the mask part."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from convmask.checkpoint import register_converter, rename_keys
from convmask.checkpoint.inversion import inverse_rules, register_inverter
from convmask.checkpoint.recognition import State

_HEAD = "rpn.head."
_MARGIN = f"{_HEAD}proposal_margin_pred.weight"
_TOWERS = {"cls_tower": "fcos_head", "bbox_tower": "fcos_head", "mask_tower": "embedding_head"}
# Of Detectron2's FrozenBatchNorm2d. The original's has none.
_FROZEN_EPSILON = 1e-5


def _is_original(state: Mapping[str, torch.Tensor]) -> bool:
    return {_MARGIN, f"{_HEAD}centerness.weight"} <= state.keys()


def generation(state: Mapping[str, torch.Tensor]) -> str:
    """Which release the names and shapes of a state are of: "v0", "v1" or "v2"."""
    weight = state[_MARGIN]
    if weight.shape[2:] == (1, 1):
        return "v0"
    return "v1" if len(weight) == 1 else "v2"


def _fitting_config(state: Mapping[str, torch.Tensor]) -> str:
    depth = "101" if "backbone.body.layer3.22.conv1.weight" in state else "50"
    schedule = "ms_3x" if depth == "101" else "1x"
    return f"configs/EmbedMask/embed_mask_{generation(state)}_R_{depth}_{schedule}.yaml"


@register_converter(
    "EmbedMask (original release)",
    matches=_is_original,
    hint="The release's models expect INPUT.FORMAT BGR, PIXEL_MEAN [102.9801, 115.9465, 122.7717], PIXEL_STD "
    "[1, 1, 1] and RESNETS.STRIDE_IN_1X1 True",
    config=_fitting_config,
)
def convert_original(state: State) -> State:
    """Names of the releases to those here.

    The two convolutions of an embedding with position channels become one, and the normalisation's weights take up the
    difference that Detectron2's epsilon makes.
    """
    for side in ("proposal", "pixel"):
        for kind in ("weight", "bias"):
            names = [f"{_HEAD}{side}_{part}_embed_pred.{kind}" for part in ("spatial", "other")]
            if all(name in state for name in names):
                state[f"{_HEAD}{side}_embed_pred.{kind}"] = torch.cat([state.pop(name) for name in names])
    return _fold_epsilon(rename_keys(state, _rules()))


def _rules() -> list[tuple[str, str]]:
    body, bottom_up = r"backbone\.body\.", "backbone.bottom_up."
    rules = [
        (body + r"stem\.conv1\.weight", bottom_up + "stem.conv1.weight"),
        (body + r"stem\.bn1\.(\w+)", bottom_up + r"stem.conv1.norm.\1"),
    ]
    for stage in range(1, 5):
        block, target = rf"{body}layer{stage}\.(\d+)\.", rf"{bottom_up}res{stage + 1}.\1."
        rules += [
            (block + r"conv(\d)\.weight", target + r"conv\2.weight"),
            (block + r"bn(\d)\.(\w+)", target + r"conv\2.norm.\3"),
            (block + r"downsample\.0\.weight", target + "shortcut.weight"),
            (block + r"downsample\.1\.(\w+)", target + r"shortcut.norm.\2"),
        ]
    for level in range(2, 5):
        rules += [
            (rf"backbone\.fpn\.fpn_inner{level}\.(\w+)", rf"backbone.fpn_lateral{level + 1}.\1"),
            (rf"backbone\.fpn\.fpn_layer{level}\.(\w+)", rf"backbone.fpn_output{level + 1}.\1"),
        ]
    rules.append((r"backbone\.fpn\.top_blocks\.(p[67]\.\w+)", r"backbone.top_block.\1"))
    head = r"rpn\.head\."
    for name, owner in _TOWERS.items():
        # convolution, normalisation and ReLU are counted apart
        for number in range(10):
            rules += [
                (rf"{head}{name}\.{3 * number}\.(\w+)", rf"{owner}.{name}.{number}.\1"),
                (rf"{head}{name}\.{3 * number + 1}\.(\w+)", rf"{owner}.{name}.{number}.norm.\1"),
            ]
    return [
        *rules,
        (head + r"((?:cls_logits|bbox_pred|centerness)\.\w+)", r"fcos_head.\1"),
        (head + r"(scales\.\d\.scale)", r"fcos_head.\1"),
        (head + r"(proposal|pixel)_embed_pred\.(\w+)", r"embedding_head.\1_embed.\2"),
        (head + r"proposal_margin_pred\.(\w+)", r"embedding_head.margin.\1"),
        (head + r"(margin_scales\.\d\.scale|position_scale\.scale)", r"embedding_head.\1"),
    ]


def _fold_epsilon(state: State) -> State:
    """Multiplies weights by sqrt((var + eps) / var), so that w / sqrt(var + eps) is the original's w / sqrt(var)."""
    for weight, factor in _factors(state).items():
        state[weight] = (state[weight].double() * factor).to(state[weight].dtype)
    return state


def _factors(state: State) -> dict[str, torch.Tensor]:
    """sqrt((var + eps) / var) by the names of the weights that it is folded into, in double precision."""
    factors = {}
    for name in [x for x in state if x.endswith(".norm.running_var")]:
        variance = state[name].double()
        weight = name.replace("running_var", "weight")
        if weight in state and bool((variance > 0).all()):
            factors[weight] = ((variance + _FROZEN_EPSILON) / variance).sqrt()
    return factors


@register_inverter(
    "EmbedMask (original release)",
    matches=lambda state: {"embedding_head.margin.weight", "fcos_head.centerness.weight"} <= state.keys(),
)
def invert_original(state: State) -> State:
    """Names of the release, its two convolutions of an embedding with positions, and its normalisation.

    The quotient of a weight and its factor is rounded to where the product is the weight again. Weights that were
    trained here need not have such a quotient.
    """
    for weight, factor in _factors(state).items():
        state[weight] = _quotient(state[weight], factor)
    if "embedding_head.position_scale.scale" in state:
        for side in ("proposal", "pixel"):
            for kind in ("weight", "bias"):
                joined = state.pop(f"embedding_head.{side}_embed.{kind}")
                state[f"embedding_head.{side}_spatial_embed.{kind}"] = joined[:2]
                state[f"embedding_head.{side}_other_embed.{kind}"] = joined[2:]
    # the release's heads have no layers of the names with two words
    parts = [(_HEAD.replace(".", r"\.") + r"(\w+_(?:spatial|other))_embed_pred\.(\w+)", r"embedding_head.\1_embed.\2")]
    return rename_keys(state, inverse_rules(parts + _rules()))


def _quotient(product: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x with x * factor == product after rounding, where there is one."""
    quotient = (product.double() / factor).to(product.dtype)
    if not product.is_floating_point():
        return quotient
    for direction in (torch.inf, -torch.inf):
        near = torch.nextafter(quotient, torch.full_like(quotient, direction))
        exact = (near.double() * factor).to(product.dtype) == product
        wrong = (quotient.double() * factor).to(product.dtype) != product
        quotient = torch.where(wrong & exact, near, quotient)
    return quotient
