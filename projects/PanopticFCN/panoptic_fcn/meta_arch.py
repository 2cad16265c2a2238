"""The meta-architecture: kernels generated from the image, fused across levels, applied as convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from convmask.inference.stages import register_stages
from convmask.layers import SemanticFPN
from convmask.ops import panoptic_merge

from .classes import check_config, region_labels
from .heads import FeatureEncoder, HeadOutputs, KernelHead, PositionHead, kernel_embedding
from .inference import (
    InferenceOptions,
    Kernels,
    Masks,
    cut_out,
    fuse_stuff,
    fuse_things,
    rescore,
    semantic_map,
    stuff_kernels,
    thing_kernels,
)
from .losses import LossOptions, panoptic_fcn_losses
from .rescale import output_masks
from .targets import TargetOptions, make_targets, sem_seg_and_instances
from .truth import true_logits


@register_stages(heads=("heads",), compiled=("backbone", "heads"))
@META_ARCH_REGISTRY.register()
class PanopticFCN(nn.Module):
    """Fully Convolutional Networks for Panoptic Segmentation (Li et al., CVPR 2021, arXiv 2012.00720)."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        semantic_fpn: SemanticFPN,
        position_head: PositionHead,
        kernel_head: KernelHead,
        feature_encoder: FeatureEncoder,
        in_features: Sequence[str],
        target_options: TargetOptions,
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        region_labels: Sequence[int] | None = None,
        true_positions: bool = False,
        true_classes: bool = False,
        kernel_std: float = 0.01,
        combine: bool = True,
        combine_overlap_threshold: float = 0.5,
        combine_stuff_area_limit: int = 4096,
        combine_score_threshold: float = 0.2,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        input_format: str = "BGR",
    ) -> None:
        """Takes the parts.

        Args:
            backbone: with the levels of ``in_features`` and those of ``semantic_fpn``.
            semantic_fpn: from levels to the common stride.
            position_head: see :class:`PositionHead`, as are the next two in their places.
            kernel_head: see above.
            feature_encoder: see above.
            in_features: levels, finest first.
            target_options: see :class:`TargetOptions`.
            loss_options: see :class:`LossOptions`.
            inference_options: see :class:`InferenceOptions`.
            region_labels: the category of a stuff segment by its semantic label, 0 for labels that are never painted.
                None: label 0 is "things", the others are their own categories.
            true_positions: see ``INFERENCE.TRUE_POSITIONS``.
            true_classes: see ``INFERENCE.TRUE_CLASSES``.
            kernel_std: of the initial weights of both embeddings.
            combine: results have ``panoptic_seg``.
            combine_overlap_threshold: see :func:`panoptic_merge`, as are the next two.
            combine_stuff_area_limit: in pixels of the output.
            combine_score_threshold: of instances.
            pixel_mean: one a channel of the input. The default is the release's: the RGB order on BGR images.
            pixel_std: one a channel.
            input_format: order of the channels.
        """
        super().__init__()
        self.backbone = backbone
        self.semantic_fpn = semantic_fpn
        self.position_head = position_head
        self.kernel_head = kernel_head
        self.feature_encoder = feature_encoder
        widths = kernel_head.out_channels, feature_encoder.out_channels, kernel_std
        self.thing_embedding = kernel_embedding(*widths)
        self.stuff_embedding = kernel_embedding(*widths)
        self.in_features = list(in_features)
        self.target_options = target_options
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        self.region_labels = None if region_labels is None else list(region_labels)
        self.true_positions, self.true_classes = true_positions, true_classes
        self.combine = combine
        self.combine_options: dict[str, Any] = {
            "overlap_threshold": combine_overlap_threshold,
            "stuff_area_limit": combine_stuff_area_limit,
            "score_threshold": combine_score_threshold,
        }
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        node = cfg.MODEL.PANOPTIC_FCN
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        check_config(cfg, shape)
        semantic = node.SEMANTIC_FPN
        channels = shape[node.IN_FEATURES[0]].channels
        return {
            "backbone": backbone,
            "semantic_fpn": SemanticFPN(
                {name: shape[name] for name in semantic.IN_FEATURES},
                conv_dims=semantic.CONVS_DIM,
                common_stride=semantic.COMMON_STRIDE,
                norm=semantic.NORM,
            ),
            "position_head": PositionHead(cfg, channels),
            "kernel_head": KernelHead(cfg, channels),
            "feature_encoder": FeatureEncoder(cfg, semantic.CONVS_DIM),
            "in_features": node.IN_FEATURES,
            **_options(cfg),
            "region_labels": region_labels(cfg),
            "true_positions": node.INFERENCE.TRUE_POSITIONS,
            "true_classes": node.INFERENCE.TRUE_CLASSES,
            "kernel_std": node.KERNEL_STD,
            "combine": node.COMBINE.ENABLED,
            "combine_overlap_threshold": node.COMBINE.OVERLAP_THRESH,
            "combine_stuff_area_limit": node.COMBINE.STUFF_AREA_LIMIT,
            "combine_score_threshold": node.COMBINE.INSTANCES_CONFIDENCE_THRESH,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalises and pads the images of a batch."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def predict(self, images: torch.Tensor) -> HeadOutputs:
        """Head outputs of (N, 3, H, W) normalised images."""
        return self.heads(self.backbone(images))

    def heads(self, features: dict[str, torch.Tensor]) -> HeadOutputs:
        """:meth:`predict` from the backbone's features by level."""
        levels = [features[name] for name in self.in_features]
        encoded = self.feature_encoder(self.semantic_fpn(features))
        centers, regions = self.position_head(levels)
        return HeadOutputs(centers, regions, self.kernel_head(levels), encoded)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses by name in training; otherwise see :meth:`inference`.

        Args:
            batched_inputs: of each image Detectron2's dict: ``image`` (C, H, W); for training ``instances`` and
                ``sem_seg`` (H, W) int64; ``height`` and ``width`` of the output.

        Raises:
            ValueError: training without targets, or labels that the model has no class for.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        outputs = self.predict(images.tensor)
        instances, sem_segs = sem_seg_and_instances(batched_inputs, self.device)
        targets = make_targets(
            instances,
            sem_segs,
            padded=_size(images.tensor),
            common=_size(outputs.encoded),
            levels=[_size(x) for x in outputs.centers],
            options=self.target_options,
        )
        with torch.autocast(self.device.type, enabled=False):
            return panoptic_fcn_losses(
                outputs.float(), targets, self.thing_embedding, self.stuff_embedding, self.loss_options
            )

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Predictions, one dict an image: ``instances``, ``sem_seg`` probabilities and ``panoptic_seg`` as
        Detectron2's.

        ``sem_seg`` (labels, H, W) is exactly 0 for labels without a region.
        """
        images = self.preprocess_image(batched_inputs)
        outputs = self.predict(images.tensor).float()
        if self.true_positions or self.true_classes:
            outputs = true_logits(
                outputs,
                *sem_seg_and_instances(batched_inputs, self.device),
                padded=_size(images.tensor),
                options=self.target_options,
                positions=self.true_positions,
                classes=self.true_classes,
            )
        results = []
        for index, (inputs, image) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            output = inputs.get("height", image[0]), inputs.get("width", image[1])
            stride = images.tensor.shape[-2] // outputs.encoded.shape[-2]
            with torch.autocast(self.device.type, enabled=False):
                things, stuff = self.masks_of(outputs.of_image(index))
            results.append(self.postprocess(things, stuff, stride, image, output))
        return results

    def masks_of(self, outputs: HeadOutputs) -> tuple[Masks, Masks]:
        """Masks of things and stuff at the common stride, from the head outputs of one image (no batch dimension)."""
        things, stuff = self.kernels_of(outputs)
        options = self.inference_options
        return rescore(cut_out(things, outputs.encoded), options), cut_out(stuff, outputs.encoded)

    def kernels_of(self, outputs: HeadOutputs) -> tuple[Kernels, Kernels]:
        """Fused kernels of things and stuff of one image, in the space of the encoded feature."""
        options = self.inference_options
        things = thing_kernels(outputs.centers, outputs.kernels, options)
        stuff = stuff_kernels(outputs.regions, outputs.kernels, options)
        things = fuse_things(things._replace(vectors=self.thing_embedding(things.vectors)), options)
        return things, fuse_stuff(stuff._replace(vectors=self.stuff_embedding(stuff.vectors)))

    def postprocess(
        self, things: Masks, stuff: Masks, stride: int, image: tuple[int, int], output: tuple[int, int]
    ) -> dict[str, Any]:
        """The result of one image.

        Args:
            things: at the common stride.
            stuff: at the common stride, region classes.
            stride: the common stride.
            image: height and width that the network saw, without padding.
            output: height and width of the result.
        """
        threshold = self.inference_options.mask_threshold
        instances = Instances(output)
        instances.pred_masks, boxes = output_masks(things.probabilities, threshold, stride, image, output)
        instances.pred_boxes = Boxes(boxes)
        instances.scores = things.scores
        instances.pred_classes = things.classes
        first = 0 if self.target_options.with_things else 1
        stuff = stuff._replace(classes=stuff.classes + first)
        sem_seg, labels = semantic_map(stuff, self.target_options.num_regions + first, stride, image, output)
        result: dict[str, Any] = {"sem_seg": sem_seg, "instances": instances}
        if self.combine:
            result["panoptic_seg"] = self._combine(instances, labels)
        return result

    def _combine(self, instances: Instances, labels: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        if self.region_labels is not None:
            labels = labels.new_tensor(self.region_labels)[labels]
        return panoptic_merge(
            instances.pred_masks,
            instances.scores,
            instances.pred_classes,
            labels,
            things_label=0,
            **self.combine_options,
        )


def _options(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.PANOPTIC_FCN
    average: Literal["map", "region"] = node.STUFF.KERNEL_AVERAGE
    return {
        "target_options": TargetOptions(
            num_classes=node.NUM_CLASSES,
            num_regions=node.STUFF.NUM_CLASSES,
            with_things=node.STUFF.WITH_THINGS,
            center=node.TARGETS.CENTER,
            min_overlap=node.TARGETS.MIN_OVERLAP,
            gaussian_sigma=node.TARGETS.GAUSSIAN_SIGMA,
            scales=tuple((least, greatest) for least, greatest in node.TARGETS.SCALES),
            ignored_as_negative=node.TARGETS.IGNORED_AS_NEGATIVE,
        ),
        "loss_options": LossOptions(
            position_weight=node.LOSSES.POSITION_WEIGHT,
            region_weight=node.LOSSES.REGION_WEIGHT,
            segment_weight=node.LOSSES.SEGMENT_WEIGHT,
            focal_alpha=node.LOSSES.FOCAL_ALPHA,
            focal_gamma=node.LOSSES.FOCAL_GAMMA,
            num_kernels=node.NUM_KERNELS,
            kernel_average=average,
        ),
        "inference_options": InferenceOptions(
            thing_threshold=node.INFERENCE.THING_THRESH,
            stuff_threshold=node.INFERENCE.STUFF_THRESH,
            top_num=node.INFERENCE.TOP_NUM,
            similar_threshold=node.INFERENCE.SIMILAR_THRESH,
            class_specific=node.INFERENCE.CLASS_SPECIFIC,
            mask_threshold=node.INFERENCE.MASK_THRESH,
            mask_score_threshold=node.INFERENCE.MASK_SCORE_THRESH,
            matrix_nms=node.INFERENCE.MATRIX_NMS,
            kernel_average=average,
        ),
    }


def _size(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
