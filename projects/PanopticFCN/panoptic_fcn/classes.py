"""Class counts by the dataset, what each region label stands for, and contradictions in the config."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from convmask.data.categories import PanopticCategories
from convmask.data.class_counts import categories_of, register_class_counts

from .targets import CENTERS

_NODE = "MODEL.PANOPTIC_FCN"
KERNEL_AVERAGES = ("map", "region")


def check_config(cfg: CfgNode, shape: Mapping[str, ShapeSpec]) -> None:
    """Raises ValueError with the keys that cannot go together.

    Args:
        cfg: complete.
        shape: of the backbone's levels.
    """
    node = cfg.MODEL.PANOPTIC_FCN
    for key in ("IN_FEATURES", "SEMANTIC_FPN.IN_FEATURES"):
        names = node.SEMANTIC_FPN.IN_FEATURES if "." in key else node.IN_FEATURES
        absent = [name for name in names if name not in shape]
        if absent or not names:
            raise ValueError(
                f"{_NODE}.{key} is {list(names)}, but {cfg.MODEL.BACKBONE.NAME} gives {sorted(shape)}: it takes "
                "build_resnet_fpn_p7_backbone for p6 and p7"
            )
    if len({shape[name].channels for name in node.IN_FEATURES}) > 1:
        raise ValueError(f"{_NODE}.IN_FEATURES: the levels {list(node.IN_FEATURES)} have different widths")
    if len(node.TARGETS.SCALES) != len(node.IN_FEATURES):
        raise ValueError(
            f"{_NODE}.TARGETS.SCALES has {len(node.TARGETS.SCALES)} ranges for the {len(node.IN_FEATURES)} levels of "
            "IN_FEATURES"
        )
    for key, value, known in (
        ("TARGETS.CENTER", node.TARGETS.CENTER, CENTERS),
        ("STUFF.KERNEL_AVERAGE", node.STUFF.KERNEL_AVERAGE, KERNEL_AVERAGES),
    ):
        if value not in known:
            raise ValueError(f"{_NODE}.{key} {value!r} is not one of {', '.join(known)}")
    if node.NUM_KERNELS < 1 or node.INFERENCE.TOP_NUM < 2:
        raise ValueError(f"{_NODE}.NUM_KERNELS must be 1 or more, INFERENCE.TOP_NUM 2 or more")
    if not node.STUFF.WITH_THINGS and cfg.INPUT.SEMANTIC_LAYOUT == "all":
        raise ValueError(
            f"{_NODE}.STUFF.WITH_THINGS is False, but INPUT.SEMANTIC_LAYOUT 'all' gives things labels of their own: "
            "set it to 'separated'"
        )
    truth = node.INFERENCE.TRUE_POSITIONS or node.INFERENCE.TRUE_CLASSES
    if truth and not cfg.INPUT.TARGETS_IN_TEST:
        raise ValueError(f"{_NODE}.INFERENCE.TRUE_POSITIONS and TRUE_CLASSES need INPUT.TARGETS_IN_TEST")
    absent_targets = [target for target in ("instances", "sem_seg") if target not in cfg.INPUT.TARGETS]
    if absent_targets:
        raise ValueError(f"Panoptic FCN needs {absent_targets[0]!r} in INPUT.TARGETS")


def class_counts(cfg: CfgNode, categories: PanopticCategories) -> dict[str, int]:
    """Thing classes, and region classes with or without things."""
    stuff = cfg.MODEL.PANOPTIC_FCN.STUFF
    regions = categories.num_semantic(cfg.INPUT.SEMANTIC_LAYOUT) if stuff.WITH_THINGS else categories.num_stuff
    return {f"{_NODE}.NUM_CLASSES": categories.num_things, f"{_NODE}.STUFF.NUM_CLASSES": regions}


def region_labels(cfg: CfgNode) -> tuple[int, ...] | None:
    """The stuff category of each label of the layout "all", 0 for things; None in the layout "separated".

    The order of the labels is the dataset's. Without a dataset, things come first.

    Raises:
        ValueError: there are fewer region classes than the dataset has labels.
    """
    if cfg.INPUT.SEMANTIC_LAYOUT == "separated":
        return None
    node = cfg.MODEL.PANOPTIC_FCN
    labels = node.STUFF.NUM_CLASSES
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    stuff = categories_of(names[0]).stuff_labels("all") if names else tuple(range(node.NUM_CLASSES, labels))
    if stuff and max(stuff) >= labels:
        raise ValueError(
            f"{_NODE}.STUFF.NUM_CLASSES is {labels}, but dataset {names[0]!r} has the semantic label {max(stuff)}"
        )
    category = [0] * labels
    for index, label in enumerate(stuff):
        category[label] = index + 1
    return tuple(category)


register_class_counts("PanopticFCN", class_counts)
