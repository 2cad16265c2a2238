"""What every operator of ``torch.ops.convmask`` has to pass: a test file subclasses ``OperatorTester``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass(frozen=True)
class ErrorCase:
    """A call that must raise ``exception`` with a message that holds ``argument`` as a word."""

    call: Callable[[], Any]
    exception: type[Exception]
    argument: str


class OperatorTester:
    """Tests over device x dtype x contiguity x random samples.

    A subclass sets the class attributes and writes the first three methods. Samples are argument tuples of the operator
    (as in its schema, all positional) on the CPU, their floating tensors in float64; the tester casts and moves them.
    """

    operator: str  # its name in torch.ops.convmask
    reference: Callable[..., Any]  # the same arguments and results, in plain PyTorch; a staticmethod
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    tolerances: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-10,
        torch.float32: 1e-5,
    }  # absolute and relative
    differentiable: tuple[int, ...] = ()  # positions of the arguments that have gradients

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        """Ordinary inputs of several shapes."""
        raise NotImplementedError

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        """Inputs that have no elements in one dimension or another."""
        raise NotImplementedError

    def error_cases(self) -> dict[str, ErrorCase]:
        """Wrong calls of the public function, and of the operator."""
        raise NotImplementedError

    def call(self, args: tuple[Any, ...]) -> Any:
        return getattr(torch.ops.convmask, self.operator)(*args)

    @pytest.fixture
    def device(self, request: pytest.FixtureRequest) -> torch.device:
        if request.param == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return torch.device(request.param)

    def cases(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [*self.samples(generator), *self.empty_samples()]
        return [tree_map(lambda leaf: convert(leaf, device, dtype), sample) for sample in drawn]

    def one_ordinary_and_one_empty(self, device: torch.device) -> Iterator[tuple[Any, ...]]:
        """For tests that compile, which takes seconds."""
        for sample in (next(self.samples(torch.Generator().manual_seed(0))), next(self.empty_samples())):
            yield tree_map(lambda leaf: convert(leaf, device, self.dtypes[0]), sample)

    @pytest.mark.parametrize("contiguous", [True, False])
    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_equals_the_reference_in_float64(self, device: torch.device, contiguous: bool) -> None:
        for dtype in self.dtypes:
            for args in self.cases(device, dtype):
                expected = type(self).reference(*tree_map(lambda leaf: convert(leaf, device, torch.float64), args))
                actual = self.call(args if contiguous else tree_map(spread, args))
                assert_close(actual, expected, self.tolerances.get(dtype, 0.0))

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_opcheck(self, device: torch.device) -> None:
        operator = getattr(torch.ops.convmask, self.operator).default
        for args in self.one_ordinary_and_one_empty(device):
            torch.library.opcheck(operator, tuple(require_gradients(args, self.differentiable)))

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_fake_results_have_the_shapes_of_real_ones(self, device: torch.device) -> None:
        for dtype in self.dtypes:
            for args in self.cases(device, dtype):
                real = tensors(self.call(args))
                with FakeTensorMode() as mode:
                    fake = tensors(self.call(tree_map(lambda leaf: to_fake(leaf, mode), args)))
                assert [describe(t) for t in fake] == [describe(t) for t in real]

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_compiles_without_a_graph_break(self, device: torch.device) -> None:
        for args in self.one_ordinary_and_one_empty(device):
            torch._dynamo.reset()
            compiled = torch.compile(self.call, backend="aot_eager", fullgraph=True, dynamic=True)
            assert_close(compiled(args), self.call(args), 0.0)

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_gradients(self, device: torch.device) -> None:
        for args in self.cases(device, torch.float64):
            checked = require_gradients(args, self.differentiable)
            if self.differentiable:
                inputs = [checked[i] for i in self.differentiable]
                torch.autograd.gradcheck(lambda *_: self.call(tuple(checked)), inputs)  # noqa: B023
            else:
                floating = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
                assert not any(t.requires_grad for t in tensors(self.call(tuple(require_gradients(args, floating)))))

    def test_the_thread_count_does_not_change_a_bit(self) -> None:
        threads = torch.get_num_threads()
        try:
            for args in self.cases(torch.device("cpu"), self.dtypes[-1]):
                torch.set_num_threads(1)
                alone = self.call(args)
                torch.set_num_threads(2)
                assert_close(self.call(args), alone, 0.0)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_arguments_stay_as_they_are(self, device: torch.device) -> None:
        for args in self.cases(device, self.dtypes[0]):
            before = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, args)
            self.call(args)
            assert_close([a for a in args if isinstance(a, Tensor)], [b for b in before if isinstance(b, Tensor)], 0.0)

    def test_errors_name_the_argument(self) -> None:
        for label, case in self.error_cases().items():
            with pytest.raises(case.exception) as raised:
                case.call()
            assert re.search(rf"\b{case.argument}\b", str(raised.value)), f"{label}: {raised.value}"


def convert(leaf: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor to the device, and to the dtype if it is floating; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device, dtype if leaf.is_floating_point() else None)


def spread(leaf: Any) -> Any:
    """A tensor with the same values, of which no two neighbours lie side by side in memory."""
    return torch.stack([leaf, leaf], dim=-1)[..., 0] if isinstance(leaf, Tensor) else leaf


def require_gradients(args: tuple[Any, ...], positions: Any) -> list[Any]:
    return [a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args)]


def to_fake(leaf: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def describe(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Integers are equal; floating numbers are within the tolerance, whatever their dtype."""
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, check_dtype=not e.is_floating_point())
