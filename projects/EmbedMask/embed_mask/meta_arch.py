"""The meta-architecture: FCOS, whose boxes are filled with the pixels that are near to them in an embedding space."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from convmask.inference.stages import register_stages

from .classes import check_embed_mask_config
from .fcos import ConvMaskFCOS
from .fcos_head import FCOSOutputs
from .fcos_inference import Detections, detect, to_instances
from .fcos_losses import fcos_losses
from .fcos_targets import FCOSTargets, Locations, decode, instances_of, make_targets
from .heads import EmbeddingHead, EmbeddingOutputs, enlarge
from .inference import MaskOptions, masks_in_boxes, output_masks
from .losses import MaskLossOptions, embedding_losses
from .targets import Positives, select_positives


@register_stages(heads=("heads",), compiled=("backbone", "heads"))
@META_ARCH_REGISTRY.register()
class EmbedMask(ConvMaskFCOS):
    """EmbedMask: Embedding Coupling for Instance Segmentation (Ying et al., arXiv 1912.01954; IJCAI 2021)."""

    @configurable
    def __init__(
        self,
        *,
        embedding_head: EmbeddingHead,
        pixel_feature: str = "p3",
        scale_factor: int = 2,
        mask_loss_options: MaskLossOptions | None = None,
        mask_options: MaskOptions | None = None,
        **fcos: Any,
    ) -> None:
        """Takes the parts.

        Args:
            embedding_head: see :class:`EmbeddingHead`.
            pixel_feature: level of the pixel embedding.
            scale_factor: by which it is enlarged.
            mask_loss_options: see :class:`MaskLossOptions`.
            mask_options: see :class:`MaskOptions`.
            fcos: see :class:`ConvMaskFCOS`.
        """
        super().__init__(**fcos)
        self.embedding_head = embedding_head
        self.pixel_feature = pixel_feature
        self.scale_factor = scale_factor
        self.mask_stride = embedding_head.pixel_stride // scale_factor
        self.mask_loss_options = mask_loss_options or MaskLossOptions(scale_factor=scale_factor)
        self.mask_options = mask_options or MaskOptions()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        parts = super().from_config(cfg)
        node = cfg.MODEL.EMBED_MASK
        shape = parts["backbone"].output_shape()
        check_embed_mask_config(cfg, shape)
        pixel_level = shape[node.PIXELS.IN_FEATURE]
        head = EmbeddingHead(
            cfg,
            shape[node.IN_FEATURES[0]].channels,
            parts["fcos_head"].strides,
            pixel_level.channels,
            pixel_level.stride,
        )
        fixed = head.prior_margin if node.MARGIN.FIXED else None
        training = node.TRAINING
        return {
            **parts,
            "embedding_head": head,
            "pixel_feature": node.PIXELS.IN_FEATURE,
            "scale_factor": node.PIXELS.SCALE_FACTOR,
            "mask_loss_options": MaskLossOptions(
                proposals=training.PROPOSALS,
                positive_iou=training.POSITIVE_IOU,
                box_padding=training.BOX_PADDING,
                mask_loss=training.MASK_LOSS,
                mask_weight=training.MASK_WEIGHT,
                mask_normalizer=training.MASK_NORMALIZER,
                probability_floor=training.PROBABILITY_FLOOR,
                smooth_weight=training.SMOOTH_WEIGHT,
                scale_factor=node.PIXELS.SCALE_FACTOR,
                fixed_margin=fixed,
            ),
            "mask_options": MaskOptions(
                threshold=node.INFERENCE.MASK_THRESH,
                values=node.INFERENCE.MASK_VALUES,
                cells=node.INFERENCE.MASK_CELLS,
                fixed_margin=fixed,
            ),
        }

    def predict(self, images: torch.Tensor) -> tuple[FCOSOutputs, EmbeddingOutputs]:
        """Head outputs of (N, 3, H, W) normalised images, in single precision."""
        return self.heads(self.backbone(images))

    def heads(self, features: dict[str, torch.Tensor]) -> tuple[FCOSOutputs, EmbeddingOutputs]:
        """:meth:`predict` from the backbone's features by level."""
        outputs = self.fcos_head([features[name] for name in self.in_features])
        embeddings = self.embedding_head(outputs, features[self.pixel_feature])
        return outputs.float(), embeddings.float()

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses by name in training; otherwise one dict an image with ``instances``, sorted by score.

        Args:
            batched_inputs: see :class:`ConvMaskFCOS`; in training ``instances`` have masks.

        Raises:
            ValueError: see :class:`ConvMaskFCOS`; or there are boxes alone.
        """
        images = self.preprocess_image(batched_inputs)
        outputs, embeddings = self.predict(images.tensor)
        locations = self.locations(outputs)
        with torch.autocast(self.device.type, enabled=False):
            if self.training:
                return self.losses(outputs, embeddings, locations, batched_inputs)
            return self.inference(outputs, embeddings, locations, batched_inputs, images.image_sizes)

    def losses(
        self,
        outputs: FCOSOutputs,
        embeddings: EmbeddingOutputs,
        locations: Locations,
        batched_inputs: list[dict[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """The losses of FCOS, ``loss_mask`` and, where it has a weight, ``loss_smooth``."""
        instances = instances_of(batched_inputs, self.device)
        for x, inputs in zip(instances, batched_inputs, strict=True):
            if len(x) and not x.has("gt_masks"):
                raise ValueError(f"EmbedMask: image {inputs.get('file_name', '')!r} has boxes without masks")
        targets = make_targets(instances, locations, self.target_options)
        mask = embedding_losses(
            embeddings,
            self.positives(outputs, targets, locations),
            instances,
            targets.boxes,
            stride=self.mask_stride,
            options=self.mask_loss_options,
        )
        return {**fcos_losses(outputs, targets, self.fcos_loss_options), **mask}

    def positives(self, outputs: FCOSOutputs, targets: FCOSTargets, locations: Locations) -> list[Positives]:
        """The locations that stand for the objects of each image."""
        predicted = decode(locations.points, outputs.pixel_distances().detach())
        return [
            select_positives(
                targets.objects[index],
                predicted[index],
                boxes,
                proposals=self.mask_loss_options.proposals,
                threshold=self.mask_loss_options.positive_iou,
                inclusive=self.target_options.inclusive,
            )
            for index, boxes in enumerate(targets.boxes)
        ]

    @torch.no_grad()
    def inference(
        self,
        outputs: FCOSOutputs,
        embeddings: EmbeddingOutputs,
        locations: Locations,
        batched_inputs: list[dict[str, Any]],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Instances of each image at the size of its output."""
        found = detect(outputs, locations, image_sizes, self.fcos_inference_options)
        pixels = enlarge(embeddings.pixels, self.scale_factor)
        proposals, margins = embeddings.flat_proposals(), embeddings.flat_margins()
        results = []
        for index, (inputs, detections, image) in enumerate(zip(batched_inputs, found, image_sizes, strict=True)):
            output = inputs.get("height", image[0]), inputs.get("width", image[1])
            instances = to_instances(detections, image, output, self.fcos_inference_options.inclusive)
            instances.pred_masks = self.masks(
                pixels[index], proposals[index], margins[index], detections, image, output
            )
            results.append({"instances": instances})
        return results

    def masks(
        self,
        pixels: torch.Tensor,
        proposals: torch.Tensor,
        margins: torch.Tensor,
        detections: Detections,
        image: tuple[int, int],
        output: tuple[int, int],
    ) -> torch.Tensor:
        """(n, H, W) bool masks of the detections of an image.

        Args:
            pixels: (D, h, w) at the stride of the masks.
            proposals: (L, D) of all locations.
            margins: (L, M) of all locations.
            detections: each has the proposal and the margin of its location.
            image: height and width that the network saw, without padding.
            output: (H, W).
        """
        chosen = detections.locations
        inside = masks_in_boxes(
            pixels, proposals[chosen], margins[chosen], detections.boxes, self.mask_stride, self.mask_options
        )
        size = (pixels.shape[1], pixels.shape[2])
        return output_masks(inside, size, self.mask_stride, image, output, self.mask_options)
