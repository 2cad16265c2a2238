"""The keys of Panoptic FPN."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_panoptic_fpn_config(cfg: CfgNode) -> None:
    """Extends Detectron2's node ``MODEL.PANOPTIC_FPN``, in place.

    Detectron2's own keys keep their meaning: the width of the semantic branch is ``SEM_SEG_HEAD.CONVS_DIM``, the weight
    of its loss (the paper's lambda_s) ``SEM_SEG_HEAD.LOSS_WEIGHT``.
    """
    node = cfg.MODEL.PANOPTIC_FPN
    # "panoptic": both branches and their merged result. "instance": Mask R-CNN alone. "semantic": Semantic FPN alone.
    node.TASK = "panoptic"
    # "combined": each iteration trains both branches. "alternating": even iterations train the instance branch, odd
    # ones the semantic branch.
    node.TRAINING = "combined"
    # The paper's lambda_i: multiplies every loss of the instance branch, RPN and all Cascade stages included.
    # INSTANCE_LOSS_WEIGHT, Detectron2's key, scales the losses of box regression and masks alone, here with Cascade
    # heads too.
    node.INSTANCE_TASK_WEIGHT = 1.0
    # How the semantic branch joins the pyramid levels: "sum" or "concat".
    node.AGGREGATION = "sum"
    # 3x3 convolutions before each upsampling in the semantic branch: 1, or 2 as in the paper's COCO-Stuff entry.
    node.CONVS_PER_STAGE = 1
    # Standard deviation of the semantic predictor's initial weights. 0.0: Detectron2's sqrt(2 / classes), with which a
    # few classes begin with a loss of about 10, and a short training suffers.
    node.PREDICTOR_STD = 0.0
    # The FPN's output convolutions have two groups: the first half of the channels feeds the instance branch alone, the
    # second half the semantic branch.
    node.GROUPED_FPN = False
