"""What follows the heads, step by step against plain code."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.projects.panoptic_fcn.inference import (
    InferenceOptions,
    Kernels,
    Masks,
    center_peaks,
    cut_out,
    fuse_stuff,
    fuse_things,
    matrix_nms_decay,
    rescore,
    semantic_map,
    stuff_kernels,
    thing_kernels,
)
from convmask.projects.panoptic_fcn.rescale import output_masks, rescale, strips


@pytest.mark.parametrize("window", [3, 5])
def test_peaks_one_by_one(window: int) -> None:
    torch.manual_seed(window)
    logits = torch.randn(3, 9, 7)
    scores = logits.sigmoid()
    smooth = (scores + F.avg_pool2d(scores[None], window, 1, window // 2)[0]) / 2
    expected = []
    for label in range(3):
        for y in range(9):
            for x in range(7):
                around = smooth[label, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                if smooth[label, y, x] >= around.max() and smooth[label, y, x] > 0.55:
                    expected.append((smooth[label, y, x].item(), label, y * 7 + x))
    expected.sort(reverse=True)
    found = [x.tolist() for x in center_peaks(logits, window, threshold=0.55, limit=50)]
    assert found[0] == pytest.approx([score for score, _, _ in expected])
    assert list(zip(found[1], found[2], strict=True)) == [(label, cell) for _, label, cell in expected]
    assert len(center_peaks(logits, window, threshold=0.0, limit=2)[0]) == 2


def test_kernels_of_peaks_come_from_their_cells() -> None:
    torch.manual_seed(0)
    centers = [torch.randn(2, 8, 8), torch.randn(2, 4, 4)]
    kernels = [torch.randn(6, 8, 8), torch.randn(6, 4, 4)]
    things = thing_kernels(centers, kernels, InferenceOptions(thing_threshold=0.0))
    assert (things.scores.diff() <= 0).all()
    cells = torch.cat([x.flatten(1).T for x in kernels])
    assert all((cells == vector).all(dim=1).any() for vector in things.vectors)


@pytest.mark.parametrize("average", ["map", "region"])
def test_stuff_kernels_by_loops(average: str) -> None:
    torch.manual_seed(0)
    regions, kernels = [torch.randn(4, 6, 5)], [torch.randn(3, 6, 5)]
    options = InferenceOptions(stuff_threshold=0.55, kernel_average=average)
    found = stuff_kernels(regions, kernels, options)
    scores = regions[0].sigmoid()
    best, label = scores.max(dim=0)
    expected = [c for c in range(4) if (label == c).any() and best[label == c].mean() > 0.55]
    assert found.classes.tolist() == expected
    for index, c in enumerate(expected):
        inside = kernels[0][:, label == c].sum(dim=1)
        vector = inside / (30 if average == "map" else (label == c).sum())
        torch.testing.assert_close(found.vectors[index], vector)
        torch.testing.assert_close(found.scores[index], best[label == c].mean())


def test_stuff_of_all_levels_is_averaged_by_class() -> None:
    stuff = Kernels(torch.tensor([[1.0], [5.0], [3.0]]), torch.tensor([0.2, 0.5, 0.4]), torch.tensor([3, 1, 3]))
    fused = fuse_stuff(stuff)
    assert fused.classes.tolist() == [1, 3]
    torch.testing.assert_close(fused.vectors, torch.tensor([[5.0], [2.0]]))
    torch.testing.assert_close(fused.scores, torch.tensor([0.5, 0.3]))


def test_fusion_can_be_class_agnostic_or_off() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.99, 0.1], [1.0, 0.05]])
    things = Kernels(vectors, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]))
    assert fuse_things(things, InferenceOptions()).classes.tolist() == [0, 1]
    agnostic = fuse_things(things, InferenceOptions(class_specific=False))
    torch.testing.assert_close(agnostic.vectors, vectors.mean(dim=0, keepdim=True))
    assert fuse_things(things, InferenceOptions(similar_threshold=1.5)) is things


def test_rescoring_sorts_drops_and_limits() -> None:
    probabilities = torch.zeros(4, 4, 4)
    probabilities[0, 0, 0] = 0.5
    probabilities[1, :2] = 0.9
    probabilities[3] = 0.45
    masks = Masks(probabilities, torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.arange(4))
    found = rescore(masks, InferenceOptions())
    assert found.classes.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([0.72, 0.45]), atol=1e-4, rtol=0)
    assert len(rescore(masks, InferenceOptions(top_num=1)).scores) == 1


def test_matrix_nms_lowers_the_second_of_equal_masks() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:2, :2] = True
    masks[2, 2:] = True
    factors = matrix_nms_decay(masks, torch.tensor([0.5, 0.9, 0.8]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(factors, torch.tensor([torch.tensor(-2.0).exp().item(), 1.0, 1.0]))
    others = matrix_nms_decay(masks, torch.tensor([0.5, 0.9, 0.8]), torch.arange(3))
    assert others.tolist() == [1, 1, 1]
    assert matrix_nms_decay(masks[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@given(
    image=st.tuples(st.integers(20, 64), st.integers(20, 64)),
    output=st.one_of(st.none(), st.tuples(st.integers(5, 150), st.integers(5, 150))),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_masks_are_those_scaled_at_full_size(image: tuple, output: tuple | None, seed: int) -> None:
    torch.manual_seed(seed)
    output = output or image
    probabilities = torch.rand(4, 16, 16) ** 3
    probabilities[0] = 0
    probabilities[1, :9] = 0
    probabilities[2, :, 5:] = 0
    masks, boxes = output_masks(probabilities, 0.4, 4, image, output)
    expected = rescale(probabilities, 4, image, output)
    for rows in (7, 200):
        pieces = list(strips(probabilities, 4, image, output, rows))
        assert [start for start, _ in pieces] == list(range(0, output[0], rows))
        torch.testing.assert_close(torch.cat([piece for _, piece in pieces], dim=1), expected)
    differing = masks != (expected > 0.4)
    assert (expected[differing] - 0.4).abs().max() < 1e-5 if differing.any() else True
    torch.testing.assert_close(boxes, BitMasks(masks).get_bounding_boxes().tensor)


def test_semantic_map_is_the_argmax() -> None:
    torch.manual_seed(0)
    stuff = Masks(torch.rand(3, 12, 10), torch.ones(3), torch.tensor([1, 2, 4]))
    stuff.probabilities[2] = stuff.probabilities[1]
    stuff.probabilities[:, :4, :4] = 0
    sem_seg, labels = semantic_map(stuff, 5, 4, (45, 40), (100, 60))
    torch.testing.assert_close(sem_seg[[1, 2, 4]], rescale(stuff.probabilities, 4, (45, 40), (100, 60)))
    assert not sem_seg[[0, 3]].any()
    assert torch.equal(labels, sem_seg.argmax(dim=0))
    assert labels.unique().tolist() == [0, 1, 2]


def test_nothing_gives_nothing() -> None:
    none = Kernels(torch.zeros(0, 8), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    options = InferenceOptions(matrix_nms=True)
    masks = rescore(cut_out(fuse_things(none, options), torch.randn(8, 6, 6)), options)
    assert masks.probabilities.shape == (0, 6, 6)
    assert fuse_stuff(none).vectors.shape == (0, 8)
    full, boxes = output_masks(masks.probabilities, 0.4, 4, (24, 24), (30, 30))
    assert full.shape == (0, 30, 30)
    assert boxes.shape == (0, 4)
