"""The keys of K-Net."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_knet_config(cfg: CfgNode) -> None:
    """Adds the node ``MODEL.KNET``, in place. Defaults are those of the release's panoptic model on COCO."""
    node = cfg.MODEL.KNET = CfgNode()
    # "instance", "panoptic" or "semantic". A semantic model is the head MODEL.SEM_SEG_HEAD.NAME "KNetSemSegHead" on the
    # backbone; the keys of kernel head, assignment and losses are for the other two.
    node.TASK = "panoptic"
    # Thing classes.
    node.NUM_THING_CLASSES = 80
    # Stuff classes of a panoptic model, each with a kernel of its own.
    node.NUM_STUFF_CLASSES = 53
    # Learned kernels for things.
    node.NUM_KERNELS = 100
    # Rounds of kernel updates.
    node.NUM_ROUNDS = 3
    # Levels of the localisation FPN.
    node.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # Stride of the features that kernels are applied to.
    node.COMMON_STRIDE = 8
    # Stride of the masks in losses and results: COMMON_STRIDE or a finer one.
    node.MASK_STRIDE = 4
    # Width of kernels and features.
    node.CHANNELS = 256
    # Normalisation of the convolutions of the kernel head.
    node.NORM = "GN"
    # Where a sine encoding of the position is added: to the coarsest level ("coarsest", the release); to the joined map
    # as well, which tells many small objects apart sooner ("joined"); or nowhere ("none").
    node.POSITIONAL_ENCODING = "coarsest"
    # Standard deviation of the learned kernels at the start.
    node.KERNEL_STD = 1.0
    # Standard deviation of the weights of the kernel head's convolutions at the start. 0.0: He's initialisation, for
    # larger learning rates.
    node.CONV_STD = 0.01
    # Probability of every class at the start. From scratch, larger ones save the time that biases take to rise.
    node.PRIOR_PROB = 0.01
    _add_rounds(node)
    _add_training(node)
    _add_inference(node)
    _add_semantic(node)


def _add_rounds(node: CfgNode) -> None:
    # Which pixels a kernel gathers features from: those of a probability above one half ("hard", the release, without
    # gradients to the masks), all by their probability ("soft", the paper), or all alike ("none").
    node.GROUP_ASSEMBLY = "hard"
    # Adaptive update: gates weigh a kernel against its group feature. False: they are added.
    node.GATES = True
    # Kernel interaction: attention among kernels and a feed-forward network.
    node.INTERACTION = True
    # Heads of the attention.
    node.NUM_HEADS = 8
    # Hidden channels of the feed-forward network.
    node.FFN_CHANNELS = 2048
    # Dropout in attention and feed-forward network.
    node.DROPOUT = 0.0
    # Width of the kernel updator; kernels are cut into pieces of it. 0: that of the kernels. The release's semantic
    # models have 256 with kernels of 512.
    node.UPDATOR_CHANNELS = 0


def _add_training(node: CfgNode) -> None:
    cost = node.COST = CfgNode()
    # Factor of the focal cost of classes in the Hungarian assignment.
    cost.CLASS_WEIGHT = 2.0
    # Factor of the share of cells in which mask and object agree.
    cost.MASK_WEIGHT = 1.0
    # Factor of the dice coefficient.
    cost.DICE_WEIGHT = 4.0
    losses = node.LOSSES = CfgNode()
    # Factor of the focal loss of classes.
    losses.CLASS_WEIGHT = 2.0
    # Factor of the binary cross-entropy of masks.
    losses.MASK_WEIGHT = 1.0
    # Factor of the dice loss.
    losses.DICE_WEIGHT = 4.0
    # Factor of the cross-entropy over kernels in each cell. 0: there is none, as in the release's instance models.
    losses.RANK_WEIGHT = 0.1
    # Factor of the focal loss of the dense classifier beside the kernels.
    losses.SEG_WEIGHT = 1.0
    # Weight of positives in focal losses and cost.
    losses.FOCAL_ALPHA = 0.25
    # Exponent of focal losses and cost.
    losses.FOCAL_GAMMA = 2.0


def _add_inference(node: CfgNode) -> None:
    inference = node.INFERENCE = CfgNode()
    # Pixels of an instance have a higher probability. TEST.DETECTIONS_PER_IMAGE is the number of instances.
    inference.MASK_THRESH = 0.5
    # A panoptic model also gives its thing kernels as instances; the release's does not.
    inference.INSTANCES_OF_PANOPTIC = True
    combine = node.COMBINE = CfgNode()
    # Things with a lower score are no segments.
    combine.INSTANCES_CONFIDENCE_THRESH = 0.3
    # A segment that keeps a smaller share of its mask is dropped.
    combine.OVERLAP_THRESH = 0.6


def _add_semantic(node: CfgNode) -> None:
    semantic = node.SEMANTIC = CfgNode()
    # The head that KNetSemSegHead refines: any of SEM_SEG_HEADS_REGISTRY with a 1x1 "predictor" ("FCNHead", "PSPHead",
    # "ASPPHead", "UPerHead", "SemSegFPNHead", ...). It follows MODEL.SEM_SEG_HEAD.
    semantic.HEAD = "FCNHead"
    # As GROUP_ASSEMBLY; "softmax" is the release's: a kernel gathers by the probability of its class.
    semantic.GROUP_ASSEMBLY = "softmax"
    # Dropout before the predictor.
    semantic.DROPOUT = 0.1
    # Convolutions of FCNHead.
    semantic.NUM_CONVS = 2
    # Sides of the grids of PSPHead and UPerHead.
    semantic.POOL_SCALES = (1, 2, 3, 6)
    # Dilations of ASPPHead.
    semantic.ASPP_DILATIONS = (1, 12, 24, 36)
    # Input of the auxiliary FCN head; "" for none.
    semantic.AUX_IN_FEATURE = "res4"
    # Its width.
    semantic.AUX_CHANNELS = 256
    # Factor of its loss.
    semantic.AUX_WEIGHT = 0.4
