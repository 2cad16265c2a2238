"""Class counts by the dataset, and contradictions in the config."""

from __future__ import annotations

import math
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from convmask.data.class_counts import register_class_counts

from .fcos_losses import BOX_LOSSES
from .inference import LOG_OUTSIDE

_NODE = "MODEL.EMBED_MASK"
MARGIN_SOURCES = ("boxes", "features")
PROPOSALS = ("mean", "best")
MASK_LOSSES = ("lovasz", "bce")
MASK_NORMALIZERS = ("all", "found")
MASK_VALUES = ("probability", "logarithm")
MASK_CELLS = ("near", "wide")


def check_fcos_config(cfg: CfgNode, shape: Mapping[str, ShapeSpec]) -> None:
    """Raises ValueError with the keys of FCOS that cannot go together.

    Args:
        cfg: complete.
        shape: of the backbone's levels.
    """
    node = cfg.MODEL.EMBED_MASK
    _check_levels(cfg, "IN_FEATURES", node.IN_FEATURES, shape)
    if len({shape[name].channels for name in node.IN_FEATURES}) > 1:
        raise ValueError(f"{_NODE}.IN_FEATURES: the levels {list(node.IN_FEATURES)} have different widths")
    sizes = list(node.FCOS.SIZES_OF_INTEREST)
    if len(sizes) != len(node.IN_FEATURES) - 1:
        raise ValueError(
            f"{_NODE}.FCOS.SIZES_OF_INTEREST has {len(sizes)} sizes for the {len(node.IN_FEATURES)} levels of "
            "IN_FEATURES: it takes one for each but the last"
        )
    if sizes != sorted(sizes):
        raise ValueError(f"{_NODE}.FCOS.SIZES_OF_INTEREST {sizes} does not ascend")
    _check_choice("FCOS.BOX_LOSS", node.FCOS.BOX_LOSS, BOX_LOSSES)
    if not 0 < node.FCOS.PRIOR_PROB < 1:
        raise ValueError(f"{_NODE}.FCOS.PRIOR_PROB is {node.FCOS.PRIOR_PROB}, not between 0 and 1")
    if "instances" not in cfg.INPUT.TARGETS:
        raise ValueError(f"{cfg.MODEL.META_ARCHITECTURE} needs 'instances' in INPUT.TARGETS")


def check_embed_mask_config(cfg: CfgNode, shape: Mapping[str, ShapeSpec]) -> None:
    """Raises ValueError with the keys of EmbedMask that cannot go together.

    Args:
        cfg: complete.
        shape: of the backbone's levels.
    """
    node = cfg.MODEL.EMBED_MASK
    pixels = node.PIXELS
    _check_levels(cfg, "PIXELS.IN_FEATURE", [pixels.IN_FEATURE], shape)
    stride, factor = shape[pixels.IN_FEATURE].stride, pixels.SCALE_FACTOR
    if factor < 1 or stride % factor or not (stride // factor == 1 or stride // factor % 2 == 0):
        raise ValueError(
            f"{_NODE}.PIXELS.SCALE_FACTOR is {factor}: the stride {stride} of {pixels.IN_FEATURE} divided by it, that "
            "of the masks, must be 1 or an even number"
        )
    _check_choice("MARGIN.SOURCE", node.MARGIN.SOURCE, MARGIN_SOURCES)
    _check_choice("TRAINING.PROPOSALS", node.TRAINING.PROPOSALS, PROPOSALS)
    _check_choice("TRAINING.MASK_LOSS", node.TRAINING.MASK_LOSS, MASK_LOSSES)
    _check_choice("TRAINING.MASK_NORMALIZER", node.TRAINING.MASK_NORMALIZER, MASK_NORMALIZERS)
    _check_choice("INFERENCE.MASK_VALUES", node.INFERENCE.MASK_VALUES, MASK_VALUES)
    _check_choice("INFERENCE.MASK_CELLS", node.INFERENCE.MASK_CELLS, MASK_CELLS)
    if (3 if node.POSITION_CHANNELS else 1) > node.EMBED_DIM:
        raise ValueError(f"{_NODE}.EMBED_DIM is {node.EMBED_DIM}: 1 or more, with POSITION_CHANNELS 3 or more")
    least = math.exp(LOG_OUTSIDE) if node.INFERENCE.MASK_VALUES == "logarithm" else 0.0
    if not least < node.INFERENCE.MASK_THRESH < 1:
        raise ValueError(
            f"{_NODE}.INFERENCE.MASK_THRESH is {node.INFERENCE.MASK_THRESH}, not between {least:.2g} and 1"
        )
    if node.MARGIN.PRIOR <= 0:
        raise ValueError(f"{_NODE}.MARGIN.PRIOR is {node.MARGIN.PRIOR}: a distance, above 0")
    if node.MARGIN.BOX_SCALE == 0:
        raise ValueError(f"{_NODE}.MARGIN.BOX_SCALE is 0: pixels, above 0, or -1")
    if not 0 <= node.TRAINING.PROBABILITY_FLOOR < 0.5:
        raise ValueError(
            f"{_NODE}.TRAINING.PROBABILITY_FLOOR is {node.TRAINING.PROBABILITY_FLOOR}, not from 0 to below 0.5"
        )


def _check_levels(cfg: CfgNode, key: str, names: list[str], shape: Mapping[str, ShapeSpec]) -> None:
    if not names or any(name not in shape for name in names):
        raise ValueError(
            f"{_NODE}.{key} is {', '.join(names) or 'empty'}, but {cfg.MODEL.BACKBONE.NAME} gives "
            f"{', '.join(sorted(shape))}: it takes build_resnet_fpn_p7_backbone for p6 and p7"
        )


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{_NODE}.{key} {value!r} is not one of {', '.join(known)}")


for _name in ("EmbedMask", "ConvMaskFCOS"):
    register_class_counts(_name, {f"{_NODE}.NUM_CLASSES": "things"})
