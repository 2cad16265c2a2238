"""The configuration: Detectron2's keys, what the methods share, and each method's own keys.

Every method adds its keys under a node of its own, so that all of them live in one ``CfgNode``.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from convmask import projects


def add_convmask_config(cfg: CfgNode) -> None:
    """Adds the keys that all methods share, in place."""
    # Check the annotations of all datasets, and that their files exist, before training (convmask.data.validation).
    cfg.DATASETS.VALIDATE = True

    # Datasets to register: lists of a name, a kind and paths, [name, "panoptic", image_root, panoptic_json,
    # panoptic_root] or [name, "instances", image_root, json_file], as register_panoptic and register_instances take
    # them. A config that tools/train_on_my_data.py writes needs no --import.
    cfg.DATASETS.REGISTER = []

    # Take every class count of the method from DATASETS.TRAIN (convmask.data.class_counts). A count that the config
    # sets to something else is then an error.
    cfg.MODEL.NUM_CLASSES_FROM_DATASET = True

    # The backbone "build_narrow_resnet_fpn_backbone" of the quick configs.
    cfg.MODEL.NARROW_RESNET = CfgNode()
    # Channels of the stem and of res2; each later stage has twice as many. 64 is ResNet-18.
    cfg.MODEL.NARROW_RESNET.WIDTH = 32
    # Normalisation, any that detectron2.layers.get_norm knows; frozen statistics do not learn from scratch.
    cfg.MODEL.NARROW_RESNET.NORM = "BN"

    # Keys of "build_openmmlab_resnet_backbone", with the names of Detectron2's DeepLab project. "basic": one 7x7
    # convolution; "deeplab": three 3x3 ones.
    cfg.MODEL.RESNETS.STEM_TYPE = "basic"
    # Dilation of res4; above 1 its stride is 1.
    cfg.MODEL.RESNETS.RES4_DILATION = 1

    # The backbones "build_swin_backbone" and "build_swin_fpn_backbone". Defaults are Swin-T.
    cfg.MODEL.SWIN = CfgNode()
    # Channels of res2; each later stage has twice as many.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Blocks of each stage.
    cfg.MODEL.SWIN.DEPTHS = (2, 2, 6, 2)
    # Heads of the attention in each stage.
    cfg.MODEL.SWIN.NUM_HEADS = (3, 6, 12, 24)
    # Side of the windows of the attention.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Probability that the last block is left out in training; it grows from 0 block by block.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # Stages that it gives.
    cfg.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    # A random crop (INPUT.CROP) is drawn so that at least one instance stays in it, where the image has any.
    cfg.INPUT.CROP.REQUIRE_INSTANCE = False
    # A random crop is drawn anew (10 times at most) while one semantic class fills more than this share of it.
    # 1.0: never.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Labels of the semantic map of a panoptic dataset; 255 is ignored. "separated": 0 is "things", stuff 1 to S. "all":
    # one label for each category, things 0 to T-1 and stuff T to T+S-1, unless the dataset has an order of its own.
    cfg.INPUT.SEMANTIC_LAYOUT = "separated"
    # What the mapper gives to training: "instances", "sem_seg", or both.
    cfg.INPUT.TARGETS = ("instances", "sem_seg")
    # The mapper also gives them at test time, for methods that measure an upper bound with annotations.
    cfg.INPUT.TARGETS_IN_TEST = False
    # SSD's colour augmentation: brightness, contrast, saturation, hue.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Scale jitter replaces the resizing by INPUT.MIN_SIZE_TRAIN: the image is fitted into TARGET_SIZE times a scale
    # drawn from [MIN_SCALE, MAX_SCALE], then cropped, or padded, to CROP_SIZE. (0.1, 2.0) is "large-scale jitter".
    cfg.INPUT.SCALE_JITTER = CfgNode()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = 0.1
    cfg.INPUT.SCALE_JITTER.MAX_SCALE = 2.0
    # (height, width) in pixels
    cfg.INPUT.SCALE_JITTER.TARGET_SIZE = (1024, 1024)
    # (height, width) in pixels
    cfg.INPUT.SCALE_JITTER.CROP_SIZE = (1024, 1024)
    # Also turn by a random multiple of 90 degrees, for images without an upright direction (microscopy, aerial views).
    # With RANDOM_FLIP "horizontal", all eight symmetries of a square are as likely.
    cfg.INPUT.ROTATE_90 = False

    add_training_config(cfg)

    # Test-time augmentation (convmask.inference.TestTimeAugmentation) has Detectron2's keys TEST.AUG: ENABLED;
    # MIN_SIZES, shorter sides of the views, made from the image that INPUT.MIN_SIZE_TEST gives (0: that image itself);
    # MAX_SIZE, limit of their longer sides; FLIP, each of them also mirrored. And this one: detections of two views are
    # one object if they are of one class and their masks have at least this IoU.
    cfg.TEST.AUG.MERGE_THRESH = 0.5
    # COCO AP counts at most this many detections of an image. TEST.DETECTIONS_PER_IMAGE limits what the model returns.
    cfg.TEST.AP_MAX_DETECTIONS = 100
    # COCO's evaluation also gives boundary AP, as "boundary_segm" (convmask.evaluation.boundary).
    cfg.TEST.BOUNDARY_AP = False
    # Panoptic evaluation also writes COCO's panoptic PNG files and json, ready for submission, into the output folder.
    cfg.TEST.DUMP_PANOPTIC = False
    # Semantic evaluation also writes sem_seg_predictions.json, in Detectron2's format, into the output folder.
    cfg.TEST.DUMP_SEMANTIC = False
    # Keeps decoded panoptic annotations in memory (some 50 kB an image of COCO) for every evaluation of this process.
    cfg.TEST.CACHE_GROUND_TRUTH = False


def add_training_config(cfg: CfgNode) -> None:
    """Adds the keys of the training loop, which no method reads, in place. Beside them, Detectron2's are in force."""
    # "SGD" (Detectron2's) or "ADAMW"
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor of the learning rate of the backbone: of what is below its FPN, where it has one.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Weight decay of tables of positions (Swin's relative_position_bias_table); negative: that of everything else.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = -1.0
    # As Detectron2's: "value" (of each element) or "norm" (of each parameter's gradient); also "full_model", the norm
    # of all gradients together.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    # Exponent of the learning-rate schedule SOLVER.LR_SCHEDULER_NAME "WarmupPolyLR", which is there beside Detectron2's
    # "WarmupMultiStepLR" and "WarmupCosineLR".
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # That schedule never falls below this share of the base learning rate after the warm-up.
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0
    # The batch that BASE_LR is meant for; BASE_LR is multiplied by IMS_PER_BATCH / this (the linear scaling rule). 0:
    # BASE_LR is what is used. Detectron2's REFERENCE_WORLD_SIZE scales batch, learning rate and schedule together with
    # the number of processes; only one of the two may be set.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # The IMS_PER_BATCH images of an iteration are taken in this many passes, whose gradients are averaged: less memory,
    # the same update. The images of a pass and process stay IMS_PER_BATCH / (this x processes).
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Type of SOLVER.AMP: "float16" (CUDA only, with a gradient scaler), "bfloat16", or "auto": float16 on CUDA,
    # bfloat16 on the CPU.
    cfg.SOLVER.AMP.DTYPE = "auto"
    # In several processes, let parameters be that some images give no gradient to. Slower; ConvMask's methods do
    # without, and a model that does not is stopped with the names of those parameters.
    cfg.SOLVER.FIND_UNUSED_PARAMETERS = False
    # An exponential moving average of the weights and running statistics. Evaluation and demo then use the average.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # Share that the average keeps in an iteration, 0 to 1; at iteration t it is at most (1 + t) / (10 + t).
    cfg.SOLVER.EMA.DECAY = 0.999
    # So many of the newest periodic checkpoints are kept, older ones deleted. 0: all. model_final.pth and
    # model_best.pth stay whatever this is.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    # A result of the evaluation, "panoptic_seg/PQ" (with several test sets "<set>/panoptic_seg/PQ"): whenever an
    # evaluation (TEST.EVAL_PERIOD) gives a higher value than all before, the model is kept as model_best.pth. "": none.
    cfg.TEST.BEST_METRIC = ""

    # Keep only the inputs of the backbone's blocks for the backward pass and compute the rest again: less memory, about
    # a third more time in the backbone, the same result.
    cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING = False
    # torch.compile in training.
    cfg.MODEL.COMPILE = CfgNode()
    # Parts of the model to compile, modules or methods: ("backbone",), ("backbone", "sem_seg_head.layers"). (): none.
    cfg.MODEL.COMPILE.MODULES = ()
    # torch.compile's backend
    cfg.MODEL.COMPILE.BACKEND = "inductor"


def get_cfg() -> CfgNode:
    """Detectron2's default configuration with ConvMask's keys and those of every method that is present.

    Importing the methods registers their parts with Detectron2 as well.
    """
    cfg = get_detectron2_cfg()
    add_convmask_config(cfg)
    for name in projects.available():
        getattr(projects.load(name), f"add_{name}_config")(cfg)
    return cfg
