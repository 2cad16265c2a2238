"""Masks of which only a window is known, scaled to the size of the output: what lies outside is one value."""

from __future__ import annotations

import torch

Size = tuple[int, int]


def paste_windows(
    values: torch.Tensor,
    offsets: torch.Tensor,
    windows: torch.Tensor,
    *,
    size: Size,
    scaled: Size,
    output: Size,
    fill: float,
    threshold: float,
) -> torch.Tensor:
    """Scales maps bilinearly (corners not aligned) and compares them, inside their windows alone.

    The same as filling maps of ``size`` with ``fill`` outside the windows, ``F.interpolate`` to ``scaled``,
    ``> threshold``, and the corner of ``output``, without any map.

    Args:
        values: (P,), the windows row by row, one after the other.
        offsets: (n + 1,) int64: window k is ``values[offsets[k]:offsets[k + 1]]``.
        windows: (n, 4) int64 (x1, y1, x2, y2; the last two excluded), inside the map.
        size: (h, w) of the maps.
        scaled: (h', w') to which whole maps are scaled.
        output: (H, W), at most ``scaled``.
        fill: outside the windows, at most ``threshold``.
        threshold: pixels of a mask have a higher value.

    Returns:
        (n, H, W) bool.

    Raises:
        ValueError: ``fill`` is above the threshold, or ``output`` larger than ``scaled``.
    """
    if fill > threshold:
        raise ValueError(f"fill is {fill}, above the threshold {threshold}")
    if output[0] > scaled[0] or output[1] > scaled[1]:
        raise ValueError(f"output is {output}, larger than the scaled maps, {scaled}")
    count = len(windows)
    masks = torch.zeros(count, *output, dtype=torch.bool, device=values.device)
    rows = _Axis(size[0], scaled[0], output[0], values)
    columns = _Axis(size[1], scaled[1], output[1], values)
    starts = offsets.tolist()
    for index, (x1, y1, x2, y2) in enumerate(windows.tolist()):
        if x1 >= x2 or y1 >= y2:
            continue
        window = values[starts[index] : starts[index + 1]].view(y2 - y1, x2 - x1)
        window = torch.nn.functional.pad(window, (1, 1, 1, 1), value=fill)
        top, bottom = rows.reach(y1, y2)
        left, right = columns.reach(x1, x2)
        part = columns.mix(rows.mix(window, 0, y1, top, bottom), 1, x1, left, right)
        masks[index, top:bottom, left:right] = part > threshold
    return masks


class _Axis:
    """How the pixels of one side of the output are mixed of the cells of the map."""

    def __init__(self, size: int, scaled: int, output: int, like: torch.Tensor) -> None:
        self.size, self.scaled, self.output = size, scaled, output
        centers = (torch.arange(output, device=like.device, dtype=like.dtype) + 0.5) * (size / scaled) - 0.5
        centers = centers.clamp(min=0)
        self.first = centers.long().clamp(max=size - 1)
        self.second = (self.first + 1).clamp(max=size - 1)
        self.weight = centers - self.first

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """The pixels that cells ``start`` to ``stop`` have a part in: perhaps some more, never fewer."""
        ratio = self.scaled / self.size
        first = 0 if start == 0 else max(int((start - 0.5) * ratio) - 1, 0)
        last = self.output if stop == self.size else min(int((stop + 0.5) * ratio) + 2, self.output)
        return min(first, last), last

    def mix(self, window: torch.Tensor, dim: int, start: int, first: int, last: int) -> torch.Tensor:
        """Pixels ``first`` to ``last`` along ``dim``, of a window that begins at the cell before ``start``."""
        greatest = window.shape[dim] - 1
        near, far = (
            window.index_select(dim, (cells[first:last] - (start - 1)).clamp(min=0, max=greatest))
            for cells in (self.first, self.second)
        )
        weight = self.weight[first:last]
        return torch.lerp(near, far, weight[:, None] if dim == 0 else weight)
