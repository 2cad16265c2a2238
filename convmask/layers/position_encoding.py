"""Sine positional encoding of a map (DETR, arXiv 2005.12872)."""

from __future__ import annotations

import math

import torch

_EPSILON = 1e-6


def sine_position_encoding(
    height: int,
    width: int,
    channels: int,
    *,
    temperature: float = 10000.0,
    scale: float = 2 * math.pi,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Sines and cosines of each cell's row and column.

    Rows and columns count from 1 and are divided by their number, so that the last is at ``scale``. Channels 2k and
    2k + 1 of a half are the sine and the cosine of the position divided by ``temperature^(2k / (channels / 2))``.

    Args:
        height: of the map, as is ``width``.
        width: see above.
        channels: of the result, a multiple of 4. The first half encodes the row, the second the column.
        temperature: ratio of the longest to the shortest wave length.
        scale: position of the last row and column, in radians.
        device: of the result.

    Returns:
        (channels, height, width) float32, from -1 to 1.

    Raises:
        ValueError: ``channels`` is no multiple of 4.
    """
    if channels < 4 or channels % 4:
        raise ValueError(f"sine_position_encoding: channels is {channels}, no multiple of 4")
    half = channels // 2
    exponent = torch.arange(half, device=device) // 2 * 2 / half
    frequency = temperature**-exponent
    rows, columns = (_waves(size, scale, frequency) for size in (height, width))
    return torch.cat([rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)])


def _waves(size: int, scale: float, frequency: torch.Tensor) -> torch.Tensor:
    """(half, size): sines in the even, cosines in the odd rows."""
    position = torch.arange(1, size + 1, device=frequency.device, dtype=torch.float32)
    angle = position * (scale / (size + _EPSILON)) * frequency[:, None]
    return torch.stack([angle[0::2].sin(), angle[1::2].cos()], dim=1).flatten(0, 1)
