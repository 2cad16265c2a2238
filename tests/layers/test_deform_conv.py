from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from convmask.layers import DeformConv2d


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
