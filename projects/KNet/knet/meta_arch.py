"""The meta-architecture: one network of kernels for three tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import nn
from torch.nn import functional as F

from convmask.inference.stages import register_stages

from .assignment import CostOptions
from .classes import check_config, check_targets
from .inference import Frame, InferenceOptions, instances_of, panoptic_of
from .kernel_head import KernelHead, KernelHeadOutputs
from .losses import LossOptions, knet_losses
from .targets import make_targets
from .update_head import KernelUpdateHead, Round


@register_stages(heads=("heads", "sem_seg_head.layers"), compiled=("backbone", "heads", "sem_seg_head.layers"))
@META_ARCH_REGISTRY.register()
class KNet(nn.Module):
    """K-Net: Towards Unified Image Segmentation (Zhang et al., NeurIPS 2021, arXiv 2106.14855).

    An instance or panoptic model has a kernel head and rounds; a semantic one a semantic head with rounds in it.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        kernel_head: KernelHead | None = None,
        rounds: Sequence[KernelUpdateHead] = (),
        sem_seg_head: nn.Module | None = None,
        mask_stride: int = 4,
        cost_options: CostOptions | None = None,
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        instances_of_panoptic: bool = True,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
    ) -> None:
        """Takes the parts.

        Args:
            backbone: with the levels of the heads.
            kernel_head: of an instance model, or with stuff classes of a panoptic one; None: a semantic model.
            rounds: kernel updates, one after the other.
            sem_seg_head: of a semantic model, with Detectron2's interface and ``layers``.
            mask_stride: stride of masks in losses and results.
            cost_options: see :class:`CostOptions`, as are the next two in their places.
            loss_options: see above.
            inference_options: see above.
            instances_of_panoptic: a panoptic model also gives ``instances``.
            pixel_mean: one a channel of the input.
            pixel_std: one a channel.
            input_format: order of the channels.

        Raises:
            ValueError: neither or both kinds of head.
        """
        super().__init__()
        if (kernel_head is None) == (sem_seg_head is None):
            raise ValueError("KNet: give either kernel_head and rounds, or sem_seg_head")
        self.backbone = backbone
        self.kernel_head = kernel_head
        self.rounds = nn.ModuleList(rounds)
        self.sem_seg_head = sem_seg_head
        self.mask_stride = mask_stride
        self.cost_options = cost_options or CostOptions()
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        self.instances_of_panoptic = instances_of_panoptic
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        check_targets(cfg)
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        arguments = {
            "backbone": backbone,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }
        node = cfg.MODEL.KNET
        if node.TASK == "semantic":
            return {**arguments, "sem_seg_head": build_sem_seg_head(cfg, shape)}
        check_config(cfg, shape)
        num_stuff = node.NUM_STUFF_CLASSES if node.TASK == "panoptic" else 0
        kernel_head = KernelHead(
            {name: shape[name] for name in node.IN_FEATURES},
            num_kernels=node.NUM_KERNELS,
            num_thing_classes=node.NUM_THING_CLASSES,
            num_stuff_classes=num_stuff,
            channels=node.CHANNELS,
            common_stride=node.COMMON_STRIDE,
            norm=node.NORM,
            positional_encoding=node.POSITIONAL_ENCODING,
            assembly=node.GROUP_ASSEMBLY,
            kernel_std=node.KERNEL_STD,
            conv_std=node.CONV_STD,
            prior=node.PRIOR_PROB,
        )
        return {
            **arguments,
            "kernel_head": kernel_head,
            "rounds": [_round(cfg, node.NUM_THING_CLASSES + num_stuff) for _ in range(node.NUM_ROUNDS)],
            "mask_stride": node.MASK_STRIDE,
            "instances_of_panoptic": node.INFERENCE.INSTANCES_OF_PANOPTIC,
            **_options(cfg),
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalises and pads the images of a batch."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        divisibility = self.backbone.size_divisibility
        if self.kernel_head is not None:
            # strides of masks and of the coarsest level divide the padded size
            divisibility = max(divisibility, 32)
        return ImageList.from_tensors(images, divisibility)

    def predict(self, images: torch.Tensor) -> tuple[KernelHeadOutputs, list[Round]]:
        """What the kernel head and each round give for (N, 3, H, W) normalised images."""
        return self.heads(self.backbone(images))

    def heads(self, features: dict[str, torch.Tensor]) -> tuple[KernelHeadOutputs, list[Round]]:
        """:meth:`predict` from the backbone's features by level."""
        assert self.kernel_head is not None
        outputs = self.kernel_head(features)
        # sums over thousands of cells, and masks that a threshold cuts, are for single precision
        with torch.autocast(outputs.features.device.type, enabled=False):
            start = outputs.start
            outputs = KernelHeadOutputs(
                outputs.features.float(),
                outputs.seg_logits.float(),
                Round(start.kernels.float(), start.mask_logits.float()),
            )
            rounds: list[Round] = []
            for update in self.rounds:
                rounds.append(update(outputs.features, rounds[-1] if rounds else outputs.start))
        return outputs, rounds

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses by name in training; otherwise see :meth:`inference`.

        Args:
            batched_inputs: of each image Detectron2's dict: ``image`` (C, H, W); for training ``instances`` and
                ``sem_seg`` (H, W) int64, as far as the task needs them; ``height`` and ``width`` of the output.

        Raises:
            ValueError: training without targets, or with a class that the model lacks.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        padded = _size(images.tensor)
        if self.sem_seg_head is not None:
            targets = _semantic_targets(batched_inputs, padded, self.sem_seg_head.ignore_value, self.device)
            return self.sem_seg_head(self.backbone(images.tensor), targets)[1]
        assert self.kernel_head is not None
        counts = {
            "num_thing_classes": self.kernel_head.num_thing_classes,
            "num_stuff_classes": self.kernel_head.num_stuff_classes,
        }
        masks = make_targets(batched_inputs, padded, self.mask_stride, self.device, **counts)
        outputs, rounds = self.predict(images.tensor)
        with torch.autocast(self.device.type, enabled=False):
            return knet_losses(outputs, rounds, masks, cost=self.cost_options, options=self.loss_options, **counts)

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Predictions, one dict an image, as Detectron2's: ``instances``; ``panoptic_seg``; or ``sem_seg`` logits
        (K, H, W)."""
        images = self.preprocess_image(batched_inputs)
        padded = _size(images.tensor)
        frames = [
            Frame(padded, size, (inputs.get("height", size[0]), inputs.get("width", size[1])))
            for inputs, size in zip(batched_inputs, [(int(h), int(w)) for h, w in images.image_sizes], strict=True)
        ]
        if self.sem_seg_head is not None:
            logits = self.sem_seg_head.layers(self.backbone(images.tensor)).float()
            return [{"sem_seg": _semantic_map(x, frame)} for x, frame in zip(logits, frames, strict=True)]
        last = self.predict(images.tensor)[1][-1]
        assert last.class_logits is not None
        upsampling = padded[0] // self.mask_stride // last.mask_logits.shape[2]
        scores = last.class_logits.sigmoid()
        return [
            self._result(mask_logits, score, upsampling, frame)
            for mask_logits, score, frame in zip(last.mask_logits, scores, frames, strict=True)
        ]

    def _result(self, mask_logits: torch.Tensor, scores: torch.Tensor, upsampling: int, frame: Frame) -> dict[str, Any]:
        """The result of one image, from (Q, h, w) logits and (Q, K) scores."""
        assert self.kernel_head is not None
        things, stuff = self.kernel_head.num_thing_classes, self.kernel_head.num_stuff_classes
        options = self.inference_options
        result: dict[str, Any] = {}
        if not stuff or self.instances_of_panoptic:
            last = len(scores) - stuff
            result["instances"] = instances_of(mask_logits[:last], scores[:last, :things], upsampling, frame, options)
        if stuff:
            result["panoptic_seg"] = panoptic_of(mask_logits, scores, things, upsampling, frame, options)
        return result


def _semantic_targets(
    batched_inputs: list[dict[str, Any]], padded: tuple[int, int], ignore_value: int, device: torch.device
) -> torch.Tensor:
    targets = []
    for inputs in batched_inputs:
        if "sem_seg" not in inputs:
            raise ValueError(f"K-Net: no 'sem_seg' for image {inputs.get('file_name', '')!r}: check INPUT.TARGETS")
        x = inputs["sem_seg"].to(device)
        targets.append(F.pad(x, (0, padded[1] - x.shape[1], 0, padded[0] - x.shape[0]), value=ignore_value))
    return torch.stack(targets)


def _semantic_map(logits: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Logits (K, h, w) at the size of the output; class by class, so that nothing else is as large as the result."""
    result = logits.new_empty(len(logits), *frame.output)
    for index in range(len(logits)):
        padded = F.interpolate(logits[None, index, None], size=frame.padded, mode="bilinear", align_corners=False)[0]
        result[index] = sem_seg_postprocess(padded, frame.image, *frame.output)[0]
    return result


def _round(cfg: CfgNode, num_classes: int) -> KernelUpdateHead:
    node = cfg.MODEL.KNET
    head = KernelUpdateHead(
        channels=node.CHANNELS,
        num_classes=num_classes,
        num_heads=node.NUM_HEADS,
        ffn_channels=node.FFN_CHANNELS,
        dropout=node.DROPOUT,
        assembly=node.GROUP_ASSEMBLY,
        gates=node.GATES,
        interaction=node.INTERACTION,
        updator_channels=node.UPDATOR_CHANNELS,
    )
    head.init_weights(node.PRIOR_PROB)
    return head


def _options(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.KNET
    return {
        "cost_options": CostOptions(
            class_weight=node.COST.CLASS_WEIGHT,
            mask_weight=node.COST.MASK_WEIGHT,
            dice_weight=node.COST.DICE_WEIGHT,
            focal_alpha=node.LOSSES.FOCAL_ALPHA,
            focal_gamma=node.LOSSES.FOCAL_GAMMA,
        ),
        "loss_options": LossOptions(
            class_weight=node.LOSSES.CLASS_WEIGHT,
            mask_weight=node.LOSSES.MASK_WEIGHT,
            dice_weight=node.LOSSES.DICE_WEIGHT,
            rank_weight=node.LOSSES.RANK_WEIGHT,
            seg_weight=node.LOSSES.SEG_WEIGHT,
            focal_alpha=node.LOSSES.FOCAL_ALPHA,
            focal_gamma=node.LOSSES.FOCAL_GAMMA,
        ),
        "inference_options": InferenceOptions(
            top_num=cfg.TEST.DETECTIONS_PER_IMAGE,
            mask_threshold=node.INFERENCE.MASK_THRESH,
            things_threshold=node.COMBINE.INSTANCES_CONFIDENCE_THRESH,
            overlap_threshold=node.COMBINE.OVERLAP_THRESH,
        ),
    }


def _size(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
