"""The tester on an operator with a gradient, right and wrong, defined the way that docs/adding_an_operator.md says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from convmask.ops._registration import register_operator

from .operator_tester import ErrorCase, OperatorTester


def cube(x: Tensor, factor: float) -> Tensor:
    if x.dim() != 1:
        raise ValueError(f"x must have one dimension, not {x.dim()}")
    return factor * x**3


def cube_backward(gradient: Tensor, x: Tensor, factor: float) -> Tensor:
    return 3 * factor * gradient * x**2


def save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return torch.ops.convmask.tested_cube_backward(gradient, x, ctx.factor), None


def wrong_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return 2 * backward(ctx, gradient)[0], None


register_operator(
    "tested_cube_backward(Tensor gradient, Tensor x, float factor) -> Tensor",
    reference=cube_backward,
    fake=lambda gradient, x, factor: torch.empty_like(x),
)
for name, fake, derivative in (
    ("tested_cube", lambda x, factor: torch.empty_like(x), backward),
    ("tested_cube_wrong_gradient", lambda x, factor: torch.empty_like(x), wrong_backward),
    ("tested_cube_wrong_fake", lambda x, factor: x.new_empty(len(x) + 1), backward),
):
    register_operator(
        f"{name}(Tensor x, float factor) -> Tensor",
        **{"reference": cube, "fake": fake, "backward": derivative, "setup_context": save_input},
    )


class TestCube(OperatorTester):
    operator = "tested_cube"
    reference = staticmethod(cube)
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        yield torch.rand(7, generator=generator, dtype=torch.float64), 0.5

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        yield torch.zeros(0, dtype=torch.float64), 0.5

    def error_cases(self) -> dict[str, ErrorCase]:
        return {
            "two dimensions": ErrorCase(lambda: torch.ops.convmask.tested_cube(torch.zeros(1, 1), 1.0), ValueError, "x")
        }


class WrongGradient(TestCube):
    __test__ = False
    operator = "tested_cube_wrong_gradient"


class WrongFake(TestCube):
    __test__ = False
    operator = "tested_cube_wrong_fake"


class WrongReference(TestCube):
    __test__ = False
    reference = staticmethod(lambda x, factor: factor * x**3 + 1e-4)


CPU = torch.device("cpu")


def test_a_wrong_gradient_is_found() -> None:
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        WrongGradient().test_gradients(CPU)


def test_a_wrong_fake_kernel_is_found() -> None:
    with pytest.raises(AssertionError):
        WrongFake().test_fake_results_have_the_shapes_of_real_ones(CPU)


def test_a_wrong_result_is_found() -> None:
    with pytest.raises(AssertionError):
        WrongReference().test_equals_the_reference_in_float64(CPU, contiguous=True)


def test_a_missing_gradient_is_found() -> None:
    class MissingGradient(TestCube):
        operator = "tested_cube_backward"
        differentiable = (1,)

        def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
            x = torch.rand(3, generator=generator, dtype=torch.float64)
            yield x, x, 1.0

        def empty_samples(self) -> Iterator[tuple[Any, ...]]:
            yield from ()

    with pytest.raises(NotImplementedError, match="tested_cube_backward has no gradient"):
        MissingGradient().test_gradients(CPU)
