"""The keys of FCIS. What Detectron2 has a key for stays there: MODEL.RPN, ANCHOR_GENERATOR, ROI_HEADS, TEST."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_fcis_config(cfg: CfgNode) -> None:
    """Adds the node ``MODEL.FCIS``, in place. Defaults are those of the release on COCO."""
    node = cfg.MODEL.FCIS = CfgNode()
    # Whose conventions hold for boxes, anchors, pooling and losses, so that either release's weights give their own
    # numbers: "mxnet" (the authors' release) or "chainercv".
    node.CONVENTION = "mxnet"
    _add_backbone(node)
    _add_heads(node)
    _add_training(node)
    _add_inference(node)


def _add_backbone(node: CfgNode) -> None:
    # Stride of res4 and res5, by dilation in the place of strides: 16 (the paper), 8 or 4.
    node.OUTPUT_STRIDE = 16
    # Width of the RPN's 3x3 convolution.
    node.RPN_CHANNELS = 512
    # The release fills up the proposals of an image to POST_NMS_TOPK with random duplicates; they vote twice.
    node.PAD_PROPOSALS = False


def _add_heads(node: CfgNode) -> None:
    # Width of the 1x1 convolution before the position-sensitive maps.
    node.REDUCTION = 1024
    # Its learning rate is this many times the others'.
    node.REDUCTION_LR_FACTOR = 3.0
    # k: the position-sensitive grid has k x k cells. 1: maps are translation-invariant.
    node.GROUP_SIZE = 7
    # Side of a RoI's mask, in bins.
    node.MASK_SIZE = 21
    # Classes are scored on maps of their own, not on those that the masks are cut from.
    node.SEPARATE_MAPS = False
    # With several levels in ROI_HEADS.IN_FEATURES (FPN): a RoI of this many pixels (root of the area) is on the level
    # CANONICAL_LEVEL.
    node.CANONICAL_SIZE = 224
    # See above; 4 is the level of stride 16.
    node.CANONICAL_LEVEL = 4


def _add_training(node: CfgNode) -> None:
    sampling = node.SAMPLING = CfgNode()
    # RoIs with an IoU of at least this, and less than that of positives, are background. VOC's recipe: 0.1.
    sampling.BACKGROUND_LOW = 0.0
    # Where there are too few RoIs for ROI_HEADS.BATCH_SIZE_PER_IMAGE, the rest is drawn from all RoIs. False: from all
    # but the chosen positives.
    sampling.FILL_FROM_ALL = False
    # These RoIs have no part in the losses.
    sampling.IGNORE_FILLED = False
    ohem = node.OHEM = CfgNode()
    # Online hard example mining: losses are those of the RoIs with the largest sum of losses.
    ohem.ENABLED = True
    # So many RoIs an image.
    ohem.NUM_ROIS = 128
    losses = node.LOSSES = CfgNode()
    # Factor of the class loss.
    losses.CLASS_WEIGHT = 1.0
    # Factor of the mask loss, a mean over the bins of a RoI. The paper's equal weights: 1.0.
    losses.MASK_WEIGHT = 10.0
    # Factor of the box loss.
    losses.BOX_WEIGHT = 1.0
    # A bin is inside if at least this share of it (bilinear) is.
    losses.MASK_TARGET_THRESH = 0.4


def _add_inference(node: CfgNode) -> None:
    # Scores and masks are computed for the proposals (1), and again for the boxes regressed from them (2).
    node.ROUNDS = 2
    # RoIs with a side shorter than this many input pixels are dropped. VOC's recipe: 16.
    node.MIN_DROP_SIZE = 2.0
    voting = node.VOTING = CfgNode()
    # Overlapping RoIs vote on the masks. Otherwise a result has its RoI's own mask.
    voting.ENABLED = True
    # RoIs with at least this IoU vote.
    voting.MERGE_THRESH = 0.5
    # Of the mxnet convention: "gpu", that of all published configurations, or "cpu"; convmask.ops.mask_voting tells
    # how they differ. The chainercv convention has its own.
    voting.PROCEDURE = "gpu"
    # Pixels of a mask have at least this value.
    node.BINARY_THRESH = 0.4
    # What TEST.AUG.ENABLED does. "vote": the RoIs of all views vote together, before any result is cut off, as in the
    # release. "merge": the results of the views are merged, as those of every other method.
    node.AUGMENTATION = "vote"
    # How masks get to the size of the image: "release" (boxes rounded to whole pixels, BINARY_THRESH) or "detectron2"
    # (its own pasting, BINARY_THRESH).
    node.PASTE = "release"
