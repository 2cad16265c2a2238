from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmask.ops import panoptic_merge, panoptic_merge_reference

from .operator_tester import ErrorCase, OperatorTester

Sample = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(generator: torch.Generator, instances: int, height: int, width: int, *, boxes: bool = True) -> Sample:
    """Probabilities inside boxes or everywhere, scores in steps of 1/8 (so there are ties), labels in runs."""
    masks = torch.rand(instances, height, width, generator=generator, dtype=torch.float64)
    if boxes:
        y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
        top, left, bottom, right = torch.rand(4, instances, 1, 1, generator=generator)
        masks = masks + 0.5
        masks *= (y >= top * height) & (y <= bottom * height) & (x >= left * width) & (x <= right * width)
    scores = torch.randint(9, (instances,), generator=generator).double() / 8
    classes = torch.randint(80, (instances,), generator=generator)
    sem_seg = torch.randint(4, (height, 1), generator=generator) + torch.randint(
        3, (height, width), generator=generator
    )
    return masks, scores, classes, sem_seg


class TestPanopticMerge(OperatorTester):
    operator = "panoptic_merge"
    reference = staticmethod(panoptic_merge_reference)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        yield (*draw(generator, 6, 30, 41), 0.5, 20, 0.25, 0.5, [0])
        yield (*draw(generator, 9, 97, 131), 0.2, 200, 0.5, 0.25, [0, 3])  # more pixels than a block of the kernel
        yield (*draw(generator, 5, 64, 64, boxes=False), 1.0, 1, 0.0, 0.5, [])  # whole words only; nothing is left out
        masks, scores, classes, sem_seg = draw(generator, 7, 17, 65)
        yield masks > 0.5, scores, classes, sem_seg, 0.5, 0, 0.25, 0.5, [0]  # bool; segments of no pixels
        yield masks > 0.5, scores, classes, sem_seg - 40_000, 0.5, 1, 0.25, 0.5, [0]  # labels that are out of range

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(1)
        yield (*draw(generator, 0, 12, 9), 0.5, 4, 0.5, 0.5, [0])
        for height, width in ((0, 5), (5, 0), (0, 0)):
            masks, scores, classes, sem_seg = draw(generator, 3, 5, 5, boxes=False)
            yield masks[:, :height, :width], scores, classes, sem_seg[:height, :width], 0.5, 4, 0.5, 0.5, [0]

    def error_cases(self) -> dict[str, ErrorCase]:
        masks, scores, classes, sem_seg = draw(torch.Generator().manual_seed(0), 3, 5, 6)
        good = {"masks": masks, "scores": scores, "classes": classes, "sem_seg": sem_seg}
        wrong: list[tuple[str, Tensor, type[Exception]]] = [
            ("masks", masks[0], ValueError),
            ("masks", masks.long(), TypeError),
            ("scores", scores[:2], ValueError),
            ("scores", scores.long(), TypeError),
            ("scores", scores.to("meta"), ValueError),
            ("classes", classes[None], ValueError),
            ("classes", classes.float(), TypeError),
            ("classes", classes.to("meta"), ValueError),
            ("sem_seg", sem_seg[:, :-1], ValueError),
            ("sem_seg", sem_seg[None], ValueError),
            ("sem_seg", sem_seg.double(), TypeError),
            ("sem_seg", sem_seg == 0, TypeError),
            ("sem_seg", sem_seg + 40_000, ValueError),
            ("sem_seg", sem_seg - 40_000, ValueError),
            ("sem_seg", torch.full_like(sem_seg, 2**63 - 1), ValueError),
            ("sem_seg", torch.full_like(sem_seg, -(2**63)), ValueError),
        ]
        cases = {}
        options = (0.5, 4096, 0.5, 0.5, [0])
        for index, (name, value, exception) in enumerate(wrong):
            bad = {**good, name: value}
            call = partial(panoptic_merge, **bad, stuff_area_limit=1)
            cases[f"function {name} {index}"] = ErrorCase(call, exception, name)
            if value.device.type == "cpu" and not (
                name == "sem_seg" and value.dtype == torch.int64 and value.dim() == 2
            ):
                raw = partial(torch.ops.convmask.panoptic_merge, *bad.values(), *options)
                cases[f"operator {name} {index}"] = ErrorCase(raw, Exception, name)
        return cases


def merge_with_detectron2(
    masks: Tensor, scores: Tensor, classes: Tensor, sem_seg: Tensor, overlap: float, area: int, score: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Detectron2's function, with instances sorted stably beforehand, since its own sort may swap equal scores."""
    order = torch.argsort(-scores, stable=True)
    instances = Instances((masks.shape[1], masks.shape[2]))
    # Differences far below the steps between scores make the order unique.
    instances.scores = scores[order].double() + torch.arange(len(order), 0, -1) * 1e-9
    instances.pred_masks, instances.pred_classes = masks[order], classes[order]
    panoptic_seg, segments_info = combine_semantic_and_instance_outputs(instances, sem_seg, overlap, area, score)
    for segment in segments_info:
        if segment["isthing"]:
            segment["instance_id"] = int(order[segment["instance_id"]])
            segment["score"] = float(scores[segment["instance_id"]])
    return panoptic_seg, segments_info


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    instances=st.integers(0, 8),
    height=st.integers(1, 40),
    width=st.integers(1, 150),
    kind=st.sampled_from(["boxes", "noise", "empty", "full"]),
    overlap_threshold=st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.9, 1.0]),
    stuff_area_limit=st.sampled_from([-1, 0, 1, 7, 64, 4096]),
    score_threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.6, 2.0]),
    label_offset=st.sampled_from([0, -2, 250, 30_000]),
)
def test_equals_detectron2(
    seed: int,
    instances: int,
    height: int,
    width: int,
    kind: str,
    overlap_threshold: float,
    stuff_area_limit: int,
    score_threshold: float,
    label_offset: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities, scores, classes, sem_seg = draw(generator, instances, height, width, boxes=kind == "boxes")
    masks = probabilities > 0.5
    if kind in ("empty", "full"):
        masks[: max(1, instances - 1)] = kind == "full"
    args = (masks, scores.float(), classes, sem_seg + label_offset)
    expected = merge_with_detectron2(*args, overlap_threshold, stuff_area_limit, score_threshold)
    actual = panoptic_merge(
        *args,
        overlap_threshold=overlap_threshold,
        stuff_area_limit=stuff_area_limit,
        score_threshold=score_threshold,
    )
    assert torch.equal(actual[0], expected[0])
    assert actual[0].dtype == torch.int32
    assert actual[1] == expected[1]


GOLDEN_CASES = [
    *("overlaps", "half_covered", "strict_overlap", "tiny_stuff", "stuff_at_limit", "no_instances", "all_low_scores"),
    *("score_at_threshold", "empty_mask", "all_covered", "only_things_label", "random"),
]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_panoptic_fpn_merge(case: str, golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    arrays = golden("panoptic_fpn")
    read = {key: arrays[f"combine/{case}/{key}"] for key in ("masks", "scores", "classes", "sem_seg", "panoptic_seg")}
    params = json.loads(str(arrays[f"combine/{case}/params"]))
    segments = json.loads(str(arrays[f"combine/{case}/panoptic_info"]))
    masks = np.unpackbits(read["masks"], axis=-1, count=params["width"]).astype(bool)
    panoptic_seg, segments_info = panoptic_merge(
        torch.from_numpy(masks),
        torch.from_numpy(read["scores"]),
        torch.from_numpy(read["classes"]),
        torch.from_numpy(read["sem_seg"]),
        overlap_threshold=params["overlap_threshold"],
        stuff_area_limit=params["stuff_area_thresh"],
        score_threshold=params["instances_score_thresh"],
    )
    assert torch.equal(panoptic_seg, torch.from_numpy(read["panoptic_seg"]))
    assert segments_info == segments


def test_segments_have_detectron2s_fields() -> None:
    masks = torch.zeros(1, 2, 4, dtype=torch.bool)
    masks[0, 0] = True
    sem_seg = torch.tensor([[5, 5, 5, 5], [5, 5, 0, 7]])
    panoptic_seg, segments_info = panoptic_merge(
        masks, torch.tensor([0.75]), torch.tensor([3]), sem_seg, stuff_area_limit=2
    )
    assert panoptic_seg.tolist() == [[1, 1, 1, 1], [2, 2, 0, 0]]
    assert segments_info == [
        {"id": 1, "isthing": True, "score": 0.75, "category_id": 3, "instance_id": 0},
        {"id": 2, "isthing": False, "category_id": 5, "area": 2},
    ]


@pytest.mark.parametrize("things_label", [[1, 255], (255, 1, 1), list(range(400))])
def test_things_labels_are_never_painted(things_label: list[int]) -> None:
    sem_seg = torch.tensor([[1, 1, 255, 600, 700]], dtype=torch.int32)
    masks, scores, classes = torch.zeros(0, 1, 5, dtype=torch.bool), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    panoptic_seg, segments_info = panoptic_merge(
        masks, scores, classes, sem_seg, stuff_area_limit=1, things_label=things_label
    )
    assert panoptic_seg.tolist() == [[0, 0, 0, 1, 2]]
    assert [segment["category_id"] for segment in segments_info] == [600, 700]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_at_the_threshold_belong_to_the_mask(dtype: torch.dtype) -> None:
    # 0.3 is no number of any of these types: it is rounded to the type, as in `masks >= 0.3`.
    below, above = torch.nextafter(torch.tensor(0.3), torch.tensor(0.0)), torch.tensor(0.31)
    masks = torch.tensor([[[0.3, below - 0.01, above, float("nan")]]]).to(dtype)
    sem_seg = torch.zeros(1, 4, dtype=torch.int64)
    panoptic_seg, _ = panoptic_merge(
        masks, torch.ones(1), torch.zeros(1, dtype=torch.int64), sem_seg, mask_threshold=float(masks[0, 0, 0])
    )
    assert panoptic_seg.tolist() == [[1, 0, 1, 0]]


def test_scores_are_compared_exactly() -> None:
    score = torch.tensor([0.1])  # float32: a little above 0.1
    masks, sem_seg = torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    classes = torch.zeros(1, dtype=torch.int64)
    for threshold, segments in ((0.1, 1), (float(score), 1), (float(score) + 1e-12, 0)):
        assert len(panoptic_merge(masks, score, classes, sem_seg, score_threshold=threshold)[1]) == segments


def test_a_nan_score_ranks_last() -> None:
    masks, sem_seg = torch.ones(2, 1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    classes, scores = torch.tensor([4, 6]), torch.tensor([float("nan"), 0.9])
    (segment,) = panoptic_merge(masks, scores, classes, sem_seg)[1]
    assert segment["category_id"] == 6


@pytest.mark.cuda
def test_cuda_merges_without_waiting_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = [t.cuda() for t in draw(torch.Generator().manual_seed(0), 6, 30, 41)]
    torch.ops.convmask.panoptic_merge(*args, 0.5, 20, 0.25, 0.5, [0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.convmask.panoptic_merge(*args, 0.5, 20, 0.25, 0.5, [0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
