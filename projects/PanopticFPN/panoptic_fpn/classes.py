"""Which class counts and labels a config has, by its dataset."""

from __future__ import annotations

from detectron2.config import CfgNode

from convmask.data.categories import PanopticCategories
from convmask.data.class_counts import categories_of, register_class_counts


def class_counts(cfg: CfgNode, categories: PanopticCategories) -> dict[str, int]:
    """The class counts of the branches that ``MODEL.PANOPTIC_FPN.TASK`` names."""
    counts = {}
    if cfg.MODEL.PANOPTIC_FPN.TASK != "semantic":
        counts["MODEL.ROI_HEADS.NUM_CLASSES"] = categories.num_things
    if cfg.MODEL.PANOPTIC_FPN.TASK != "instance":
        counts["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] = categories.num_semantic(cfg.INPUT.SEMANTIC_LAYOUT)
    return counts


def stuff_labels(cfg: CfgNode) -> tuple[int, ...] | None:
    """The semantic label of each stuff class 1..S; None where label 0 is "things" and label s stuff class s.

    In the layout "all" the order of the labels is the dataset's. Without a dataset, things come first.

    Raises:
        ValueError: the semantic head has too few labels for the dataset.
    """
    if cfg.INPUT.SEMANTIC_LAYOUT == "separated":
        return None
    labels = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        return tuple(range(cfg.MODEL.ROI_HEADS.NUM_CLASSES, labels))
    found = categories_of(names[0]).stuff_labels("all")
    if found and max(found) >= labels:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {labels}, but dataset {names[0]!r} has the semantic label {max(found)}"
        )
    return found


register_class_counts("ConvMaskPanopticFPN", class_counts)
