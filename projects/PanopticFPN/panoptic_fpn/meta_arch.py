"""The meta-architecture: Mask R-CNN and Semantic FPN on one pyramid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
    build_sem_seg_head,
)
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from convmask.inference import panoptic_segmentation
from convmask.inference.stages import register_stages

from .checks import TRAININGS, check_config
from .classes import stuff_labels
from .grouped_fpn import group_output_convs, half_shapes, split_features
from .heads import PanopticFPNSemSegHead
from .losses import scaled, with_zero_gradients

Features = Mapping[str, torch.Tensor]
Losses = dict[str, torch.Tensor]


@register_stages(
    heads=("proposal_generator", "roi_heads", "sem_seg_head.layers"),
    # the suppression of boxes lies between the layers of the box head and those of the mask head
    postprocess=("roi_heads.box_predictor.inference",),
    compiled=(
        "backbone",
        "sem_seg_head.layers",
        "proposal_generator.rpn_head",
        "roi_heads.box_head",
        "roi_heads.mask_head.layers",
    ),
)
@META_ARCH_REGISTRY.register()
class ConvMaskPanopticFPN(GeneralizedRCNN):
    """Panoptic FPN with the variants of the paper; with default options equal to Detectron2's ``PanopticFPN``.

    Without a semantic head it is Mask R-CNN, without RoI heads Semantic FPN.
    """

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module | None,
        training: str = "combined",
        instance_task_weight: float = 1.0,
        box_mask_weight: float = 1.0,
        grouped_fpn: bool = False,
        combine: bool = True,
        combine_overlap_threshold: float = 0.5,
        combine_stuff_area_limit: int = 4096,
        combine_score_threshold: float = 0.5,
        stuff_labels: Sequence[int] | None = None,
        **detector: Any,
    ) -> None:
        """Takes the parts.

        Args:
            sem_seg_head: with Detectron2's interface; None for instances only.
            training: "combined" or "alternating": see :meth:`trained_tasks`.
            instance_task_weight: factor of every loss of the instance branch.
            box_mask_weight: one more factor of the losses of box regression and masks.
            grouped_fpn: the first half of the FPN's channels feeds the instance branch, the second half the semantic
                one.
            combine: results have ``panoptic_seg``.
            combine_overlap_threshold: see :func:`panoptic_segmentation`, as are the next two and ``stuff_labels``.
            combine_stuff_area_limit: in pixels of the output.
            combine_score_threshold: of instances.
            stuff_labels: None where label 0 is "things" and the others are stuff.
            detector: arguments of :class:`GeneralizedRCNN`; ``roi_heads`` None for Semantic FPN alone.

        Raises:
            ValueError: an unknown ``training``.
        """
        super().__init__(**detector)
        if training not in TRAININGS:
            raise ValueError(f"training is {training!r}, not one of {', '.join(TRAININGS)}")
        self.sem_seg_head = sem_seg_head
        self.alternating = training == "alternating"
        self.instance_task_weight = instance_task_weight
        self.box_mask_weight = box_mask_weight
        self.grouped_fpn = grouped_fpn
        self.combine = combine and sem_seg_head is not None and self.roi_heads is not None
        self.combine_options: dict[str, Any] = {
            "overlap_threshold": combine_overlap_threshold,
            "stuff_area_limit": combine_stuff_area_limit,
            "score_threshold": combine_score_threshold,
            "stuff_labels": stuff_labels,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        check_config(cfg)
        node = cfg.MODEL.PANOPTIC_FPN
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        if node.GROUPED_FPN:
            group_output_convs(backbone)
            shape = half_shapes(shape)
        has_instances, has_semantic = node.TASK != "semantic", node.TASK != "instance"
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shape) if has_instances else None,
            "roi_heads": build_roi_heads(cfg, shape) if has_instances else None,
            "sem_seg_head": _build_semantic_head(cfg, shape) if has_semantic else None,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "training": node.TRAINING,
            "instance_task_weight": node.INSTANCE_TASK_WEIGHT,
            "box_mask_weight": node.INSTANCE_LOSS_WEIGHT,
            "grouped_fpn": node.GROUPED_FPN,
            "combine": node.COMBINE.ENABLED,
            "combine_overlap_threshold": node.COMBINE.OVERLAP_THRESH,
            "combine_stuff_area_limit": node.COMBINE.STUFF_AREA_LIMIT,
            "combine_score_threshold": node.COMBINE.INSTANCES_CONFIDENCE_THRESH,
            "stuff_labels": stuff_labels(cfg) if node.TASK == "panoptic" else None,
        }

    def trained_tasks(self) -> tuple[str, ...]:
        """What this iteration trains: the branches there are, or, alternating, "instance" when the iteration is even.

        The iteration is the event storage's, so that all processes agree and a resumed run goes on where it was.
        """
        if self.alternating:
            return ("semantic",) if get_event_storage().iter % 2 else ("instance",)
        parts = {"semantic": self.sem_seg_head, "instance": self.roi_heads}
        return tuple(name for name, part in parts.items() if part is not None)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses by name in training; otherwise see :meth:`inference`.

        Args:
            batched_inputs: of each image Detectron2's dict: ``image`` (C, H, W); for training ``instances`` and
                ``sem_seg`` (H, W) int64, as far as the branches need them; ``height`` and ``width`` of the output.

        Raises:
            ValueError: training without the targets of a branch.
        """
        if not self.training:
            return self.inference(batched_inputs)
        tasks = self.trained_tasks()
        images = self.preprocess_image(batched_inputs)
        instance_features, semantic_features = self._branch_features(self.backbone(images.tensor))
        losses: Losses = {}
        if "semantic" in tasks:
            losses.update(self._semantic_losses(images, semantic_features, batched_inputs))
        if "instance" in tasks:
            losses.update(self._instance_losses(images, instance_features, batched_inputs))
        if self.alternating:
            idle = [self.proposal_generator, self.roi_heads] if "semantic" in tasks else [self.sem_seg_head]
            losses = with_zero_gradients(losses, [part for part in idle if part is not None])
        return losses

    def inference(
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> list[dict[str, Any]] | tuple[list[Instances] | None, list[torch.Tensor] | None]:
        """Predictions, one dict an image: ``instances``, ``sem_seg`` logits (C, H, W) and ``panoptic_seg`` as
        Detectron2's.

        Keys are there as far as the branches are. Without ``do_postprocess``: raw instances and logits at the size of
        the padded images, each None where there is no such branch.
        """
        images = self.preprocess_image(batched_inputs)
        instance_features, semantic_features = self._branch_features(self.backbone(images.tensor))
        instances = self._detect(images, instance_features, batched_inputs)
        semantic = self._semantic_maps(semantic_features)
        if not do_postprocess:
            return instances, None if semantic is None else list(semantic)
        results = []
        for index, (inputs, size) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            height, width = inputs.get("height", size[0]), inputs.get("width", size[1])
            result: dict[str, Any] = {}
            if semantic is not None:
                result["sem_seg"] = sem_seg_postprocess(next(semantic), size, height, width)
            if instances is not None:
                result["instances"] = detector_postprocess(instances[index], height, width)
            if self.combine:
                result["panoptic_seg"] = panoptic_segmentation(
                    result["instances"], result["sem_seg"], **self.combine_options
                )
            results.append(result)
        return results

    def _branch_features(self, features: Features) -> tuple[Features, Features]:
        return split_features(features) if self.grouped_fpn else (features, features)

    def _semantic_losses(self, images: ImageList, features: Features, batched_inputs: list[dict[str, Any]]) -> Losses:
        assert self.sem_seg_head is not None
        height, width = images.tensor.shape[-2:]
        ignore_value = self.sem_seg_head.ignore_value
        targets = [x.to(self.device) for x in _targets(batched_inputs, "sem_seg")]
        padded = [F.pad(x, (0, width - x.shape[1], 0, height - x.shape[0]), value=ignore_value) for x in targets]
        return self.sem_seg_head(features, torch.stack(padded))[1]

    def _instance_losses(self, images: ImageList, features: Features, batched_inputs: list[dict[str, Any]]) -> Losses:
        assert self.roi_heads is not None
        targets = [x.to(self.device) for x in _targets(batched_inputs, "instances")]
        proposals, losses = self._proposals(images, features, batched_inputs, targets)
        _, roi_losses = self.roi_heads(images, features, proposals, targets)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        roi_losses = scaled(roi_losses, self.box_mask_weight, ("loss_box_reg", "loss_mask"))
        return scaled({**losses, **roi_losses}, self.instance_task_weight)

    def _detect(
        self, images: ImageList, features: Features, batched_inputs: list[dict[str, Any]]
    ) -> list[Instances] | None:
        if self.roi_heads is None:
            return None
        proposals, _ = self._proposals(images, features, batched_inputs, None)
        return self.roi_heads(images, features, proposals, None)[0]

    def _proposals(
        self,
        images: ImageList,
        features: Features,
        batched_inputs: list[dict[str, Any]],
        targets: list[Instances] | None,
    ) -> tuple[list[Instances], Losses]:
        if self.proposal_generator is None:
            return [x.to(self.device) for x in _targets(batched_inputs, "proposals")], {}
        return self.proposal_generator(images, features, targets)

    def _semantic_maps(self, features: Features) -> Iterator[torch.Tensor] | None:
        """Logits (C, H, W) at the size of the padded images, one image after the other to save memory."""
        head = self.sem_seg_head
        if head is None:
            return None
        if isinstance(head, PanopticFPNSemSegHead):
            return (head.upsample(logits)[0] for logits in head.layers(features).split(1))
        return iter(head(features, None)[0])


def _build_semantic_head(cfg: CfgNode, shape: Mapping[str, Any]) -> nn.Module:
    if cfg.MODEL.SEM_SEG_HEAD.NAME == "SemSegFPNHead":
        # Detectron2's configs name its own head, of which ours is a superset
        return PanopticFPNSemSegHead(cfg, shape)
    return build_sem_seg_head(cfg, shape)


def _targets(batched_inputs: list[dict[str, Any]], key: str) -> list[Any]:
    for inputs in batched_inputs:
        if key not in inputs:
            raise ValueError(
                f"ConvMaskPanopticFPN: no {key!r} for image {inputs.get('file_name', '')!r}: "
                "check MODEL.PANOPTIC_FPN.TASK against INPUT.TARGETS and the dataset"
            )
    return [inputs[key] for inputs in batched_inputs]
