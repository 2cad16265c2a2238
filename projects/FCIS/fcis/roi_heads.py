"""FCIS's part behind the proposals, as Detectron2's RoI heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from .boxes import clip, decode, from_detectron, to_detectron
from .convention import MXNET, Convention, convention_named
from .heads import Maps, PositionSensitiveHead, RoiOutputs
from .inference import PASTES, InferenceOptions, RoiPredictions, detect, drop_small
from .losses import LossOptions, fcis_losses
from .targets import RoiTargets, SamplingOptions, choose_and_make_targets


@ROI_HEADS_REGISTRY.register()
class FCISROIHeads(ROIHeads):
    """Position-sensitive maps, assembly, joint classes and masks; also in a plain ``GeneralizedRCNN``.

    There results are voted on at the size of the input, and Detectron2 pastes them (at probability 0.5). The
    meta-architecture ``FCIS`` does both at the size of the original image, as the release does.
    """

    @configurable
    def __init__(
        self,
        *,
        head: PositionSensitiveHead,
        in_features: Sequence[str],
        strides: Sequence[int],
        convention: Convention = MXNET,
        sampling_options: SamplingOptions | None = None,
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        canonical_size: int = 224,
        canonical_level: int = 4,
        **kwargs: Any,
    ) -> None:
        """Takes the parts.

        Args:
            head: the maps and what RoIs read from them, one for all levels.
            in_features: levels, finest first.
            strides: of the levels, in pixels.
            convention: of boxes and pooling.
            sampling_options: see :class:`SamplingOptions`.
            loss_options: see :class:`LossOptions`.
            inference_options: see :class:`InferenceOptions`.
            canonical_size: see ``MODEL.FCIS.CANONICAL_SIZE``.
            canonical_level: see ``MODEL.FCIS.CANONICAL_LEVEL``.
            kwargs: of Detectron2's ROIHeads.
        """
        super().__init__(**kwargs)
        self.head = head
        self.in_features, self.strides = list(in_features), list(strides)
        self.convention = convention
        self.sampling_options = sampling_options or SamplingOptions()
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        self.canonical_size, self.canonical_level = canonical_size, canonical_level

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: keys that contradict each other; the message names them.
        """
        convention = convention_named(cfg.MODEL.FCIS.CONVENTION)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        absent = [name for name in names if name not in input_shape]
        if absent or not names:
            raise ValueError(
                f"MODEL.ROI_HEADS.IN_FEATURES is {list(names)}, but {cfg.MODEL.BACKBONE.NAME} gives "
                f"{sorted(input_shape)}"
            )
        channels = {input_shape[name].channels for name in names}
        if len(channels) > 1:
            raise ValueError(f"MODEL.ROI_HEADS.IN_FEATURES: the levels {list(names)} have different widths")
        return {
            **super().from_config(cfg),
            "head": PositionSensitiveHead(cfg, channels.pop()),
            "in_features": names,
            "strides": [input_shape[name].stride for name in names],
            "convention": convention,
            "sampling_options": _sampling_options(cfg),
            "loss_options": _loss_options(cfg, convention),
            "inference_options": inference_options(cfg),
            "canonical_size": cfg.MODEL.FCIS.CANONICAL_SIZE,
            "canonical_level": cfg.MODEL.FCIS.CANONICAL_LEVEL,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Losses in training; otherwise instances with masks (n, 1, P, P) at the size of the input.

        Args:
            images: the batch.
            features: by level.
            proposals: of each image, ``proposal_boxes``.
            targets: in training, ``gt_boxes``, ``gt_classes`` and ``gt_masks`` (BitMasks).
        """
        maps = [self.head(features[name]) for name in self.in_features]
        if self.training:
            assert targets is not None, "FCISROIHeads requires targets in training!"
            return proposals, self.losses(maps, self.make_targets(proposals, targets))
        options = self.inference_options
        results = []
        for found, size in zip(self.predict(maps, proposals), images.image_sizes, strict=True):
            found = drop_small(found, options.min_size, self.convention)
            results.append(detect(found, (int(size[0]), int(size[1])), options, self.convention))
        return results, {}

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Adds ``pred_masks`` (n, 1, P, P) for given ``pred_boxes`` and ``pred_classes``."""
        maps = [self.head(features[name]) for name in self.in_features]
        boxes = [from_detectron(x.pred_boxes.tensor, self.convention) for x in instances]
        labels = torch.cat([x.pred_classes for x in instances]) + 1
        masks = self.read(maps, boxes, labels).masks.float().softmax(dim=1)[:, 1:]
        for found, mask in zip(instances, masks.split([len(x) for x in instances]), strict=True):
            found.pred_masks = mask
        return instances

    @torch.no_grad()
    def make_targets(self, proposals: Sequence[Instances], targets: Sequence[Instances]) -> list[RoiTargets]:
        """Chooses RoIs among the proposals and the objects' boxes, and makes their targets, for each image."""
        made = []
        for found, truth in zip(proposals, targets, strict=True):
            boxes = from_detectron(truth.gt_boxes.tensor, self.convention)
            candidates = from_detectron(found.proposal_boxes.tensor, self.convention)
            if self.proposal_append_gt:
                candidates = torch.cat([candidates, boxes])
            # Detectron2's mappers leave the masks of an image without instances out
            masks = truth.gt_masks.tensor if len(truth) else boxes.new_zeros(0, 1, 1)
            arguments = candidates, boxes, truth.gt_classes + 1, masks
            made.append(choose_and_make_targets(*arguments, self.sampling_options, self.convention))
        storage = get_event_storage()
        positive = sum(int((target.labels > 0).sum()) for target in made)
        storage.put_scalar("roi_head/num_fg_samples", positive / len(made))
        return made

    def losses(self, maps: Sequence[Maps], targets: Sequence[RoiTargets]) -> dict[str, torch.Tensor]:
        """The losses of a batch by the maps of the levels and the targets of the images."""
        # an ignored RoI has no class: background's masks stand in, and their loss is not counted
        labels = torch.cat([target.labels for target in targets]).clamp(min=0)
        outputs = self.read(maps, [target.rois for target in targets], labels)
        counts = [len(target.labels) for target in targets]
        parts = zip(*(part.split(counts) for part in outputs), strict=True)
        return fcis_losses([RoiOutputs(*part) for part in parts], targets, self.loss_options)

    def predict(self, maps: Sequence[Maps], proposals: Sequence[Instances]) -> list[RoiPredictions]:
        """All rounds' boxes, probabilities and masks of each image; the second round's after the first's."""
        boxes = [from_detectron(x.proposal_boxes.tensor, self.convention) for x in proposals]
        sizes = [(int(x.image_size[0]), int(x.image_size[1])) for x in proposals]
        rounds = []
        for number in range(self.inference_options.rounds):
            outputs = self.read(maps, boxes, None)
            counts = [len(box) for box in boxes]
            probabilities = outputs.scores.float().softmax(dim=1).split(counts)
            masks = outputs.masks.float().softmax(dim=1)[:, 1].split(counts)
            rounds.append([RoiPredictions(*part) for part in zip(boxes, probabilities, masks, strict=True)])
            if number + 1 < self.inference_options.rounds:
                deltas = (outputs.deltas.float() * outputs.deltas.new_tensor(self.sampling_options.deviations)).split(
                    counts
                )
                boxes = [
                    clip(decode(box, delta, self.convention), size, self.convention)
                    for box, delta, size in zip(boxes, deltas, sizes, strict=True)
                ]
        return [
            RoiPredictions(
                torch.cat([part.boxes for part in parts]),
                torch.cat([part.probabilities for part in parts]),
                torch.cat([part.masks for part in parts]),
            )
            for parts in zip(*rounds, strict=True)
        ]

    def read(self, maps: Sequence[Maps], boxes: Sequence[torch.Tensor], labels: torch.Tensor | None) -> RoiOutputs:
        """What the RoIs of a batch read, each from the level of its size.

        Args:
            maps: of each level.
            boxes: (R_i, 4) of each image, by the convention.
            labels: (R,) classes of the masks, or None for the best.
        """
        index = [box.new_full((len(box), 1), number) for number, box in enumerate(boxes)]
        rois = torch.cat([torch.cat(pair, dim=1) for pair in zip(index, boxes, strict=True)]).detach()
        options: dict[str, Any] = {"rounded": self.convention.rounded, "first_class": self.convention.first_mask_class}
        if len(maps) == 1:
            return self.head.read(maps[0], rois, labels, spatial_scale=1 / self.strides[0], **options)
        levels = self._levels(rois[:, 1:])
        parts, order = [], []
        for level, (level_maps, stride) in enumerate(zip(maps, self.strides, strict=True)):
            members = (levels == level).nonzero()[:, 0]
            chosen = None if labels is None else labels[members]
            parts.append(self.head.read(level_maps, rois[members], chosen, spatial_scale=1 / stride, **options))
            order.append(members)
        back = torch.argsort(torch.cat(order))
        return RoiOutputs(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))

    def _levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """(R,) the level of each box (FPN, arXiv 1612.03144, equation 1)."""
        least, most = (stride.bit_length() - 1 for stride in (self.strides[0], self.strides[-1]))
        found = [Boxes(to_detectron(boxes, self.convention))]
        return assign_boxes_to_levels(found, least, most, self.canonical_size, self.canonical_level)


def _deviations(cfg: CfgNode) -> tuple[float, float, float, float]:
    x, y, w, h = (1 / weight for weight in cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    return x, y, w, h


def _sampling_options(cfg: CfgNode) -> SamplingOptions:
    node = cfg.MODEL.FCIS
    return SamplingOptions(
        number=cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
        positive_fraction=cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION,
        positive_iou=cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[-1],
        background_low=node.SAMPLING.BACKGROUND_LOW,
        fill_from_all=node.SAMPLING.FILL_FROM_ALL,
        ignore_filled=node.SAMPLING.IGNORE_FILLED,
        mask_threshold=node.LOSSES.MASK_TARGET_THRESH,
        mask_size=node.MASK_SIZE,
        deviations=_deviations(cfg),
    )


def _loss_options(cfg: CfgNode, convention: Convention) -> LossOptions:
    node = cfg.MODEL.FCIS
    hard = node.OHEM.NUM_ROIS if node.OHEM.ENABLED else None
    number = hard if hard is not None else cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    return LossOptions(
        class_weight=node.LOSSES.CLASS_WEIGHT,
        mask_weight=node.LOSSES.MASK_WEIGHT,
        box_weight=node.LOSSES.BOX_WEIGHT,
        box_beta=cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA,
        hard_rois=hard,
        normalizer=number if convention.fixed_normalizer and number > 0 else None,
    )


def inference_options(cfg: CfgNode) -> InferenceOptions:
    """The options by the config.

    Raises:
        ValueError: a key has a value that is none of those it may have.
    """
    node = cfg.MODEL.FCIS
    for key, value, known in (
        ("ROUNDS", node.ROUNDS, (1, 2)),
        ("VOTING.PROCEDURE", node.VOTING.PROCEDURE, ("gpu", "cpu")),
        ("PASTE", node.PASTE, PASTES),
    ):
        if value not in known:
            raise ValueError(f"MODEL.FCIS.{key} {value!r} is not one of {', '.join(map(str, known))}")
    return InferenceOptions(
        rounds=node.ROUNDS,
        min_size=node.MIN_DROP_SIZE,
        score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        nms_threshold=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        voting=node.VOTING.ENABLED,
        merge_threshold=node.VOTING.MERGE_THRESH,
        procedure=node.VOTING.PROCEDURE,
        binary_threshold=node.BINARY_THRESH,
        paste=node.PASTE,
    )
