"""Class counts by the dataset, and contradictions in the config."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from convmask.data.categories import PanopticCategories
from convmask.data.class_counts import register_class_counts

_NODE = "MODEL.KNET"
TASKS = ("instance", "panoptic", "semantic")
_DETECTOR_ASSEMBLIES = ("hard", "soft", "none")
_ENCODINGS = ("coarsest", "joined", "none")


def check_config(cfg: CfgNode, shape: Mapping[str, ShapeSpec]) -> None:
    """Raises ValueError with the keys that cannot go together, for instance and panoptic models.

    Args:
        cfg: complete.
        shape: of the backbone's levels.
    """
    node = cfg.MODEL.KNET
    absent = [name for name in node.IN_FEATURES if name not in shape]
    if absent or not node.IN_FEATURES:
        raise ValueError(
            f"{_NODE}.IN_FEATURES is {list(node.IN_FEATURES)}, but {cfg.MODEL.BACKBONE.NAME} gives {sorted(shape)}"
        )
    if node.GROUP_ASSEMBLY not in _DETECTOR_ASSEMBLIES:
        raise ValueError(f"{_NODE}.GROUP_ASSEMBLY {node.GROUP_ASSEMBLY!r} is not one of {_DETECTOR_ASSEMBLIES}")
    if node.POSITIONAL_ENCODING not in _ENCODINGS:
        raise ValueError(f"{_NODE}.POSITIONAL_ENCODING {node.POSITIONAL_ENCODING!r} is not one of {_ENCODINGS}")
    for key in ("NUM_KERNELS", "NUM_ROUNDS", "NUM_THING_CLASSES"):
        if node[key] < 1:
            raise ValueError(f"{_NODE}.{key} is {node[key]}, but must be 1 or more")
    ratio = node.COMMON_STRIDE / node.MASK_STRIDE
    if ratio < 1 or ratio % 1 or node.MASK_STRIDE & (node.MASK_STRIDE - 1):
        raise ValueError(
            f"{_NODE}.MASK_STRIDE is {node.MASK_STRIDE}, no power of two that divides COMMON_STRIDE "
            f"{node.COMMON_STRIDE}"
        )
    check_targets(cfg)
    if node.TASK == "panoptic" and cfg.INPUT.SEMANTIC_LAYOUT != "separated":
        raise ValueError(
            f"{_NODE}.TASK 'panoptic' needs INPUT.SEMANTIC_LAYOUT 'separated', not {cfg.INPUT.SEMANTIC_LAYOUT!r}"
        )


def check_targets(cfg: CfgNode) -> None:
    """Raises ValueError for an unknown task, or one that lacks its targets."""
    task = cfg.MODEL.KNET.TASK
    if task not in TASKS:
        raise ValueError(f"{_NODE}.TASK is {task!r}, not one of {', '.join(TASKS)}")
    needed = {"instance": ("instances",), "panoptic": ("instances", "sem_seg"), "semantic": ("sem_seg",)}[task]
    for target in needed:
        if target not in cfg.INPUT.TARGETS:
            raise ValueError(f"{_NODE}.TASK {task!r} needs {target!r} in INPUT.TARGETS, {tuple(cfg.INPUT.TARGETS)}")


def class_counts(cfg: CfgNode, categories: PanopticCategories) -> dict[str, int]:
    """Those that the task has."""
    if cfg.MODEL.KNET.TASK == "semantic":
        return {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": categories.num_semantic(cfg.INPUT.SEMANTIC_LAYOUT)}
    counts = {f"{_NODE}.NUM_THING_CLASSES": categories.num_things}
    if cfg.MODEL.KNET.TASK == "panoptic":
        counts[f"{_NODE}.NUM_STUFF_CLASSES"] = categories.num_stuff
    return counts


register_class_counts("KNet", class_counts)
