"""FCOS as a detector of its own: the meta-architecture ``ConvMaskFCOS``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from torch import nn

from convmask.inference.stages import register_stages

from .classes import check_fcos_config
from .fcos_head import FCOSHead, FCOSOutputs
from .fcos_inference import FCOSInferenceOptions, detect, to_instances
from .fcos_losses import FCOSLossOptions, fcos_losses
from .fcos_targets import Locations, TargetOptions, instances_of, make_locations, make_targets

RELEASE_MEAN = (102.9801, 115.9465, 122.7717)


@register_stages(heads=("fcos_head",), compiled=("backbone", "fcos_head"))
@META_ARCH_REGISTRY.register()
class ConvMaskFCOS(nn.Module):
    """FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., ICCV 2019, arXiv 1904.01355).

    With the improvements of its release: centre sampling, GIoU, centerness on the box tower, normalised distances.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        fcos_head: FCOSHead,
        in_features: Sequence[str],
        target_options: TargetOptions,
        fcos_loss_options: FCOSLossOptions | None = None,
        fcos_inference_options: FCOSInferenceOptions | None = None,
        pixel_mean: Sequence[float] = RELEASE_MEAN,
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        input_format: str = "BGR",
    ) -> None:
        """Takes the parts.

        Args:
            backbone: with the levels of ``in_features``.
            fcos_head: see :class:`FCOSHead`.
            in_features: levels, finest first.
            target_options: see :class:`TargetOptions`.
            fcos_loss_options: see :class:`FCOSLossOptions`.
            fcos_inference_options: see :class:`FCOSInferenceOptions`.
            pixel_mean: one a channel of the input. The default is the release's.
            pixel_std: one a channel.
            input_format: order of the channels.
        """
        super().__init__()
        self.backbone = backbone
        self.fcos_head = fcos_head
        self.in_features = list(in_features)
        self.target_options = target_options
        self.fcos_loss_options = fcos_loss_options or FCOSLossOptions()
        self.fcos_inference_options = fcos_inference_options or FCOSInferenceOptions()
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        node = cfg.MODEL.EMBED_MASK
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        check_fcos_config(cfg, shape)
        strides = [shape[name].stride for name in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "fcos_head": FCOSHead(cfg, shape[node.IN_FEATURES[0]].channels, strides),
            "in_features": node.IN_FEATURES,
            "target_options": TargetOptions(
                num_classes=node.NUM_CLASSES,
                sizes_of_interest=tuple(node.FCOS.SIZES_OF_INTEREST),
                center_radius=node.FCOS.CENTER_RADIUS,
                sample_in_mask=node.FCOS.SAMPLE_IN_MASK,
                inclusive=node.FCOS.INCLUSIVE_BOXES,
            ),
            "fcos_loss_options": FCOSLossOptions(
                box_loss=node.FCOS.BOX_LOSS, focal_alpha=node.FCOS.FOCAL_ALPHA, focal_gamma=node.FCOS.FOCAL_GAMMA
            ),
            "fcos_inference_options": FCOSInferenceOptions(
                score_threshold=node.INFERENCE.SCORE_THRESH,
                pre_nms_topk=node.INFERENCE.PRE_NMS_TOPK,
                nms_threshold=node.INFERENCE.NMS_THRESH,
                detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                inclusive=node.FCOS.INCLUSIVE_BOXES,
            ),
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

    def locations(self, outputs: FCOSOutputs) -> Locations:
        """Those of the levels of ``outputs``."""
        return make_locations(outputs.sizes(), self.fcos_head.strides, self.device)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses by name in training; otherwise one dict an image with ``instances``, sorted by score.

        Args:
            batched_inputs: of each image Detectron2's dict: ``image`` (C, H, W); for training ``instances``;
                ``height`` and ``width`` of the output.

        Raises:
            ValueError: training without targets, or with a class that the model does not have.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        outputs = self.fcos_head([features[name] for name in self.in_features]).float()
        locations = self.locations(outputs)
        if self.training:
            targets = make_targets(instances_of(batched_inputs, self.device), locations, self.target_options)
            with torch.autocast(self.device.type, enabled=False):
                return fcos_losses(outputs, targets, self.fcos_loss_options)
        with torch.no_grad():
            found = detect(outputs, locations, images.image_sizes, self.fcos_inference_options)
        results = []
        for inputs, detections, size in zip(batched_inputs, found, images.image_sizes, strict=True):
            output = inputs.get("height", size[0]), inputs.get("width", size[1])
            instances = to_instances(detections, size, output, self.fcos_inference_options.inclusive)
            results.append({"instances": instances})
        return results
