"""The releases' region proposal network: two-class scores, legacy matching and proposals.

Shapes: N images, A anchors a cell, a level of H x W cells; anchors are in the order row, column, anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from .boxes import clip, decode, encode, from_detectron, pairwise_iou, sides, to_detectron
from .convention import MXNET, Convention, convention_named

Size = tuple[int, int]


@RPN_HEAD_REGISTRY.register()
class FCISRPNHead(nn.Module):
    """A 3x3 convolution, and 1x1 convolutions to the scores of background and foreground and to deltas."""

    @configurable
    def __init__(self, *, in_channels: int, channels: int, num_anchors: int) -> None:
        """Takes the widths.

        Args:
            in_channels: of every level.
            channels: of the 3x3 convolution.
            num_anchors: A.
        """
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.scores = nn.Conv2d(channels, 2 * num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in (self.conv, self.scores, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config.

        Raises:
            ValueError: levels differ in width or number of anchors.
        """
        channels = {shape.channels for shape in input_shape}
        anchors = set(build_anchor_generator(cfg, input_shape).num_anchors)
        if len(channels) > 1 or len(anchors) > 1:
            raise ValueError(
                f"MODEL.RPN.IN_FEATURES: the levels have {sorted(channels)} channels and {sorted(anchors)} anchors "
                "(MODEL.ANCHOR_GENERATOR); both must be one number"
            )
        return {"in_channels": channels.pop(), "channels": cfg.MODEL.FCIS.RPN_CHANNELS, "num_anchors": anchors.pop()}

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scores (N, 2 A, H, W), first those of the background, and deltas (N, 4 A, H, W) of each level."""
        hidden = [F.relu(self.conv(x)) for x in features]
        return [self.scores(x) for x in hidden], [self.deltas(x) for x in hidden]


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCISRPN(RPN):
    """Detectron2's RPN with the releases' anchors, matching, losses and proposals. Gives Detectron2's proposals."""

    @configurable
    def __init__(self, *, convention: Convention = MXNET, pad_proposals: bool = False, **kwargs: Any) -> None:
        """As Detectron2's RPN.

        Args:
            convention: whose rules hold.
            pad_proposals: fill up with random duplicates, see ``MODEL.FCIS.PAD_PROPOSALS``.
            kwargs: of Detectron2's RPN; the box transform and the type of the box loss are not used.
        """
        super().__init__(**kwargs)
        self.convention = convention
        self.pad_proposals = pad_proposals

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        arguments = super().from_config(cfg, input_shape)
        return {
            **arguments,
            "convention": convention_named(cfg.MODEL.FCIS.CONVENTION),
            "pad_proposals": cfg.MODEL.FCIS.PAD_PROPOSALS,
        }

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Proposals of each image (``proposal_boxes``, ``objectness_logits``) and, in training, losses.

        Args:
            images: of the batch. Its attribute ``scales``, if there is one, has for each image the pixels of the input
                a pixel of the original.
            features: by level.
            gt_instances: needed in training; ``gt_boxes``.
        """
        levels = [features[name] for name in self.in_features]
        anchors = [level.tensor for level in self.anchor_generator(levels)]
        scores, deltas = (
            [_by_anchor(x, parts) for x in maps] for maps, parts in zip(self.rpn_head(levels), (2, 4), strict=True)
        )
        losses = {}
        if self.training:
            assert gt_instances is not None, "RPN requires gt_instances in training!"
            labels, targets = self.sample_anchors(torch.cat(anchors), gt_instances)
            losses = self.two_class_losses(torch.cat(scores, dim=1), torch.cat(deltas, dim=1), labels, targets)
        with torch.no_grad():
            proposals = self.propose(scores, deltas, anchors, [(x.shape[-2], x.shape[-1]) for x in levels], images)
        return proposals, losses

    @torch.no_grad()
    def sample_anchors(
        self, anchors: torch.Tensor, gt_instances: Sequence[Instances]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (N, anchors) 1, 0 or -1 for not sampled, and box targets (N, anchors, 4)."""
        labels, targets = [], []
        for instances in gt_instances:
            truth = from_detectron(instances.gt_boxes.tensor, self.convention)
            label, matched = match_anchors(
                anchors,
                truth,
                _size(instances.image_size),
                thresholds=self.anchor_matcher.thresholds[1:-1],
                border=self.anchor_boundary_thresh,
                convention=self.convention,
            )
            labels.append(self._subsample_labels(label))
            box = truth[matched] if len(truth) else anchors
            targets.append(encode(anchors, box, self.convention))
        positives = sum(int((label == 1).sum()) for label in labels)
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", positives / len(labels))
        return torch.stack(labels), torch.stack(targets)

    def two_class_losses(
        self, scores: torch.Tensor, deltas: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean cross entropy of the sampled anchors, and smooth L1 divided by the number to sample; mean over images.

        Args:
            scores: (N, anchors, 2).
            deltas: (N, anchors, 4).
            labels: (N, anchors) 1, 0, -1 for ignored.
            targets: (N, anchors, 4).
        """
        number = len(labels)
        flat = scores.float().flatten(0, 1), labels.flatten().long()
        entropy = F.cross_entropy(*flat, ignore_index=-1, reduction="none")
        sampled = (labels >= 0).sum(dim=1).clamp(min=1)
        positive = labels == 1
        box = smooth_l1_loss(deltas[positive].float(), targets[positive], self.smooth_l1_beta, reduction="sum")
        losses = {
            "loss_rpn_cls": (entropy.view(number, -1).sum(dim=1) / sampled).mean(),
            "loss_rpn_loc": box / (self.batch_size_per_image * number),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def propose(
        self,
        scores: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        anchors: Sequence[torch.Tensor],
        sizes: Sequence[Size],
        images: ImageList,
    ) -> list[Instances]:
        """Proposals of each image.

        Args:
            scores: (N, H W A, 2) of each level.
            deltas: (N, H W A, 4) of each level.
            anchors: (H W A, 4) of each level.
            sizes: H and W of each level.
            images: of the batch.
        """
        if self.training and not all(bool(torch.isfinite(x).all()) for x in (*scores, *deltas)):
            raise FloatingPointError("FCISRPN: predicted scores or deltas are not finite: the training has diverged")
        ranks = [x[..., 1] if self.convention.rank_by_foreground else x[..., 1] - x[..., 0] for x in scores]
        scales = getattr(images, "scales", [1.0] * len(images.image_sizes))
        proposals = []
        for image, image_size in enumerate(map(_size, images.image_sizes)):
            kept = [
                _usable_cells(size, stride, len(level) // max(size[0] * size[1], 1), image_size, self.convention)
                for size, stride, level in zip(sizes, self.anchor_generator.strides, anchors, strict=True)
            ]
            boxes, logits = propose_boxes(
                [rank[image][keep.to(rank.device)].float() for rank, keep in zip(ranks, kept, strict=True)],
                [delta[image][keep.to(delta.device)].float() for delta, keep in zip(deltas, kept, strict=True)],
                [level[keep.to(level.device)] for level, keep in zip(anchors, kept, strict=True)],
                image_size,
                min_size=self.min_box_size * (scales[image] if self.convention.scaled_min_size else 1),
                pre_nms_topk=self.pre_nms_topk[self.training],
                post_nms_topk=self.post_nms_topk[self.training],
                nms_threshold=self.nms_thresh,
                convention=self.convention,
            )
            if self.pad_proposals and 0 < len(boxes) < self.post_nms_topk[self.training]:
                more = torch.randint(len(boxes), (self.post_nms_topk[self.training] - len(boxes),))
                boxes, logits = torch.cat([boxes, boxes[more]]), torch.cat([logits, logits[more]])
            found = Instances(image_size)
            found.proposal_boxes = Boxes(to_detectron(boxes, self.convention))
            found.objectness_logits = logits
            proposals.append(found)
        return proposals


def match_anchors(
    anchors: torch.Tensor,
    truth: torch.Tensor,
    image_size: Size,
    *,
    thresholds: Sequence[float] = (0.3, 0.7),
    border: float = 0.0,
    convention: Convention = MXNET,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels before sampling, by the releases' rule (py-faster-rcnn's).

    An anchor is negative below the first threshold, then positive if no anchor has a larger IoU with some object, then
    positive from the second threshold on. An object that no anchor overlaps thereby makes all anchors positive that
    overlap it as little.

    Args:
        anchors: (K, 4).
        truth: (G, 4) boxes of objects, in the convention.
        image_size: height and width.
        thresholds: IoU of negatives (below) and positives (from).
        border: anchors that leave the image by more pixels are ignored; below 0 none is.
        convention: of the boxes.

    Returns:
        (K,) int8 labels 1, 0, -1 for ignored, and (K,) int64 indices of the objects of the largest IoU.
    """
    height, width = image_size
    labels = torch.full((len(anchors),), -1, dtype=torch.int8, device=anchors.device)
    matched = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    inside = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
    if border >= 0:
        limit = anchors.new_tensor([width + border, height + border])
        ends_inside = anchors[:, 2:] < limit if convention.offset else anchors[:, 2:] <= limit
        inside = (anchors[:, :2] >= -border).all(dim=1) & ends_inside.all(dim=1)
    if len(truth) == 0:
        labels[inside] = 0
        return labels, matched
    overlaps = pairwise_iou(anchors[inside], truth, convention)
    if len(overlaps) == 0:
        return labels, matched
    best, matched[inside] = overlaps.max(dim=1)
    label = torch.full_like(best, -1, dtype=torch.int8)
    label[best < thresholds[0]] = 0
    label[(overlaps == overlaps.max(dim=0).values).any(dim=1)] = 1
    label[best >= thresholds[1]] = 1
    labels[inside] = label
    return labels, matched


def propose_boxes(
    ranks: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    image_size: Size,
    *,
    min_size: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    nms_threshold: float,
    convention: Convention = MXNET,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The proposals of one image, by descending rank: boxes (M, 4) in the convention, and their ranks (M,).

    Args:
        ranks: (K,) of each level, the higher the better.
        deltas: (K, 4) of each level.
        anchors: (K, 4) of each level.
        image_size: height and width, to which boxes are clipped.
        min_size: boxes with a shorter side are dropped, in pixels.
        pre_nms_topk: so many boxes of a level go into NMS.
        post_nms_topk: at most M.
        nms_threshold: NMS is by level.
        convention: of the anchors.
    """
    boxes, kept_ranks, levels = [], [], []
    for level, (rank, delta, anchor) in enumerate(zip(ranks, deltas, anchors, strict=True)):
        box = clip(decode(anchor, delta, convention), image_size, convention)
        large = (sides(box, convention) >= min_size).all(dim=1).nonzero()[:, 0]
        order = torch.sort(rank[large], descending=True, stable=True).indices[:pre_nms_topk]
        chosen = large[order]
        boxes.append(box[chosen])
        kept_ranks.append(rank[chosen])
        levels.append(torch.full_like(chosen, level))
    box, rank = torch.cat(boxes), torch.cat(kept_ranks)
    kept = batched_nms(to_detectron(box.double(), convention), rank.double(), torch.cat(levels), nms_threshold)
    kept = kept[:post_nms_topk]
    return box[kept], rank[kept]


def _by_anchor(maps: torch.Tensor, parts: int) -> torch.Tensor:
    """(N, channels, H, W) to (N, H W A, parts): scores have the anchors inside, deltas outside."""
    if parts == 2:
        return maps.unflatten(1, (2, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
    return maps.unflatten(1, (-1, parts)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _usable_cells(size: Size, stride: int, anchors: int, image_size: Size, convention: Convention) -> torch.Tensor:
    """(H W A,) bool: anchors of cells within the image, not of those that only the padding of the batch has."""
    if convention.floor_cells:
        rows, columns = image_size[0] // stride, image_size[1] // stride
    else:
        rows, columns = -(-image_size[0] // stride), -(-image_size[1] // stride)
    usable = torch.zeros(size[0], size[1], anchors, dtype=torch.bool)
    usable[:rows, :columns] = True
    return usable.flatten()


def _size(size: Any) -> Size:
    return int(size[0]), int(size[1])
