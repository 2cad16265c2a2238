from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from convmask.ops import region_kernels, region_kernels_reference
from convmask.ops.region_kernels import region_kernels_backward_reference

from .operator_tester import ErrorCase, OperatorTester

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def draw(generator: torch.Generator, images: int, channels: int, regions: int, height: int, width: int) -> Any:
    kernel_map = torch.randn(images, channels, height, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(images, regions, height, width, generator=generator, dtype=torch.float64)
    return kernel_map, weights


class TestRegionKernels(OperatorTester):
    operator = "region_kernels"
    reference = staticmethod(region_kernels_reference)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances = TOLERANCES
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for over_region in (False, True):
            kernel_map, weights = draw(generator, 2, 3, 4, 5, 7)
            masks = weights > 0.5
            masks[0, 1] = False
            yield kernel_map, masks, over_region
            yield kernel_map, weights, over_region

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(1)
        for images, channels, regions, height, width in (
            *((2, 3, 0, 4, 5), (0, 3, 2, 4, 5), (2, 0, 2, 4, 5)),
            *((2, 3, 2, 0, 5), (2, 3, 2, 4, 0)),
        ):
            kernel_map, weights = draw(generator, images, channels, regions, height, width)
            yield kernel_map, weights > 0.5, True

    def error_cases(self) -> dict[str, ErrorCase]:
        kernel_map, weights = draw(torch.Generator().manual_seed(0), 2, 3, 4, 5, 7)
        wrong = wrong_values(weights) | {
            "kernel_map 0": (kernel_map[0], ValueError),
            "kernel_map 1": (kernel_map[:, :, :-1], ValueError),
            "kernel_map 2": (kernel_map[:1], ValueError),
            "kernel_map 3": (kernel_map.long(), TypeError),
        }
        cases = {}
        for label, (value, exception) in wrong.items():
            name = label.split()[0]
            bad = {"kernel_map": kernel_map, "masks": weights, name: value}
            cases[f"function {label}"] = ErrorCase(partial(region_kernels, **bad), exception, name)
            if value.device.type == "cpu":
                raw = partial(torch.ops.convmask.region_kernels, *bad.values(), False)
                cases[f"operator {label}"] = ErrorCase(raw, exception, name)
        needs_gradient = partial(region_kernels, kernel_map, weights.clone().requires_grad_())
        cases["function masks require a gradient"] = ErrorCase(needs_gradient, ValueError, "masks")
        unknown: Any = "mean"
        cases["average"] = ErrorCase(
            partial(region_kernels, kernel_map, weights, average=unknown), ValueError, "average"
        )
        return cases


class TestRegionKernelsBackward(OperatorTester):
    operator = "region_kernels_backward"
    reference = staticmethod(region_kernels_backward_reference)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances = TOLERANCES
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for over_region in (False, True):
            gradient = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
            _, weights = draw(generator, 2, 3, 4, 5, 7)
            masks = weights > 0.5
            masks[0, 1] = False
            yield gradient, masks, over_region
            yield gradient, weights, over_region

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        for images, channels, regions, height, width in ((2, 3, 0, 4, 5), (0, 3, 2, 4, 5), (2, 3, 2, 4, 0)):
            gradient = torch.ones(images, regions, channels, dtype=torch.float64)
            yield gradient, torch.ones(images, regions, height, width, dtype=torch.bool), True

    def error_cases(self) -> dict[str, ErrorCase]:
        gradient = torch.ones(2, 4, 3)
        masks = torch.ones(2, 4, 5, 7)
        wrong = wrong_values(masks) | {
            "gradient 0": (gradient[0], ValueError),
            "gradient 1": (gradient[:, :2], ValueError),
            "gradient 2": (gradient.long(), TypeError),
        }
        cases = {}
        for label, (value, exception) in wrong.items():
            if value.device.type == "cpu":
                arguments = {"gradient": gradient, "masks": masks, label.split()[0]: value}
                raw = partial(torch.ops.convmask.region_kernels_backward, *arguments.values(), False)
                cases[label] = ErrorCase(raw, exception, label.split()[0])
        return cases


def wrong_values(masks: Tensor) -> dict[str, tuple[Tensor, type[Exception]]]:
    return {
        "masks 0": (masks[0], ValueError),
        "masks 1": (masks.long(), TypeError),
        "masks 2": (masks.to("meta"), ValueError),
    }


def product_of_the_release(kernel_map: Tensor, masks: Tensor) -> Tensor:
    """(N, K, C): the map times each mask, (N, K, C, H, W), averaged over all cells."""
    product = kernel_map.unsqueeze(1) * masks.unsqueeze(2)
    return functional.adaptive_avg_pool2d(product.flatten(0, 1), 1).view(product.shape[:3])


def means_over_regions(kernel_map: Tensor, masks: Tensor) -> Tensor:
    """(N, K, C), as loops over images and regions."""
    kernels = kernel_map.new_zeros(*masks.shape[:2], kernel_map.shape[1])
    for image in range(masks.shape[0]):
        for region in range(masks.shape[1]):
            if masks[image, region].any():
                kernels[image, region] = kernel_map[image][:, masks[image, region]].mean(dim=1)
    return kernels


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 3),
    channels=st.integers(1, 9),
    regions=st.integers(0, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_equals_the_release_and_the_paper(
    seed: int, images: int, channels: int, regions: int, height: int, width: int, density: float
) -> None:
    kernel_map, weights = draw(torch.Generator().manual_seed(seed), images, channels, regions, height, width)
    masks = weights < density
    if regions:  # adaptive_avg_pool2d takes no empty batch
        expected = product_of_the_release(kernel_map, masks)
        torch.testing.assert_close(region_kernels(kernel_map, masks), expected, rtol=1e-10, atol=1e-10)
    expected = means_over_regions(kernel_map, masks)
    torch.testing.assert_close(region_kernels(kernel_map, masks, average="region"), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("average", "definition"), [("map", product_of_the_release), ("region", means_over_regions)])
def test_gradients_equal_those_of_the_definition(average: Any, definition: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel_map, weights = draw(generator, 2, 3, 4, 5, 7)
    masks = weights > 0.7
    weight_of_kernels = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    gradients = []
    for function in (partial(region_kernels, average=average), definition):
        leaf = kernel_map.clone().requires_grad_()
        (function(leaf, masks) * weight_of_kernels).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_second_derivatives() -> None:
    kernel_map, weights = draw(torch.Generator().manual_seed(0), 1, 2, 3, 4, 4)
    masks = weights > 0.5
    for average in ("map", "region"):
        function = partial(region_kernels, masks=masks, average=average)
        torch.autograd.gradgradcheck(function, kernel_map.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_are_wide(dtype: torch.dtype) -> None:
    """The sum, 250000, is above the largest float16, and the share of a cell is below the smallest normal one."""
    kernel_map = torch.full((1, 1, 250, 250), 4.0, dtype=dtype, requires_grad=True)
    masks = torch.ones(1, 1, 250, 250, dtype=torch.bool)
    kernels = region_kernels(kernel_map, masks)
    assert kernels.dtype == dtype
    assert kernels.item() == 4
    (64 * kernels).sum().backward()
    assert kernel_map.grad is not None
    assert kernel_map.grad.dtype == dtype
    torch.testing.assert_close(kernel_map.grad[0, 0, 0, 0].float(), torch.tensor(64 / 62500), rtol=1e-2, atol=0)


def test_regions_may_overlap_and_be_soft() -> None:
    kernel_map = torch.tensor([[[[1.0, 2.0, 3.0, 6.0]]]])
    masks = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    assert region_kernels(kernel_map, masks).flatten().tolist() == [0.75, 0.625, 0.0]
    assert region_kernels(kernel_map, masks, average="region").flatten().tolist() == [1.5, 2.5, 0.0]
