"""The keys of EmbedMask, and of FCOS below it."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_embed_mask_config(cfg: CfgNode) -> None:
    """Adds the node ``MODEL.EMBED_MASK``, in place.

    Defaults are those of the arXiv paper's release ("v0"); ``ConvMaskFCOS`` reads ``NUM_CLASSES``, ``IN_FEATURES`` and
    the nodes ``FCOS`` and ``INFERENCE`` alone.
    """
    node = cfg.MODEL.EMBED_MASK = CfgNode()
    # Thing classes.
    node.NUM_CLASSES = 80
    # Levels on which objects are found, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    _add_fcos(node)
    _add_embeddings(node)
    _add_margin(node)
    _add_training(node)
    _add_inference(node)


def _add_fcos(node: CfgNode) -> None:
    """FCOS as a dense head."""
    fcos = node.FCOS = CfgNode()
    # Convolutions of the class tower and of the box tower, each with NORM and ReLU, as wide as the levels.
    fcos.NUM_CONVS = 4
    # Normalisation of all towers.
    fcos.NORM = "GN"
    # Initial probability of each class at each location.
    fcos.PRIOR_PROB = 0.01
    # Centerness is predicted by the box tower. False: by the class tower.
    fcos.CENTERNESS_ON_BOXES = True
    # Distances are ReLU(s x) in units of the level's stride. False: exp(s x) in pixels.
    fcos.NORMALIZED_DISTANCES = True
    # Corners of boxes are the first and the last pixel, so that a side is x2 - x1 + 1, as in maskrcnn-benchmark. False:
    # Detectron2's corners. Results have Detectron2's corners in either case.
    fcos.INCLUSIVE_BOXES = True
    # Greatest distance from a location to a side of its box on each level but the last, in pixels.
    fcos.SIZES_OF_INTEREST = (64, 128, 256, 512)
    # Locations are positive up to this many strides from the centre of a box, in x and y. 0: in the whole box.
    fcos.CENTER_RADIUS = 1.5
    # Locations are positive only on the object's mask.
    fcos.SAMPLE_IN_MASK = True
    # "giou", "linear_iou" (1 - IoU), or "iou" (-ln IoU, of UnitBox).
    fcos.BOX_LOSS = "giou"
    # Focal loss: weight of positives.
    fcos.FOCAL_ALPHA = 0.25
    # Focal loss: exponent.
    fcos.FOCAL_GAMMA = 2.0


def _add_embeddings(node: CfgNode) -> None:
    """Embeddings of proposals, from the box tower, and of pixels, from a tower of their own."""
    # Dimensions of the embedding space, D.
    node.EMBED_DIM = 32
    # The first two dimensions also get the position of the location, (x, y) / 100 pixels, times a learnt scale.
    node.POSITION_CHANNELS = False
    # The box tower's features are divided by this before the convolution of the proposal embedding.
    node.EMBED_REDUCE_FACTOR = 1.0
    pixels = node.PIXELS = CfgNode()
    # Level on which the pixel embedding is computed: any that the backbone gives.
    pixels.IN_FEATURE = "p3"
    # Convolutions of its tower.
    pixels.NUM_CONVS = 4
    # The pixel embedding is enlarged (bilinear) by this; masks have the level's stride divided by it.
    pixels.SCALE_FACTOR = 2


def _add_margin(node: CfgNode) -> None:
    """The margin m = 1 / (2 sigma^2) of a proposal: how far from it pixels may be."""
    margin = node.MARGIN = CfgNode()
    # Predicted from the four distances of the box ("boxes": one linear layer for all levels), or by a convolution of
    # the box tower ("features").
    margin.SOURCE = "boxes"
    # A margin for each dimension. False: one number.
    margin.PER_DIMENSION = False
    # In the place of the predicted margin, that of the prior in losses and results.
    margin.FIXED = False
    # Distance in the embedding space at which the initial probability is 1/2.
    margin.PRIOR = 2.0
    # SOURCE "boxes": distances, in pixels, are divided by this; by the shorter side of the padded batch where it is -1.
    margin.BOX_SCALE = 800.0
    # SOURCE "boxes": the margin does not train the boxes.
    margin.DETACH_BOXES = True
    # SOURCE "features": the box tower's features are divided by this.
    margin.REDUCE_FACTOR = 32.0


def _add_training(node: CfgNode) -> None:
    """Which proposals and pixels train the masks, and how."""
    training = node.TRAINING = CfgNode()
    # Proposals of an object: the mean over all its locations whose predicted box has a higher IoU than POSITIVE_IOU
    # ("mean"; the best ones where none has), or the one location with the best box ("best").
    training.PROPOSALS = "mean"
    # See PROPOSALS "mean". Below 0: all locations of the object.
    training.POSITIVE_IOU = 0.5
    # Pixels of an object: its true box, enlarged on each side by this share of its length and one cell. Below 0: all.
    training.BOX_PADDING = 0.1
    # "lovasz" (hinge) or "bce" (mean over the pixels).
    training.MASK_LOSS = "lovasz"
    # Weight of the mask loss.
    training.MASK_WEIGHT = 0.5
    # The mask loss of an image is divided by the number of all its objects ("all"), or of those that have a location
    # ("found").
    training.MASK_NORMALIZER = "all"
    # Probabilities are kept between this and 1 minus this in the mask loss. Whatever it is, they stay below 1 by 1e-6:
    # the logarithm of 1 - p has no gradient at 1.
    training.PROBABILITY_FLOOR = 0.0
    # Weight of the smooth loss, which draws the proposals of an object together. 0: none. With PROPOSALS "mean" only.
    training.SMOOTH_WEIGHT = 0.1


def _add_inference(node: CfgNode) -> None:
    """From locations to instances. Their number is TEST.DETECTIONS_PER_IMAGE."""
    inference = node.INFERENCE = CfgNode()
    # Least class probability of a location, before it is multiplied by the centerness.
    inference.SCORE_THRESH = 0.05
    # Most candidates of a level and image.
    inference.PRE_NMS_TOPK = 1000
    # Class-wise NMS: boxes with a higher IoU with a better one are dropped.
    inference.NMS_THRESH = 0.6
    # Pixels of a mask have a higher probability.
    inference.MASK_THRESH = 0.5
    # What is scaled to the size of the image: "probability", with 0 outside the box, or its "logarithm", with -10.
    inference.MASK_VALUES = "probability"
    # Cells in which the mask of a box is computed: those less than one cell away ("near"), or two cells more than its
    # whole cells on every side ("wide").
    inference.MASK_CELLS = "near"
