"""Contradictions in the config, found before anything is built."""

from __future__ import annotations

from detectron2.config import CfgNode

TASKS = ("panoptic", "instance", "semantic")
TRAININGS = ("combined", "alternating")


def check_config(cfg: CfgNode) -> None:
    """Raises ValueError with the keys that cannot go together."""
    node = cfg.MODEL.PANOPTIC_FPN
    prefix = "MODEL.PANOPTIC_FPN"
    if node.TASK not in TASKS:
        raise ValueError(f"{prefix}.TASK {node.TASK!r} is not one of {', '.join(TASKS)}")
    if node.TRAINING not in TRAININGS:
        raise ValueError(f"{prefix}.TRAINING {node.TRAINING!r} is not one of {', '.join(TRAININGS)}")
    needed = {"panoptic": ("instances", "sem_seg"), "instance": ("instances",), "semantic": ("sem_seg",)}[node.TASK]
    absent = [target for target in needed if target not in cfg.INPUT.TARGETS]
    if absent:
        raise ValueError(f"{prefix}.TASK {node.TASK!r} needs {absent[0]!r} in INPUT.TARGETS")
    if node.TASK != "panoptic" and node.TRAINING == "alternating":
        raise ValueError(f"{prefix}.TRAINING 'alternating' needs two branches, but {prefix}.TASK is {node.TASK!r}")
    if node.TASK != "panoptic" and node.GROUPED_FPN:
        raise ValueError(f"{prefix}.GROUPED_FPN needs two branches, but {prefix}.TASK is {node.TASK!r}")
    if node.TASK == "panoptic" and node.COMBINE.ENABLED and not cfg.MODEL.MASK_ON:
        raise ValueError(f"{prefix}.COMBINE.ENABLED needs instance masks, but MODEL.MASK_ON is False")
    things, labels = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if node.TASK == "panoptic" and cfg.INPUT.SEMANTIC_LAYOUT == "all" and labels < things:
        raise ValueError(
            f"INPUT.SEMANTIC_LAYOUT 'all' needs a semantic label for each of the {things} thing classes, but "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {labels}"
        )
