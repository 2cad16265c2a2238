from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmask.ops import fuse_kernels, fuse_kernels_reference

from .operator_tester import ErrorCase, OperatorTester

Sample = tuple[Tensor, Tensor, Tensor]


def draw(generator: torch.Generator, kernels: int, dims: int, objects: int, classes: int = 3) -> Sample:
    """Kernels around a few directions, lengths from 0.1 to 10, scores in steps of 1/64 (so there are ties)."""
    directions = torch.randn(max(objects, 1), dims, generator=generator, dtype=torch.float64)
    chosen = torch.randint(max(objects, 1), (kernels,), generator=generator)
    noise = torch.randn(kernels, dims, generator=generator, dtype=torch.float64)
    lengths = 10 ** (2 * torch.rand(kernels, 1, generator=generator, dtype=torch.float64) - 1)
    scores = torch.randint(65, (kernels,), generator=generator).double() / 64
    return (directions[chosen] + 0.3 * noise) * lengths, scores, torch.randint(classes, (kernels,), generator=generator)


class TestFuseKernels(OperatorTester):
    operator = "fuse_kernels"
    reference = staticmethod(fuse_kernels_reference)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # noqa: RUF012
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        yield *draw(generator, 7, 5, 3), 0.85, True
        yield *draw(generator, 40, 19, 6), 0.8, False  # more than a tile of the kernel, dimensions that fill no vector
        yield *draw(generator, 35, 32, 4), 0.9, True
        yield *draw(generator, 18, 1, 2), 0.5, False  # cosines are 1 and -1
        yield *draw(generator, 6, 4, 2), -2.0, False  # all are similar
        yield *draw(generator, 6, 4, 2), 2.0, False  # none is similar to another

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(1)
        yield *draw(generator, 0, 8, 1), 0.9, True
        yield *draw(generator, 3, 0, 1), 0.9, True

    def error_cases(self) -> dict[str, ErrorCase]:
        kernels, scores, classes = draw(torch.Generator().manual_seed(0), 3, 4, 2)
        good = {"kernels": kernels, "scores": scores, "classes": classes}
        wrong: list[tuple[str, Tensor, type[Exception]]] = [
            ("kernels", kernels[0], ValueError),
            ("kernels", kernels.long(), TypeError),
            ("scores", scores[:2], ValueError),
            ("scores", scores[None], ValueError),
            ("scores", scores.long(), TypeError),
            ("scores", scores.to("meta"), ValueError),
            ("classes", classes[:2], ValueError),
            ("classes", classes.float(), TypeError),
            ("classes", classes.to("meta"), ValueError),
        ]
        cases = {}
        for index, (name, value, exception) in enumerate(wrong):
            bad = {**good, name: value}
            cases[f"function {name} {index}"] = ErrorCase(partial(fuse_kernels, **bad), exception, name)
            if value.device.type == "cpu":
                raw = partial(torch.ops.convmask.fuse_kernels, *bad.values(), 0.9, True)
                cases[f"operator {name} {index}"] = ErrorCase(raw, Exception, name)
        return cases


def fuse_as_the_release(
    kernels: Tensor, classes: Tensor, threshold: float, class_specific: bool
) -> tuple[Tensor, Tensor]:
    """The release's rule, as plain loops over kernels in descending order of score: fused kernels, and who is kept."""
    number = len(kernels)
    unit = [kernel / max(float(kernel.norm()), 1e-8) for kernel in kernels]
    similar = [[False] * number for _ in range(number)]
    for i in range(number):
        for j in range(i, number):
            same_class = not class_specific or int(classes[i]) == int(classes[j])
            similar[i][j] = float(unit[i] @ unit[j]) >= threshold and same_class
    covered = [[sum(similar[k][j] for k in range(i + 1)) for j in range(number)] for i in range(number)]  # up to row i
    kept = [i for i in range(number) if covered[i][i] < 2]
    fused = [
        kernels[[j for j in range(number) if similar[i][j] and covered[i][j] < 2] or [i]].mean(dim=0) for i in kept
    ]
    return torch.stack(fused) if fused else kernels, torch.tensor(kept, dtype=torch.int64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, 40),
    dims=st.integers(1, 40),
    objects=st.integers(1, 8),
    threshold=st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.97]),
    class_specific=st.booleans(),
)
def test_equals_the_release(
    seed: int, number: int, dims: int, objects: int, threshold: float, class_specific: bool
) -> None:
    kernels, scores, classes = draw(torch.Generator().manual_seed(seed), number, dims, objects)
    order = torch.argsort(-scores, stable=True)
    expected, kept = fuse_as_the_release(kernels[order], classes[order], threshold, class_specific)
    fused, indices = fuse_kernels(kernels, scores, classes, threshold=threshold, class_specific=class_specific)
    assert torch.equal(indices, order[kept])
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)


def directions(*degrees: float) -> Tensor:
    """Unit vectors in a plane: kernels are similar if their angles are close."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def groups_of(
    kernels: Tensor, scores: list[float], classes: list[int], *, threshold: float = 0.9, class_specific: bool = True
) -> list[int]:
    """The row of each kernel. The fused kernels are checked against the means of these groups."""
    tensors = kernels, torch.tensor(scores, dtype=torch.float64), torch.tensor(classes)
    fused, kept, groups, count = torch.ops.convmask.fuse_kernels(*tensors, threshold, class_specific)
    for row in range(len(kernels)):
        if row < count:
            assert groups[kept[row]] == row
            torch.testing.assert_close(fused[row], kernels[groups == row].mean(dim=0))
        else:
            assert kept[row] == -1
            assert not fused[row].any()
    result: list[int] = groups.tolist()
    return result


def test_chain_the_last_is_dropped_with_the_suppressed_one_between() -> None:
    # cos 20 degrees is 0.94, cos 40 is 0.77: A ~ B, B ~ C, A !~ C.
    assert groups_of(directions(0, 20, 40), [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 0, -1]


def test_chain_the_middle_one_first_takes_both_ends() -> None:
    assert groups_of(directions(0, 20, 40), [0.8, 0.9, 0.7], [0, 0, 0]) == [0, 0, 0]


def test_chain_only_the_first_that_covers_a_kernel_takes_it() -> None:
    # The last lies between two that are kept.
    assert groups_of(directions(0, 40, 20), [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 1, 0]


def test_classes_are_fused_apart_unless_told_otherwise() -> None:
    kernels = directions(0, 1, 2, 3)
    assert groups_of(kernels, [0.9, 0.8, 0.7, 0.6], [4, 2, 4, 2]) == [0, 1, 0, 1]
    assert groups_of(kernels, [0.9, 0.8, 0.7, 0.6], [4, 2, 4, 2], class_specific=False) == [0, 0, 0, 0]


def test_equal_scores_keep_their_order() -> None:
    kernels = directions(0, 20, 40)
    assert groups_of(kernels, [0.5, 0.5, 0.5], [0, 0, 0]) == [0, 0, -1]
    assert groups_of(kernels.flip(0), [0.5, 0.5, 0.5], [0, 0, 0]) == [0, 0, -1]
    assert groups_of(kernels, [0.5, 0.25, 0.5], [0, 0, 0]) == [0, 0, 1]


def test_a_nan_score_ranks_last() -> None:
    assert groups_of(directions(0, 90), [float("nan"), 0.1], [0, 0]) == [1, 0]


def test_a_cosine_at_the_threshold_is_similar() -> None:
    kernels = torch.tensor([[2.0, 0.0], [3.0, 4.0]])  # cosine 3/5
    for threshold, rows in ((0.6, 1), (0.6001, 2)):
        fused, _ = fuse_kernels(
            kernels, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64), threshold=threshold
        )
        assert len(fused) == rows


def test_the_length_of_a_kernel_does_not_matter_for_similarity_but_for_the_mean() -> None:
    kernels = torch.tensor([[1e-3, 0.0], [1e3, 0.0]])
    fused, _ = fuse_kernels(kernels, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(fused, kernels.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("class_specific", [True, False])
def test_kernels_of_zeros_stay_as_they_are(class_specific: bool) -> None:
    kernels = torch.zeros(4, 3)
    kernels[1, 0] = 1
    classes = torch.zeros(4, dtype=torch.int64)
    fused, kept = fuse_kernels(kernels, torch.tensor([0.9, 0.8, 0.7, 0.6]), classes, class_specific=class_specific)
    assert torch.equal(fused, kernels)
    assert kept.tolist() == [0, 1, 2, 3]


def test_a_kernel_with_nan_stays_alone() -> None:
    kernels = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [1.0, 0.0]])
    fused, kept = fuse_kernels(kernels, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64))
    assert kept.tolist() == [0, 1]
    assert fused[0].tolist() == [1, 0]


def test_one_kernel_and_none() -> None:
    for number in (1, 0):
        kernels = torch.full((number, 5), 3.0)
        fused, kept = fuse_kernels(kernels, torch.ones(number), torch.zeros(number, dtype=torch.int64))
        assert torch.equal(fused, kernels)
        assert torch.equal(kept, torch.arange(number))


def test_many_kernels_equal_the_reference() -> None:
    """More kernels than a thread takes, in blocks that are skipped after the first part and in others."""
    kernels, scores, classes = draw(torch.Generator().manual_seed(3), 600, 64, 200, classes=2)
    for class_specific in (True, False):
        arguments = kernels, scores, classes, 0.9, class_specific
        actual, expected = torch.ops.convmask.fuse_kernels(*arguments), fuse_kernels_reference(*arguments)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.cuda
def test_cuda_fuses_without_waiting_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = [t.cuda() for t in draw(torch.Generator().manual_seed(0), 40, 19, 6)]
    torch.ops.convmask.fuse_kernels(*args, 0.9, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.convmask.fuse_kernels(*args, 0.9, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
