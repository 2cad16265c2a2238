from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmask.ops import (
    embedding_masks,
    embedding_masks_in_boxes,
    embedding_masks_in_boxes_reference,
    embedding_masks_reference,
)
from convmask.ops.embedding_masks import (
    clamp_boxes,
    embedding_masks_backward_reference,
    embedding_masks_in_boxes_backward_reference,
)

from .operator_tester import DEVICES, ErrorCase, OperatorTester, require_gradients

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = ((3, 4, 3, 7), (2, 9, 2, 21), (1, 1, 4, 4), (9, 2, 1, 37))
EMPTY_SHAPES = ((0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6), (3, 4, 5, 0))


def draw(generator: torch.Generator, count: int, dims: int, height: int, width: int, *, scalar: bool) -> Any:
    """Pixels around the proposals, positive margins, and boxes of every kind: inside, across borders, empty."""
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    pixels = torch.randn(dims, height, width, **options)
    proposals = torch.randn(count, dims, **options)
    margins = 0.05 + torch.rand(*((count,) if scalar else (count, dims)), **options)
    first = torch.stack(
        [torch.randint(-2, max(side, 1), (count,), generator=generator) for side in (width, height)], dim=1
    )
    sides = torch.stack([torch.randint(-1, side + 3, (count,), generator=generator) for side in (width, height)], dim=1)
    return pixels, proposals, margins, torch.cat([first, first + sides], dim=1)


def area(boxes: Tensor, pixels: Tensor) -> int:
    cut = clamp_boxes(boxes, *pixels.shape[1:])
    return int(((cut[:, 2] - cut[:, 0]) * (cut[:, 3] - cut[:, 1])).sum())


def all_draws(generator: torch.Generator) -> Iterator[Any]:
    for shape in SHAPES:
        for scalar in (True, False):
            yield draw(generator, *shape, scalar=scalar)


def all_empty() -> Iterator[Any]:
    for shape in EMPTY_SHAPES:
        yield draw(torch.Generator().manual_seed(1), *shape, scalar=True)


def wrong_values(pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor) -> list[tuple[str, Tensor, Any]]:
    return [
        ("pixels", pixels[0], ValueError),
        ("pixels", pixels.long(), TypeError),
        ("proposals", proposals[:, 1:], ValueError),
        ("proposals", proposals[0], ValueError),
        ("proposals", proposals.float(), TypeError),
        ("proposals", proposals.to("meta"), ValueError),
        ("margins", margins[1:], ValueError),
        ("margins", margins.float(), TypeError),
        ("margins", margins.to("meta"), ValueError),
        ("boxes", boxes[1:], ValueError),
        ("boxes", boxes.double(), TypeError),
        ("boxes", boxes.to("meta"), ValueError),
    ]


def errors(function: Callable[..., Any], operator: Callable[..., Any], rest: tuple[Any, ...]) -> dict[str, ErrorCase]:
    arguments = draw(torch.Generator().manual_seed(0), 3, 4, 5, 6, scalar=True)
    good = dict(zip(("pixels", "proposals", "margins", "boxes"), arguments, strict=True))
    cases = {}
    for index, (name, value, exception) in enumerate(wrong_values(*arguments)):
        bad = {**good, name: value}
        cases[f"function {name} {index}"] = ErrorCase(partial(function, **bad), exception, name)
        if value.device.type == "cpu":
            cases[f"operator {name} {index}"] = ErrorCase(partial(operator, *bad.values(), *rest), Exception, name)
    return cases


class TestEmbeddingMasks(OperatorTester):
    operator = "embedding_masks"
    reference = staticmethod(embedding_masks_reference)
    dtypes = DTYPES
    tolerances = TOLERANCES
    differentiable = (0, 1, 2)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for pixels, proposals, margins, boxes in all_draws(generator):
            yield pixels, proposals, margins, boxes, -10.0
            yield pixels, proposals, margins, None, 0.0

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        for pixels, proposals, margins, boxes in all_empty():
            yield pixels, proposals, margins, boxes, -10.0
            yield pixels, proposals, margins, None, -10.0

    def error_cases(self) -> dict[str, ErrorCase]:
        return errors(embedding_masks, torch.ops.convmask.embedding_masks, (0.0,))


class TestEmbeddingMasksInBoxes(OperatorTester):
    operator = "embedding_masks_in_boxes"
    reference = staticmethod(embedding_masks_in_boxes_reference)
    dtypes = DTYPES
    tolerances = TOLERANCES
    differentiable = (0, 1, 2)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for pixels, proposals, margins, boxes in all_draws(generator):
            yield pixels, proposals, margins, boxes, area(boxes, pixels)

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        for pixels, proposals, margins, boxes in all_empty():
            yield pixels, proposals, margins, boxes, area(boxes, pixels)

    def error_cases(self) -> dict[str, ErrorCase]:
        operator = torch.ops.convmask.embedding_masks_in_boxes
        cases = errors(embedding_masks_in_boxes, operator, (0,))
        arguments = draw(torch.Generator().manual_seed(0), 3, 4, 5, 6, scalar=True)
        wrong = area(arguments[3], arguments[0]) + 1
        cases["operator size"] = ErrorCase(partial(operator, *arguments, wrong), Exception, "size")
        return cases


class BackwardTester(OperatorTester):
    """The second derivative is not there, and an attempt says so."""

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_gradients(self, device: torch.device) -> None:
        args = self.cases(device, torch.float64)[0]
        floating = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        results = self.call(tuple(require_gradients(args, floating)))
        with pytest.raises(NotImplementedError, match=self.operator):
            results[0].sum().backward()


class TestEmbeddingMasksBackward(BackwardTester):
    operator = "embedding_masks_backward"
    reference = staticmethod(embedding_masks_backward_reference)
    dtypes = DTYPES
    tolerances = {**TOLERANCES, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # noqa: RUF012

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for pixels, *others, boxes in all_draws(generator):
            shape = len(boxes), *pixels.shape[1:]
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield gradient, pixels, *others, boxes
            yield gradient, pixels, *others, None

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        for pixels, *others, boxes in all_empty():
            gradient = torch.ones(len(boxes), *pixels.shape[1:], dtype=torch.float64)
            yield gradient, pixels, *others, boxes
            yield gradient, pixels, *others, None

    def error_cases(self) -> dict[str, ErrorCase]:
        operator = torch.ops.convmask.embedding_masks_backward
        arguments = draw(torch.Generator().manual_seed(0), 3, 4, 5, 6, scalar=True)
        gradient = torch.ones(3, 5, 6, dtype=torch.float64)
        return {
            "shape": ErrorCase(partial(operator, gradient[1:], *arguments), Exception, "gradient"),
            "dtype": ErrorCase(partial(operator, gradient.float(), *arguments), Exception, "gradient"),
        }


class TestEmbeddingMasksInBoxesBackward(BackwardTester):
    operator = "embedding_masks_in_boxes_backward"
    reference = staticmethod(embedding_masks_in_boxes_backward_reference)
    dtypes = DTYPES
    tolerances = TestEmbeddingMasksBackward.tolerances

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for pixels, *others, boxes in all_draws(generator):
            gradient = torch.randn(area(boxes, pixels), generator=generator, dtype=torch.float64)
            yield gradient, pixels, *others, boxes

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        for pixels, *others, boxes in all_empty():
            yield torch.ones(area(boxes, pixels), dtype=torch.float64), pixels, *others, boxes

    def error_cases(self) -> dict[str, ErrorCase]:
        operator = torch.ops.convmask.embedding_masks_in_boxes_backward
        arguments = draw(torch.Generator().manual_seed(0), 3, 4, 5, 6, scalar=True)
        gradient = torch.ones(area(arguments[3], arguments[0]), dtype=torch.float64)
        return {
            "shape": ErrorCase(partial(operator, gradient[None], *arguments), Exception, "gradient"),
            "length": ErrorCase(partial(operator, gradient[1:], *arguments), Exception, "gradient"),
            "dtype": ErrorCase(partial(operator, gradient.float(), *arguments), Exception, "gradient"),
        }


def broadcast(pixels: Tensor, proposals: Tensor, margins: Tensor) -> Tensor:
    """The formula, with everything at once."""
    squares = (pixels[None] - proposals[:, :, None, None]).square()
    return -(margins.view(*margins.shape, *[1] * (4 - margins.dim())) * squares).sum(dim=1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 12),
    dims=st.integers(1, 40),
    height=st.integers(1, 12),
    width=st.integers(1, 60),
    scalar=st.booleans(),
)
def test_equals_the_formula(seed: int, count: int, dims: int, height: int, width: int, scalar: bool) -> None:
    pixels, proposals, margins, boxes = draw(
        torch.Generator().manual_seed(seed), count, dims, height, width, scalar=scalar
    )
    expected = broadcast(pixels, proposals, margins)
    torch.testing.assert_close(embedding_masks(pixels, proposals, margins), expected, rtol=1e-10, atol=1e-10)
    columns, rows = torch.arange(width), torch.arange(height)[:, None]
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    inside = (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
    limited = embedding_masks(pixels, proposals, margins, boxes, fill=-3.0)
    torch.testing.assert_close(limited, torch.where(inside, expected, -3.0), rtol=1e-10, atol=1e-10)
    values, offsets, cut = embedding_masks_in_boxes(pixels, proposals, margins, boxes)
    torch.testing.assert_close(values, expected[inside], rtol=1e-10, atol=1e-10)
    assert offsets.tolist() == [0, *inside.flatten(1).sum(1).cumsum(0).tolist()]
    assert torch.equal((cut[:, 2:] - cut[:, :2]).prod(1), inside.flatten(1).sum(1))


@pytest.mark.parametrize("scalar", [True, False])
def test_small_distances_do_not_cancel(scalar: bool) -> None:
    """Distances of a millionth of the embeddings' length, against float64; the expanded square has none of them."""
    generator = torch.Generator().manual_seed(0)
    proposals = 10 * torch.randn(8, 32, generator=generator)
    pixels = (proposals[0][:, None] + 1e-4 * torch.randn(32, 200, generator=generator)).view(32, 10, 20)
    margins = torch.rand(*((8,) if scalar else (8, 32)), generator=generator) + 0.1
    exact = broadcast(pixels.double(), proposals.double(), margins.double())
    found = embedding_masks(pixels, proposals, margins).double()
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=0)
    values = embedding_masks_in_boxes(pixels, proposals, margins, torch.tensor([[0, 0, 20, 10]] * 8)).values.double()
    torch.testing.assert_close(values.view_as(exact), exact, rtol=2e-6, atol=0)
    if scalar:
        squared = pixels.flatten(1).square().sum(0) + proposals.square().sum(1)[:, None]
        expanded = -margins[:, None] * (squared - 2 * proposals @ pixels.flatten(1))
        assert (expanded[0] - exact[0].flatten()).abs().max() > 10 * exact[0].abs().max()


def test_gradients_of_both_forms_agree() -> None:
    pixels, proposals, margins, boxes = draw(torch.Generator().manual_seed(2), 11, 16, 20, 50, scalar=False)
    cut = clamp_boxes(boxes, 20, 50)
    results = []
    for ragged in (False, True):
        leaves = [x.clone().requires_grad_() for x in (pixels, proposals, margins)]
        if ragged:
            loss = embedding_masks_in_boxes(*leaves, boxes).values.square().sum()
        else:
            loss = embedding_masks(*leaves, cut, fill=0.0).square().sum()
        loss.backward()
        results.append([leaf.grad for leaf in leaves])
    for dense, ragged_gradient in zip(*results, strict=True):
        torch.testing.assert_close(dense, ragged_gradient)


def test_what_lies_outside_a_box_does_not_reach_it() -> None:
    """Pixels beside narrow boxes, which vectors of lanes read along."""
    pixels, proposals, margins, _ = draw(torch.Generator().manual_seed(3), 2, 4, 8, 64, scalar=False)
    boxes = torch.tensor([[3, 1, 8, 5], [20, 2, 41, 8]])
    inside = torch.zeros(8, 64, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        inside[y1:y2, x1:x2] = True
    expected = embedding_masks_in_boxes(pixels, proposals, margins, boxes).values
    pixels[:, ~inside] = float("nan")
    assert torch.equal(embedding_masks_in_boxes(pixels, proposals, margins, boxes).values, expected)
    pixels[:, ~inside] = 1e30
    leaves = [x.clone().requires_grad_() for x in (pixels, proposals, margins)]
    embedding_masks_in_boxes(*leaves, boxes).values.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert all(leaf.grad.abs().max() < 1e3 for leaf in leaves)
    assert not leaves[0].grad[:, ~inside].any()


@pytest.mark.cuda
def test_cuda_does_not_wait_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pixels, proposals, margins, boxes = (
        x.cuda() for x in draw(torch.Generator().manual_seed(0), 5, 16, 20, 50, scalar=False)
    )
    size = area(boxes, pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = torch.ops.convmask.embedding_masks(pixels, proposals, margins, boxes, -10.0)
        torch.ops.convmask.embedding_masks_backward(values, pixels, proposals, margins, boxes)
        values = torch.ops.convmask.embedding_masks_in_boxes(pixels, proposals, margins, boxes, size)
        torch.ops.convmask.embedding_masks_in_boxes_backward(values, pixels, proposals, margins, boxes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
