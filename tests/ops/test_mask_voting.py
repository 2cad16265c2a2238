from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmask.ops import mask_voting, mask_voting_reference
from convmask.ops.mask_voting import PROCEDURES

from .operator_tester import ErrorCase, OperatorTester

Golden = Callable[[str], dict[str, np.ndarray]]
Input = tuple[Tensor, Tensor, Tensor]


def draw(
    generator: torch.Generator, rois: int, classes: int, size: tuple[int, int], objects: int = 3, side: int = 7
) -> Input:
    """RoIs around a few objects, some over the border; masks are smooth blobs."""
    height, width = size
    centre = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * torch.tensor([width, height])
    extent = (0.2 + 0.6 * torch.rand(objects, 2, generator=generator, dtype=torch.float64)) * min(size)
    which = torch.randint(objects, (rois,), generator=generator)
    noise = 0.15 * torch.randn(rois, 4, generator=generator, dtype=torch.float64) * extent[which].repeat(1, 2)
    boxes = torch.cat([centre[which] - extent[which] / 2, centre[which] + extent[which] / 2], dim=1) + noise
    y, x = torch.linspace(-1, 1, side), torch.linspace(-1, 1, side)
    blob = 1.2 - (y[:, None] ** 2 + x**2)
    masks = torch.sigmoid(2 * (blob + torch.randn(rois, side, side, generator=generator))).double()
    scores = torch.randn(rois, classes, generator=generator, dtype=torch.float64)
    scores[torch.arange(rois), which % classes] += 3
    return masks, boxes, scores.softmax(dim=1)


class TestMaskVoting(OperatorTester):
    operator = "mask_voting"
    reference = staticmethod(mask_voting_reference)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    tolerances = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # noqa: RUF012

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for procedure in range(len(PROCEDURES)):
            yield *draw(generator, 20, 4, (40, 50)), 40, 50, 0.3, 0.5, 0.4, 1e-3, 30, procedure
            yield *draw(generator, 25, 3, (23, 31)), 23, 31, 0.3, 0.5, 0.4, 1e-3, 4, procedure  # capped
            yield *draw(generator, 12, 3, (30, 20)), 30, 20, 0.3, 0.2, 0.95, 1e-3, 20, procedure  # much is empty

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(1)
        yield *draw(generator, 0, 3, (20, 20)), 20, 20, 0.3, 0.5, 0.4, 1e-3, 5, 0
        yield *draw(generator, 4, 1, (20, 20)), 20, 20, 0.3, 0.5, 0.4, 1e-3, 5, 0  # background alone

    def error_cases(self) -> dict[str, ErrorCase]:
        masks, boxes, scores = draw(torch.Generator().manual_seed(0), 3, 4, (20, 20))
        good = {"masks": masks, "boxes": boxes, "scores": scores, "image_size": (20, 20)}
        wrong: list[tuple[str, Any, type[Exception]]] = [
            ("masks", masks[:, :3], ValueError),
            ("masks", masks > 0, TypeError),
            ("boxes", boxes[:2], ValueError),
            ("boxes", boxes.long(), TypeError),
            ("boxes", boxes.to("meta"), ValueError),
            ("scores", scores[0], ValueError),
            ("scores", scores.to("meta"), ValueError),
            ("image_size", (0, 5), ValueError),
            ("max_detections", 0, ValueError),
            ("score_threshold", 0.0, ValueError),
            ("procedure", "tpu", ValueError),
        ]
        cases = {}
        for index, (name, value, exception) in enumerate(wrong):
            bad = {**good, name: value}
            cases[f"function {name} {index}"] = ErrorCase(partial(mask_voting, **bad), exception, name)
        raw = torch.ops.convmask.mask_voting
        numbers = (20, 20, 0.3, 0.5, 0.4, 1e-3, 5)
        cases["operator boxes"] = ErrorCase(partial(raw, masks, boxes[:2], scores, *numbers, 0), Exception, "boxes")
        cases["operator procedure"] = ErrorCase(partial(raw, masks, boxes, scores, *numbers, 3), Exception, "procedure")
        return cases


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rois=st.integers(1, 40),
    classes=st.integers(2, 6),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    side=st.sampled_from([1, 2, 7, 21, 64, 70]),
    limit=st.integers(1, 60),
    thresholds=st.tuples(*[st.sampled_from([0.1, 0.3, 0.5, 0.7])] * 3),
    procedure=st.integers(0, 2),
)
def test_equals_the_reference(
    seed: int,
    rois: int,
    classes: int,
    size: tuple[int, int],
    side: int,
    limit: int,
    thresholds: tuple[float, float, float],
    procedure: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    args = *draw(generator, rois, classes, size, objects=4, side=side), *size, *thresholds, 1e-3, limit, procedure
    actual = torch.ops.convmask.mask_voting(*args)
    for a, e in zip(actual, mask_voting_reference(*args), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("procedure", ["cpu", "gpu"])
@pytest.mark.parametrize("case", ["three_objects", "capped", "empty_result", "borders", "one_class"])
def test_golden(golden: Golden, case: str, procedure: str) -> None:
    record = {
        k.removeprefix(f"vote/{case}/"): v for k, v in golden("fcis_ops").items() if k.startswith(f"vote/{case}/")
    }
    options = json.loads(str(record["params"]))
    masks, boxes, scores = (torch.from_numpy(record[key]) for key in ("masks", "boxes", "scores"))
    found = mask_voting(
        masks[:, 0],
        boxes,
        scores,
        (options["im_height"], options["im_width"]),
        nms_threshold=options["nms_thresh"],
        merge_threshold=options["merge_thresh"],
        binary_threshold=options["binary_thresh"],
        max_detections=options["max_per_image"],
        procedure=procedure,
    )
    prefix = "gpu_" if procedure == "gpu" else ""
    detections = record[f"{prefix}det"]
    np.testing.assert_array_equal(found[0], detections[:, :4])
    np.testing.assert_allclose(found[1], detections[:, 4], atol=1e-7)
    assert found[2].tolist() == record[f"{prefix}det_class"].tolist()
    np.testing.assert_allclose(found[3], record[f"{prefix}det_mask"], atol=1e-5)


def test_of_equal_scores_at_the_limit_the_first_count() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
    scores = torch.tensor([[0.5, 0.5, 0.0]] * 3)
    voted, _, classes, _ = mask_voting(torch.ones(3, 3, 3), boxes, scores, (10, 50), max_detections=2)
    assert classes.tolist() == [1, 1]
    assert voted[:, 0].tolist() == [0, 20]


def test_masks_of_other_classes_have_a_vote() -> None:
    """Each RoI has one mask, whatever its class is: the second gives the first its left half."""
    boxes = torch.tensor([[0.0, 0, 19, 19], [0, 0, 19, 19]])
    masks = torch.zeros(2, 2, 2)
    masks[0, :, 1] = 1
    masks[1, :, 0] = 1
    scores = torch.tensor([[0.0, 0.5, 0.1], [0.0, 0.45, 0.5]])
    voted, found, classes, _ = mask_voting(masks, boxes, scores, (20, 20))
    assert classes.tolist() == [1, 2]
    assert found.tolist() == [0.5, 0.5]
    assert voted[0].tolist() == [0, 0, 19, 19]  # weights 0.53 and 0.47, both at or above the threshold
    assert voted[1].tolist() == [0, 0, 10, 19]  # 0.17 and 0.83


def test_boxes_that_are_not_finite_do_no_harm() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [float("nan"), 0, 9, 9], [0, 0, float("inf"), 9]])
    scores = torch.tensor([[0.1, 0.9]] * 3)
    voted, *_ = mask_voting(torch.ones(3, 3, 3), boxes, scores, (20, 20))
    assert [0.0, 0.0, 9.0, 9.0] in voted.tolist()
