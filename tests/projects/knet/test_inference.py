"""Results against the rules, mask by mask at full size, and in pieces of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convmask.projects.knet.inference import (
    Frame,
    InferenceOptions,
    full_size,
    instances_of,
    merge_scores,
    panoptic_of,
    pixel_owners,
)

FRAME = Frame((64, 96), (60, 90), (75, 80))


def all_at_once(logits: torch.Tensor, upsampling: int, frame: Frame) -> torch.Tensor:
    x = F.interpolate(logits[None], scale_factor=upsampling, mode="bilinear") if upsampling > 1 else logits[None]
    x = F.interpolate(x.sigmoid(), size=frame.padded, mode="bilinear")[..., : frame.image[0], : frame.image[1]]
    return F.interpolate(x, size=frame.output, mode="bilinear")[0]


@pytest.mark.parametrize("values_at_once", [1, 3 * 75 * 80, 2**24])
@pytest.mark.parametrize("upsampling", [1, 2])
def test_pieces_make_up_the_whole(values_at_once: int, upsampling: int) -> None:
    logits = torch.randn(7, 8, 12) * 3
    pieces = list(full_size(logits, upsampling, FRAME, values_at_once))
    torch.testing.assert_close(torch.cat([x for _, x in pieces]), all_at_once(logits, upsampling, FRAME))
    assert [i for chunk, _ in pieces for i in range(chunk.start, chunk.stop)] == list(range(7))
    # one mask at least
    assert max(len(x) for _, x in pieces) <= max(1, values_at_once // (75 * 80))


def test_instances_are_the_best_pairs() -> None:
    torch.manual_seed(0)
    logits, scores = torch.randn(5, 8, 12) * 3, torch.rand(5, 3)
    found = instances_of(logits, scores, 2, FRAME, InferenceOptions(top_num=9, values_at_once=10_000))
    expected = scores.flatten().sort(descending=True).indices[:9]
    assert found.pred_classes.tolist() == (expected % 3).tolist()
    masks = all_at_once(logits, 2, FRAME) > 0.5
    assert torch.equal(found.pred_masks, masks[expected // 3])
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.tolist(), strict=True):
        ys, xs = np.nonzero(mask.numpy())
        assert box == ([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0])


def test_fewer_pairs_than_asked_for() -> None:
    found = instances_of(torch.full((2, 8, 12), -9.0), torch.rand(2, 1), 1, FRAME, InferenceOptions(top_num=100))
    assert len(found) == 2 and not found.pred_masks.any() and found.pred_boxes.tensor.abs().sum() == 0


def brute_force(
    logits: torch.Tensor, scores: torch.Tensor, things: int, options: InferenceOptions
) -> tuple[np.ndarray, list[tuple[bool, int]]]:
    """The merge rule of the release, one kernel after the other on full-size arrays."""
    probabilities = all_at_once(logits, 2, FRAME).numpy()
    best, labels = (x.numpy() for x in merge_scores(scores, things))
    owner = (best[:, None, None] * probabilities).argmax(axis=0)
    ids = np.zeros(owner.shape, dtype=int)
    segments = []
    for kernel in np.argsort(-best, kind="stable"):
        is_thing = bool(labels[kernel] < things)
        if is_thing and best[kernel] < options.things_threshold:
            continue
        mine, whole = (owner == kernel).sum(), (probabilities[kernel] >= 0.5).sum()
        if mine > 0 and whole > 0 and mine / whole >= options.overlap_threshold:
            segments.append((is_thing, int(labels[kernel])))
            ids[owner == kernel] = len(segments)
    return ids, segments


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_merge_against_brute_force(seed: int) -> None:
    torch.manual_seed(seed)
    things, stuff, kernels = 4, 3, 6
    logits = F.interpolate(torch.randn(1, kernels + stuff, 3, 4) * 4, size=(8, 12), mode="bilinear")[0]
    scores = torch.rand(kernels + stuff, things + stuff)
    options = InferenceOptions(overlap_threshold=0.4, values_at_once=20_000)
    ids, segments = panoptic_of(logits, scores, things, 2, FRAME, options)
    expected_ids, expected = brute_force(logits, scores, things, options)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    found = [(s["isthing"], s["category_id"] + (0 if s["isthing"] else things - 1)) for s in segments]
    assert found == expected and found
    assert [s["id"] for s in segments] == list(range(1, len(segments) + 1))


def test_nothing_survives() -> None:
    logits = torch.full((3, 8, 12), -4.0)
    ids, segments = panoptic_of(logits, torch.full((3, 2), 0.9), 1, 2, FRAME, InferenceOptions())
    assert not ids.any() and segments == []


def test_ties_go_to_the_first_kernel_in_whatever_pieces() -> None:
    logits = torch.ones(4, 8, 12)
    for values in (1, 2**24):
        owners: Any = pixel_owners(logits, torch.full((4,), 0.5), 1, FRAME, values)
        assert not owners.owner.any()
