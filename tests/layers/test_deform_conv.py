from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from convmask.layers import DeformConv2d
from convmask.layers.deform_sampling import deform_conv2d_by_bags


def naive(layer: DeformConv2d, x: torch.Tensor) -> torch.Tensor:
    """Sums the taps, each sampled by ``grid_sample``, for stride 1 and padding 1."""
    predicted = layer.offset(x)
    height, width = x.shape[-2:]
    rows = torch.arange(height).float()[:, None]
    columns = torch.arange(width).float()
    total = torch.zeros(len(x), layer.weight.shape[0], height, width)
    for tap in range(9):
        y = rows + tap // 3 - 1 + predicted[:, 2 * tap]
        z = columns + tap % 3 - 1 + predicted[:, 2 * tap + 1]
        grid = torch.stack([2 * z / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
        sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        if layer.modulated:
            sampled = sampled * predicted[:, 18 + tap].sigmoid()[:, None]
        total += torch.einsum("nchw,oc->nohw", sampled, layer.weight[:, :, tap // 3, tap % 3])
    return total if layer.bias is None else total + layer.bias[:, None, None]


@pytest.mark.parametrize("modulated", [True, False])
def test_against_sampling_of_each_tap(modulated: bool) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, padding=1, modulated=modulated, zero_offsets=False)
    x = 3 * torch.randn(2, 4, 7, 9)
    torch.testing.assert_close(layer(x), naive(layer, x), atol=1e-4, rtol=1e-4)


def test_double_precision_stays() -> None:
    layer = DeformConv2d(4, 6, padding=1, modulated=True, zero_offsets=False).double()
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    found = layer(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, layer.float()(x.float()).double(), atol=1e-4, rtol=1e-4)


def test_begins_as_a_plain_convolution() -> None:
    layer = DeformConv2d(3, 5, padding=1, modulated=False, bias=False)
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1), atol=1e-5, rtol=1e-5)


def test_everything_learns() -> None:
    layer = DeformConv2d(3, 4, padding=1, zero_offsets=False, norm=torch.nn.GroupNorm(2, 4), activation=F.relu)
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        *("weight", "bias", "offset.weight", "offset.bias", "norm.weight", "norm.bias"),
    }


def test_runs_under_autocast() -> None:
    layer = DeformConv2d(3, 4, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 3, 8, 8)).isfinite().all()


@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    modulated=st.booleans(),
    reach=st.sampled_from([0.0, 1.0, 30.0]),
)
@settings(max_examples=20, deadline=None)
def test_bags_are_torchvisions_operator(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    modulated: bool,
    reach: float,
) -> None:
    """Values and all gradients, in double precision; with a reach of 30 cells most taps are outside."""
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    sides = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    if min(sides) < 1:
        return
    taps = kernel[0] * kernel[1]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight, bias = draw(2, 3, *size), draw(4, 3, *kernel), draw(4)
    offset = (reach * draw(2, 2 * taps, *sides)).detach().requires_grad_()
    mask = draw(2, taps, *sides) if modulated else None
    inputs = [t for t in (x, offset, weight, bias, mask) if t is not None]
    expected = deform_conv2d(x, offset, weight, bias, mask=mask, **options)
    found = deform_conv2d_by_bags(x, offset, weight, bias, mask=mask, **options)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, cotangent))


def test_offsets_that_are_not_numbers_give_nothing() -> None:
    offset = torch.full((1, 2, 2, 2), float("nan"))
    assert not deform_conv2d_by_bags(torch.ones(1, 1, 2, 2), offset, torch.ones(1, 1, 1, 1)).any()
