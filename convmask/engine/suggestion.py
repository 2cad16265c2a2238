"""A config for data of one's own: which one to begin with, what to change in it, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode

from convmask.data.summary import DataSummary
from convmask.engine.config_files import load_config
from convmask.engine.errors import ConfigError

# (method, what the data have) to the small config, which learns from scratch, and the one with an ImageNet backbone.
_CONFIGS = {
    ("panoptic_fpn", "panoptic"): ("quick/panoptic_fpn_synthetic.yaml", "PanopticFPN/panoptic_fpn_R_50_1x.yaml"),
    ("panoptic_fpn", "instance"): ("quick/panoptic_fpn_synthetic.yaml", "PanopticFPN/instance_R_50_1x.yaml"),
    ("panoptic_fcn", "panoptic"): ("quick/panoptic_fcn_synthetic.yaml", "PanopticFCN/panoptic_fcn_R_50_1x.yaml"),
    ("fcis", "instance"): ("quick/fcis_fpn_synthetic.yaml", "FCIS/fcis_R_50_FPN_coco.yaml"),
    ("embed_mask", "instance"): ("quick/embed_mask_synthetic.yaml", "EmbedMask/embed_mask_v1_R_50_1x.yaml"),
    ("knet", "panoptic"): ("quick/knet_panoptic_synthetic.yaml", "KNet/knet_panoptic_R_50_1x.yaml"),
    ("knet", "instance"): ("quick/knet_instance_synthetic.yaml", "KNet/knet_instance_R_50_1x.yaml"),
}
METHODS = ("panoptic_fpn", "panoptic_fcn", "fcis", "embed_mask", "knet")
DEFAULTS = {"panoptic": "panoptic_fpn", "instance": "embed_mask"}

# Longest side of an input, in pixels, by the size of the model.
_LIMITS = {"small": 512, "large": 1333}
# Sizes that objects should have in the input of a model whose finest level has stride 4.
_WANTED_MEDIAN, _WANTED_SMALL = 24.0, 12.0
# GiB of GPU memory that training takes for an image of 800 x 1333 pixels on ResNet-50-FPN, on the safe side.
_GIB_AN_IMAGE = 3.0


@dataclass
class Suggestion:
    """A config and how it came about.

    Attributes:
        config: to begin with, below ``configs``.
        method: one of ``METHODS``.
        choices: key, value and reason of what is changed, in order.
    """

    config: str
    method: str
    choices: list[tuple[str, Any, str]] = field(default_factory=list)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Adds a change."""
        self.choices.append((key, value, reason))

    def apply(self) -> CfgNode:
        """The config with the changes, not frozen."""
        cfg = load_config(self.config)
        for key, value, _ in self.choices:
            cfg.merge_from_list([key, value])
        return cfg


def suggest(
    data: DataSummary, *, method: str | None = None, device: str = "cpu", gpu_memory: float = 0.0, weights: str = ""
) -> Suggestion:
    """Chooses a config for a dataset.

    Args:
        data: of the training set.
        method: one of ``METHODS``; by default Panoptic FPN for panoptic data, EmbedMask for instances.
        device: as ``MODEL.DEVICE``. On the CPU the small models are taken, which learn from scratch.
        gpu_memory: of the device, in GiB.
        weights: a checkpoint to begin with; by default that of the config.

    Raises:
        ConfigError: an unknown method, or one that cannot learn from these data.
    """
    name = method or DEFAULTS[data.kind]
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not one of {', '.join(METHODS)}")
    task = data.kind if (name, data.kind) in _CONFIGS else "instance"
    if (name, task) not in _CONFIGS:
        raise ConfigError(f"method {name}: needs stuff classes (a panoptic dataset), and these data have none")
    size = "small" if device.startswith("cpu") else "large"
    config = _CONFIGS[name, task][size == "large"]
    suggestion = Suggestion(config, name)
    base = load_config(config)
    suggestion.set("MODEL.DEVICE", device, "a small model from scratch" if size == "small" else "ImageNet backbone")
    if weights:
        suggestion.set("MODEL.WEIGHTS", weights, "as asked for")
    if (name, task) == ("panoptic_fpn", "instance"):
        suggestion.set("MODEL.PANOPTIC_FPN.TASK", "instance", "there are no stuff classes: Mask R-CNN alone")
    if task == "instance":
        suggestion.set("INPUT.TARGETS", ("instances",), "objects are what there is to learn")
    scale = _input_size(suggestion, data, size)
    _object_sizes(suggestion, base, data, scale)
    _numbers(suggestion, base, data, task)
    _stuff(suggestion, base, data)
    _schedule(suggestion, base, data, size, gpu_memory)
    return suggestion


def _input_size(suggestion: Suggestion, data: DataSummary, size: str) -> float:
    """Sets the input's size; returns its pixels for a pixel of the image."""
    small, middle, _ = data.object_sizes
    limit = _LIMITS[size]
    wanted = min(max(_WANTED_MEDIAN / max(middle, 1), _WANTED_SMALL / max(small, 1), 1.0), 3.0)
    scale = min(wanted, limit / data.long_side)
    short = max(round(data.short_side * scale / 16) * 16, 64)
    scale = short / data.short_side
    reason = f"objects are {small * scale:.0f} pixels and more (10 %), {middle * scale:.0f} in the middle"
    if scale < 0.95:
        reason = f"at most {limit} pixels are affordable here; " + reason
    if small * scale < 6:
        reason += "; the smallest will be missed: cut the images into tiles"
    steps = tuple(max(round(short * factor / 16) * 16, 48) for factor in (0.875, 1.0, 1.125))
    longest = math.ceil(data.long_side * scale * 1.25 / 16) * 16
    suggestion.set("INPUT.MIN_SIZE_TRAIN", steps, f"images scaled by {scale:.2f}: {reason}")
    suggestion.set("INPUT.MAX_SIZE_TRAIN", longest, "the long side of 95 % of the images, and a quarter more")
    suggestion.set("INPUT.MIN_SIZE_TEST", short, "the middle of what is trained with")
    suggestion.set("INPUT.MAX_SIZE_TEST", longest, "as in training")
    return scale


def _object_sizes(suggestion: Suggestion, base: CfgNode, data: DataSummary, scale: float) -> None:
    """Sets anchors, or what a method has in their place."""
    least = 2.0 ** round(math.log2(min(max(data.object_sizes[0] * scale, 8.0), 32.0)))
    reason = f"the smallest tenth of the objects is {data.object_sizes[0] * scale:.0f} pixels large in the input"
    if suggestion.method in ("panoptic_fpn", "fcis"):
        levels = len(base.MODEL.ANCHOR_GENERATOR.SIZES)
        # FCIS has no level of stride 4
        first = max(least, 16.0) if suggestion.method == "fcis" else least
        sizes = [[int(first * 2**level)] for level in range(levels)]
        suggestion.set("MODEL.ANCHOR_GENERATOR.SIZES", sizes, reason)
    elif suggestion.method == "embed_mask":
        levels = len(base.MODEL.EMBED_MASK.IN_FEATURES) - 1
        bounds = tuple(int(least * 2**level) for level in range(levels))
        suggestion.set("MODEL.EMBED_MASK.FCOS.SIZES_OF_INTEREST", bounds, reason)
    elif suggestion.method == "panoptic_fcn":
        levels = len(base.MODEL.PANOPTIC_FCN.IN_FEATURES)
        edges = [int(3 * least * 2**level) for level in range(levels - 1)]
        # ranges overlap, the first begins with single pixels
        lows = [1, *(round(edge * 5 / 6) for edge in edges)]
        scales = tuple(zip(lows, [*edges, 2048], strict=True))
        suggestion.set("MODEL.PANOPTIC_FCN.TARGETS.SCALES", scales, reason)


def _numbers(suggestion: Suggestion, base: CfgNode, data: DataSummary, task: str) -> None:
    """Sets how many objects an image may have."""
    room = math.ceil(1.5 * data.most_objects / 10) * 10
    reason = f"up to {data.most_objects} objects an image, and half as many more"
    detections = max(room, base.TEST.DETECTIONS_PER_IMAGE)
    if suggestion.method == "knet":
        kernels = min(max(room, base.MODEL.KNET.NUM_KERNELS), 300)
        suggestion.set("MODEL.KNET.NUM_KERNELS", kernels, f"one for an object: {reason}")
        detections = kernels
    if suggestion.method == "panoptic_fcn":
        suggestion.set("MODEL.PANOPTIC_FCN.INFERENCE.TOP_NUM", max(2 * room, 100), f"a level gives half: {reason}")
    if suggestion.method in ("panoptic_fpn", "fcis"):
        for key in ("POST_NMS_TOPK_TRAIN", "POST_NMS_TOPK_TEST"):
            if base.MODEL.RPN[key] < 3 * room:
                suggestion.set(f"MODEL.RPN.{key}", 3 * room, reason)
                pre = key.replace("POST", "PRE")
                suggestion.set(f"MODEL.RPN.{pre}", max(6 * room, base.MODEL.RPN[pre]), reason)
    suggestion.set("TEST.DETECTIONS_PER_IMAGE", detections, reason)
    if detections > base.TEST.AP_MAX_DETECTIONS:
        suggestion.set("TEST.AP_MAX_DETECTIONS", detections, "AP would not count more than 100 of them")


def _stuff(suggestion: Suggestion, base: CfgNode, data: DataSummary) -> None:
    key = {"panoptic_fpn": "PANOPTIC_FPN", "panoptic_fcn": "PANOPTIC_FCN"}.get(suggestion.method)
    if key and data.stuff:
        area = min(round(0.004 * data.short_side * data.long_side), 4096)
        reason = "0.4 % of an image; smaller pieces of stuff are left out of panoptic results"
        suggestion.set(f"MODEL.{key}.COMBINE.STUFF_AREA_LIMIT", area, reason)


def _schedule(suggestion: Suggestion, base: CfgNode, data: DataSummary, size: str, gpu_memory: float) -> None:
    """Sets batch, learning rate and length."""
    usual = base.SOLVER.IMS_PER_BATCH
    batch = min(usual, max(2 ** int(math.log2(max(data.images, 2) / 2)), 2))
    reason = f"{data.images} images"
    if size == "large" and gpu_memory:
        fitting = max(int(gpu_memory / _GIB_AN_IMAGE), 1)
        batch, reason = min(batch, fitting), f"{gpu_memory:.0f} GiB of GPU memory, about {_GIB_AN_IMAGE:.0f} an image"
    rate = base.SOLVER.BASE_LR * batch / usual
    suggestion.set("SOLVER.IMS_PER_BATCH", batch, reason)
    suggestion.set(
        "SOLVER.BASE_LR", rate, f"linear scaling rule: {base.SOLVER.BASE_LR} for {usual} images, so x {batch}/{usual}"
    )
    epochs, least, most = (30, 600, 2000) if size == "small" else (36, 1500, 90000)
    iterations = min(max(round(epochs * data.images / batch / 50) * 50, least), most)
    reached = iterations * batch / data.images
    suggestion.set("SOLVER.MAX_ITER", iterations, f"each image {reached:.0f} times, but {least} to {most} iterations")
    factor = iterations / base.SOLVER.MAX_ITER
    if base.SOLVER.STEPS:
        steps = tuple(round(step * factor) for step in base.SOLVER.STEPS if round(step * factor) < iterations)
        suggestion.set("SOLVER.STEPS", steps, "in the same places of the schedule")
    suggestion.set("SOLVER.WARMUP_ITERS", min(base.SOLVER.WARMUP_ITERS, iterations // 10), "a tenth at most")
    suggestion.set("SOLVER.CHECKPOINT_PERIOD", max(iterations // 5, 1), "five times, to resume from")


def reasons(choices: Sequence[tuple[str, Any, str]]) -> list[list[str]]:
    """Rows for a table: key, value, why."""
    return [[key, str(value), reason] for key, value, reason in choices]
