"""Deformable convolution on the CPU, from PyTorch's embedding bags.

A sample between cells is a weighted sum of four rows of the table of all cells: an embedding bag of four, for which
PyTorch has vectorised kernels in both directions. torchvision's operator works cell by cell and channel by channel
there; its backward takes most of a training step.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from convmask.utils.exporting import exporting


def deform_conv2d_by_bags(
    x: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torchvision.ops.deform_conv2d`` with one group, up to rounding. Cells outside the input count as 0.

    Args:
        x: (N, C, H, W) float32 or float64, as are all tensors.
        offset: (N, 2 * T, H', W'), (dy, dx) of each of the T taps of the kernel in row-major order.
        weight: (C', C, h, w), T = h * w.
        bias: (C',).
        stride: as are the next two, of both sides, as in :func:`torch.nn.functional.conv2d`.
        padding: see above.
        dilation: see above.
        mask: (N, T, H', W') factor of each tap.

    Returns:
        (N, C', H', W').
    """
    count, channels, height, width = x.shape
    taps = weight.shape[2] * weight.shape[3]
    out_height, out_width = offset.shape[2:]
    tap = torch.arange(taps, device=x.device)
    base_y = _base(out_height, tap // weight.shape[3], stride, padding, dilation)[:, :, None]
    base_x = _base(out_width, tap % weight.shape[3], stride, padding, dilation)[:, None, :]
    offset = offset.unflatten(1, (taps, 2))
    rows, row_weights = _neighbours(base_y + offset[:, :, 0], height)
    columns, column_weights = _neighbours(base_x + offset[:, :, 1], width)
    # (2, 2, N, T, H', W'): the corners of each sample
    image = torch.arange(count, device=x.device).view(count, 1, 1, 1) * (height * width)
    cells = rows[:, None] * width + columns + image
    weights = row_weights[:, None] * column_weights
    if mask is not None:
        weights = weights * mask
    # (N * H' * W' * T, 4)
    cells, weights = (part.flatten(0, 1).permute(1, 3, 4, 2, 0).reshape(-1, 4) for part in (cells, weights))
    table = x.permute(0, 2, 3, 1).reshape(-1, channels)
    if exporting():
        samples = (table[cells] * weights[:, :, None]).sum(dim=1)
    else:
        samples = F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
    matrix = weight.permute(2, 3, 1, 0).reshape(taps * channels, -1)
    samples = samples.view(count * out_height * out_width, taps * channels)
    result = samples @ matrix if bias is None else torch.addmm(bias, samples, matrix)
    return result.view(count, out_height, out_width, -1).permute(0, 3, 1, 2).contiguous()


def _base(length: int, tap: torch.Tensor, stride: int, padding: int, dilation: int) -> torch.Tensor:
    """(T, length): where the taps are without offsets."""
    return torch.arange(length, device=tap.device) * stride - padding + tap[:, None] * dilation


def _neighbours(position: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two cells around each position and their weights, (2, ...) each; 0 and 0 for cells that do not exist."""
    with torch.no_grad():
        before = position.floor()
        cells = torch.stack([before, before + 1])
        exists = (cells >= 0) & (cells < length)
        indices = torch.where(exists, cells, 0).long()
    fraction = position - before
    return indices, torch.where(exists, torch.stack([1 - fraction, fraction]), 0.0)
