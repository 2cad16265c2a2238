"""The meta-architecture: what has to happen at the size of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances

from convmask.inference.stages import register_stages

from .augmentation import AugmentationOptions, augmented_predictions
from .inference import RoiPredictions, detect, drop_small, paste, rescale

Size = tuple[int, int]


@register_stages(
    heads=("proposal_generator", "roi_heads.head", "roi_heads.predict"),
    compiled=("backbone", "proposal_generator.rpn_head", "roi_heads.head"),
)
@META_ARCH_REGISTRY.register()
class FCIS(GeneralizedRCNN):
    """Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017, arXiv 1611.07709).

    Detectron2's two-stage detector with voting and pasting at the size of the output. Its RoI heads must be
    ``FCISROIHeads``.
    """

    @configurable
    def __init__(self, *, augmentation: AugmentationOptions | None = None, **kwargs: Any) -> None:
        """As Detectron2's ``GeneralizedRCNN``.

        Args:
            augmentation: at test time; None for none.
            kwargs: of ``GeneralizedRCNN``.
        """
        super().__init__(**kwargs)
        self.augmentation = augmentation

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        if cfg.MODEL.ROI_HEADS.NAME != "FCISROIHeads":
            raise ValueError(f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}: FCIS needs 'FCISROIHeads'")
        if "instances" not in cfg.INPUT.TARGETS:
            raise ValueError("FCIS needs 'instances' in INPUT.TARGETS")
        augmentation = None
        if cfg.TEST.AUG.ENABLED:
            augmentation = AugmentationOptions(tuple(cfg.TEST.AUG.MIN_SIZES), cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP)
        return {**super().from_config(cfg), "augmentation": augmentation}

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Detectron2's, with the attribute ``scales``: for each image the pixels of the input a pixel of the original.

        Sizes that are not in the inputs give the scale 1.
        """
        images = super().preprocess_image(batched_inputs)
        images.scales = [
            max(size[0] / inputs.get("height", size[0]), size[1] / inputs.get("width", size[1]))
            for inputs, size in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        return images

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """One dict an image, ``instances`` with boxes and masks at the size of the output, as Detectron2's.

        Args:
            batched_inputs: as Detectron2's.
            detected_instances: boxes to cut masks for; then all is Detectron2's own.
            do_postprocess: False gives ``Instances`` at the size of the input, with masks (n, 1, P, P).
        """
        if detected_instances is not None or not do_postprocess:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        results = []
        with torch.no_grad():
            for inputs, predictions in zip(batched_inputs, self.predictions(batched_inputs), strict=True):
                size = _output_size(inputs)
                options = self.roi_heads.inference_options
                found = detect(predictions, size, options, self.roi_heads.convention)
                results.append({"instances": paste(found, options, self.roi_heads.convention)})
        return results

    def predictions(self, batched_inputs: Sequence[dict[str, Any]]) -> list[RoiPredictions]:
        """RoIs of each image, all that vote, in pixels of the output."""
        if self.augmentation is not None:
            offset = self.roi_heads.convention.offset
            return [augmented_predictions(self.predict_input, x, self.augmentation, offset) for x in batched_inputs]
        return self.predict_input(list(batched_inputs))

    def predict_input(self, batched_inputs: list[dict[str, Any]]) -> list[RoiPredictions]:
        """:meth:`predictions` of the images as they are given."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        heads = self.roi_heads
        proposals, _ = self.proposal_generator(images, features, None)
        maps = [heads.head(features[name]) for name in heads.in_features]
        results = []
        for inputs, size, found in zip(batched_inputs, images.image_sizes, heads.predict(maps, proposals), strict=True):
            found = drop_small(found, heads.inference_options.min_size, heads.convention)
            found = replace(found, boxes=found.boxes.float())
            results.append(rescale(found, (int(size[0]), int(size[1])), _output_size(inputs), heads.convention))
        return results


def _output_size(inputs: dict[str, Any]) -> Size:
    height, width = inputs["image"].shape[-2:]
    return inputs.get("height", height), inputs.get("width", width)
