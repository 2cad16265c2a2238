"""The parts of training and of proposals against recorded outputs of the authors' release."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from convmask.projects.fcis import MXNET
from convmask.projects.fcis.anchors import cell_anchors
from convmask.projects.fcis.boxes import clip, decode, encode, pairwise_iou, sides
from convmask.projects.fcis.heads import RoiOutputs
from convmask.projects.fcis.losses import LossOptions, hardest, image_losses, roi_losses
from convmask.projects.fcis.rpn import match_anchors, propose_boxes
from convmask.projects.fcis.targets import (
    RoiTargets,
    SamplingOptions,
    choose_and_make_targets,
    crop_masks,
    roi_targets,
)

Record = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def record(golden: Callable[[str], Record]) -> Record:
    return golden("fcis_ops")


def part(record: Record, name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}/"
    return {
        k.removeprefix(prefix): torch.from_numpy(v)
        for k, v in record.items()
        if k.startswith(prefix) and v.dtype.kind != "U"
    }


def attributes(record: Record, name: str) -> dict:
    return json.loads(str(record[f"{name}/attrs"]))


def grid(base: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4) * 16
    return (shifts + base).view(-1, 4).float()


def test_boxes(record: Record) -> None:
    of = part(record, "box")
    torch.testing.assert_close(encode(of["ex"], of["gt"], MXNET), of["targets"])
    decoded = torch.cat([decode(of["ex"], deltas, MXNET) for deltas in of["deltas"].split(4, dim=1)], dim=1)
    torch.testing.assert_close(decoded, of["decoded"])
    size = tuple(of["im_shape"].tolist())
    clipped = torch.cat([clip(boxes, size, MXNET) for boxes in decoded.split(4, dim=1)], dim=1)
    torch.testing.assert_close(clipped, of["clipped"])
    torch.testing.assert_close(pairwise_iou(of["ex"], of["gt"], MXNET), of["overlaps"])
    kept = (sides(of["ex"], MXNET) >= float(of["min_size"])).all(dim=1).nonzero()[:, 0]
    assert kept.tolist() == of["filter_keep"].tolist()


@pytest.mark.parametrize("case", ["coco", "voc", "other"])
def test_anchors(record: Record, case: str) -> None:
    of = part(record, f"anchors/{case}")
    base = cell_anchors(16, (16 * of["scales"]).tolist(), of["ratios"].tolist())
    torch.testing.assert_close(base, of["base"], rtol=0, atol=0)
    torch.testing.assert_close(grid(base, tuple(of["grid_hw"].tolist())).double(), of["grid"], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["coco", "voc_padded", "all_kept"])
def test_proposals(record: Record, case: str) -> None:
    """Without the random duplicates that fill up the second."""
    of, options = part(record, f"proposal/{case}"), attributes(record, f"proposal/{case}")
    count, (height, width) = of["cls_prob"].shape[1] // 2, of["im_info"][:2].int().tolist()
    base = cell_anchors(16, [16 * s for s in options["scales"]], options["ratios"])
    rows, columns = height // 16, width // 16
    ranks = of["cls_prob"][0, count:, :rows, :columns].permute(1, 2, 0).flatten()
    deltas = of["bbox_pred"][0].unflatten(0, (count, 4))[..., :rows, :columns].permute(2, 3, 0, 1).reshape(-1, 4)
    boxes, scores = propose_boxes(
        [ranks],
        [deltas],
        [grid(base, (rows, columns))],
        (height, width),
        min_size=options["min_size"],
        pre_nms_topk=options["pre_nms_top_n"],
        post_nms_topk=options["post_nms_top_n"],
        nms_threshold=options["nms_thresh"],
    )
    kept = int(of["kept"])
    assert len(boxes) == kept
    torch.testing.assert_close(boxes, of["rois"][:kept, 1:], rtol=0, atol=1e-3)
    torch.testing.assert_close(scores, of["scores"].flatten()[:kept], rtol=0, atol=1e-6)


def test_boxes_of_the_second_round(record: Record) -> None:
    of = part(record, "box_parser")
    deltas = of["bbox_pred"][:, 4:] * of["bbox_stds"].float() + of["bbox_means"].float()
    size = tuple(of["im_info"][:2].int().tolist())
    torch.testing.assert_close(
        clip(decode(of["rois"][:, 1:], deltas, MXNET), size, MXNET), of["rois_out"][:, 1:], rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("case", ["sampled", "many_positives", "voc", "zero_iou", "no_gt"])
def test_anchor_targets(record: Record, case: str) -> None:
    """The recorded sample is one that could have been drawn from ours, and the box targets are the same."""
    of, options = part(record, f"rpn_target/{case}"), attributes(record, f"rpn_target/{case}")
    changes = options["cfg_overrides"]
    size = tuple(of["im_info"][:2].int().tolist())
    anchors = grid(
        cell_anchors(16, [16 * s for s in options["scales"]], options["ratios"]), tuple(of["feat_hw"].tolist())
    )
    thresholds = 0.3, changes.get("RPN_POSITIVE_OVERLAP", 0.7)
    truth = of["gt_boxes"][:, :4].float()
    labels, matched = match_anchors(anchors, truth, size, thresholds=thresholds)
    count = len(anchors) // int(of["feat_hw"].prod())
    sample = of["label"].view(count, -1).T.flatten()
    number = changes.get("RPN_BATCH_SIZE", 256)
    positive = min(int((labels == 1).sum()), number // 2)
    assert int((sample == 1).sum()) == positive
    assert int((sample == 0).sum()) == min(int((labels == 0).sum()), number - positive)
    assert (labels[sample == 1] == 1).all()
    assert (labels[sample == 0] == 0).all()
    if len(truth):
        targets = encode(anchors, truth[matched], MXNET)
        recorded = of["bbox_target"].unflatten(1, (count, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)
        inside = labels == 1
        torch.testing.assert_close(targets[inside], recorded[inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["all_rois", "sampled_32", "gap_background", "gap_from_all", "ignore_gap"])
def test_roi_targets(record: Record, case: str) -> None:
    """Targets of the recorded sample, and what kinds of RoIs a sample of ours has."""
    of, attribute = part(record, f"annotate/{case}"), attributes(record, f"annotate/{case}")
    options = SamplingOptions(
        number=attribute["batch_rois"],
        positive_fraction=attribute["fg_fraction"],
        positive_iou=attribute["fg_thresh"],
        background_low=attribute["bg_thresh_lo"],
        fill_from_all=attribute["gap_select_from_all"],
        ignore_filled=attribute["ignore_gap"],
        mask_threshold=attribute["binary_thresh"],
        deviations=tuple(attribute["bbox_stds"]),
    )
    boxes, classes = of["gt_boxes"][:, :4], of["gt_boxes"][:, 4].long()
    candidates = torch.cat([of["rois_in"][:, 1:], boxes])
    sample = choose_and_make_targets(candidates, boxes, classes, of["gt_masks"], options)
    assert len(sample.labels) == len(of["label"])
    for kind in (-1, 0):
        assert int((sample.labels == kind).sum()) == int((of["label"] == kind).sum())
    if attribute["batch_rois"] < 0:
        assert sample.labels.tolist() == of["label"].tolist()
        torch.testing.assert_close(sample.rois, of["rois"][:, 1:])

    rois = of["rois"][:, 1:]
    objects = pairwise_iou(rois, boxes, MXNET).argmax(dim=1)
    made = roi_targets(rois, of["label"], objects, boxes, of["gt_masks"], options)
    weights = of["bbox_weight"][:, 4:].float()
    torch.testing.assert_close(made.deltas, of["bbox_target"][:, 4:] * weights, rtol=0, atol=1e-5)
    assert made.masks.tolist() == of["mask_target"][:, 0].tolist()


def test_cropped_masks(record: Record) -> None:
    of = part(record, "intersect")
    mask = of["gt_mask"][None]
    objects = torch.zeros(len(of["ex_boxes"]), dtype=torch.int64)
    shares = crop_masks(of["ex_boxes"].double(), of["gt_boxes"].double(), mask, objects, 21)
    torch.testing.assert_close(shares, of["resized"], rtol=0, atol=1e-5)
    assert torch.equal(shares >= 0.4, of["target"])


@pytest.mark.parametrize("case", ["r40", "with_ignored"])
def test_hard_examples(record: Record, case: str) -> None:
    of = part(record, f"ohem/{case}")
    rows = len(of["label"])
    outputs = RoiOutputs(of["cls_score"], of["mask_score"], torch.zeros(rows), of["bbox_pred"][:, 4:])
    deltas = of["bbox_target"][:, 4:] * of["bbox_weight"][:, 4:]
    targets = RoiTargets(torch.zeros(rows, 4), of["label"], deltas, of["mask_target"][:, 0].long())
    # the recorded random targets have box weights of their own, not those of positive labels
    weighted = outputs._replace(deltas=outputs.deltas * of["bbox_weight"][:, 4:])
    losses = roi_losses(weighted, targets, LossOptions())
    total = torch.stack(list(losses.values())).sum(dim=0)
    torch.testing.assert_close(total.double(), of["roi_loss"], rtol=1e-5, atol=1e-5)
    chosen = hardest(losses, int(of["keep"]))
    assert sorted(chosen.tolist()) == sorted(of["selected"].tolist())


def test_gradients_of_the_loss_layers(record: Record) -> None:
    """MXNet's layers give gradients, not losses: those of ours must be the same."""
    of = part(record, "loss_layer/mask")
    scores = of["score"].clone().requires_grad_()
    rows = len(scores)
    none = torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 4)
    targets = RoiTargets(none[2], none[1], none[2], of["label"][:, 0].long())
    outputs = RoiOutputs(none[0], scores, none[1], none[2])
    options = LossOptions(mask_weight=10, hard_rois=None, normalizer=128)
    image_losses(outputs, targets, options)["loss_mask"].backward()
    torch.testing.assert_close(scores.grad, of["grad"], rtol=1e-4, atol=1e-8)

    of = part(record, "loss_layer/cls")
    scores = of["score"].clone().requires_grad_()
    rows = len(scores)
    masks, ignored = torch.zeros(rows, 2, 3, 3), torch.full((rows, 3, 3), -1)
    targets = RoiTargets(torch.zeros(rows, 4), of["label"].long(), torch.zeros(rows, 4), ignored)
    outputs = RoiOutputs(scores, masks, torch.zeros(rows), torch.zeros(rows, 4))
    image_losses(outputs, targets, LossOptions(hard_rois=None))["loss_cls"].backward()
    torch.testing.assert_close(scores.grad, of["grad"], rtol=1e-4, atol=1e-8)
