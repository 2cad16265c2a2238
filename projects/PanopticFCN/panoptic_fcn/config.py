"""The keys of Panoptic FCN."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_panoptic_fcn_config(cfg: CfgNode) -> None:
    """Adds the node ``MODEL.PANOPTIC_FCN``, in place. Defaults are those of the release on COCO."""
    node = cfg.MODEL.PANOPTIC_FCN = CfgNode()
    # Levels on which positions and kernels are predicted.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Thing classes.
    node.NUM_CLASSES = 80
    # Number of thing kernels an instance and level in the weighted dice loss: the k cells of its mask with the highest
    # scores. At most the cells of a level are taken.
    node.NUM_KERNELS = 7
    # Standard deviation of the initial weights that make kernels: the kernel head's prediction and the embeddings.
    # Short trainings begin faster with more.
    node.KERNEL_STD = 0.01
    _add_heads(node)
    _add_stuff(node)
    _add_targets(node)
    _add_losses(node)
    _add_inference(node)


def _add_heads(node: CfgNode) -> None:
    """Keys of the heads: each has NUM_CONVS convolutions of CONVS_DIM channels with NORM."""
    head = node.SEMANTIC_FPN = CfgNode()
    # Levels that Semantic FPN joins.
    head.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # Width of its convolutions.
    head.CONVS_DIM = 256
    # Stride of its result, and of all masks.
    head.COMMON_STRIDE = 4
    # Normalisation of its convolutions.
    head.NORM = "GN"
    _add_head(node, "POSITION_HEAD", width=256, norm="GN", deform=True, coord=False)
    # Initial bias of the position logits: a prior probability of 0.1.
    node.POSITION_HEAD.BIAS_VALUE = -2.19
    _add_head(node, "KERNEL_HEAD", width=256, norm="GN", deform=False, coord=True)
    # The width of the encoded feature is that of the kernels too. "Star" models have width 256 and DEFORM.
    _add_head(node, "FEATURE_ENCODER", width=64, norm="", deform=False, coord=True)


def _add_head(node: CfgNode, name: str, *, width: int, norm: str, deform: bool, coord: bool) -> None:
    head = node[name] = CfgNode()
    # 3x3 convolutions before the prediction.
    head.NUM_CONVS = 3
    # Their width.
    head.CONVS_DIM = width
    # Their normalisation; "" for none.
    head.NORM = norm
    # They are modulated deformable convolutions.
    head.DEFORM = deform
    # Row and column of each cell are two more input channels (CoordConv).
    head.COORD = coord
    # Initial weights of these channels are multiplied by this. There are two of them among hundreds, and masks of one
    # object among many that look alike depend on them: with 1.0 a short training does not get that far.
    head.COORD_GAIN = 1.0


def _add_stuff(node: CfgNode) -> None:
    stuff = node.STUFF = CfgNode()
    # Region classes. With WITH_THINGS the labels of INPUT.SEMANTIC_LAYOUT: "things" and stuff, or all classes.
    stuff.NUM_CLASSES = 54
    # Things are regions too: one class "things", or every class. Otherwise the regions are stuff alone, and pixels of
    # things belong to none.
    stuff.WITH_THINGS = True
    # A stuff kernel is the sum of the kernels in its region, divided by the cells of the whole map ("map", the release:
    # its weights need it), or by those of the region ("region", the paper).
    stuff.KERNEL_AVERAGE = "map"


def _add_targets(node: CfgNode) -> None:
    targets = node.TARGETS = CfgNode()
    # Centre of an instance: "mass", the mean of its pixels, or "box".
    targets.CENTER = "mass"
    # Radius of the Gaussian around a centre: a box moved by it still overlaps the true one by this IoU (CornerNet).
    targets.MIN_OVERLAP = 0.7
    # The Gaussian's standard deviation is its diameter divided by this.
    targets.GAUSSIAN_SIGMA = 3.0
    # Square roots of the box areas that a level takes (pixels, both ends included). Ranges overlap: an instance may be
    # on two levels.
    targets.SCALES = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    # Unlabelled pixels (255, and the padding) are negatives of all regions, as in the release. Otherwise they have no
    # part in the losses of stuff.
    targets.IGNORED_AS_NEGATIVE = True


def _add_losses(node: CfgNode) -> None:
    losses = node.LOSSES = CfgNode()
    # Factor of the focal losses of thing centres and stuff regions.
    losses.POSITION_WEIGHT = 1.0
    # Another factor of that of stuff regions: a mean over cells, where that of centres is a sum. With 1.0 a short
    # training of small models learns centres and masks long before it tells textures apart.
    losses.REGION_WEIGHT = 1.0
    # Factor of the dice losses of things and stuff.
    losses.SEGMENT_WEIGHT = 3.0
    # Weight of positives in the focal loss.
    losses.FOCAL_ALPHA = 0.25
    # Exponent of the focal loss.
    losses.FOCAL_GAMMA = 2.0


def _add_inference(node: CfgNode) -> None:
    inference = node.INFERENCE = CfgNode()
    # Least score of a thing's centre. The release's FAST models: 0.2.
    inference.THING_THRESH = 0.05
    # Least mean score of a stuff region. The release's FAST models: 0.1.
    inference.STUFF_THRESH = 0.05
    # Instances an image; a level gives at most half as many.
    inference.TOP_NUM = 100
    # Kernels whose cosine similarity is at least this are one object, and become their mean. Above 1.0: no fusion.
    inference.SIMILAR_THRESH = 0.9
    # Only kernels of one class are fused.
    inference.CLASS_SPECIFIC = True
    # Pixels of a mask have a higher probability.
    inference.MASK_THRESH = 0.4
    # Instances whose score times the mean probability of their mask is below are dropped.
    inference.MASK_SCORE_THRESH = 0.05
    # Matrix NMS (SOLOv2) of the masks, which adds nothing after the fusion.
    inference.MATRIX_NMS = False
    # Upper bound: the centres and regions of the annotations take the place of the predicted ones; classes of things
    # are the best at the centre. Needs INPUT.TARGETS_IN_TEST.
    inference.TRUE_POSITIONS = False
    # Upper bound: each centre has the class of the annotated instance at that cell. Needs INPUT.TARGETS_IN_TEST.
    inference.TRUE_CLASSES = False
    combine = node.COMBINE = CfgNode()
    # Results have "panoptic_seg".
    combine.ENABLED = True
    # An instance of which a larger share is painted already is dropped.
    combine.OVERLAP_THRESH = 0.5
    # Stuff that covers fewer pixels of the output is dropped.
    combine.STUFF_AREA_LIMIT = 4096
    # Instances with a lower score are not painted.
    combine.INSTANCES_CONFIDENCE_THRESH = 0.2
