"""From masks at the common stride to masks and boxes at the size of the output.

The release scales each mask up by the stride, cuts the padding off and scales it to the output, all at full size. Here
a mask is scaled inside the box of its cells alone: interpolated values are means of cells, so that nothing outside can
pass the threshold. Maps of stuff are scaled strip by strip, so that what is added up stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .resize import linear_taps

Size = tuple[int, int]


def rescale(x: torch.Tensor, stride: int, image: Size, output: Size) -> torch.Tensor:
    """Scales (n, h, w) maps up by ``stride``, cuts to ``image`` (without padding) and scales to ``output``."""
    x = F.interpolate(x[None], scale_factor=stride, mode="bilinear", align_corners=False)[..., : image[0], : image[1]]
    if image != output:
        x = F.interpolate(x, size=output, mode="bilinear", align_corners=False)
    return x[0]


def strips(x: torch.Tensor, stride: int, image: Size, output: Size, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The result of :func:`rescale` in pieces (n, at most ``rows``, W), each with its first row, from top to bottom."""
    top, bottom, weight = linear_taps(image[0], output[0], x.device)
    firsts, lasts = top[::rows].tolist(), bottom[rows - 1 :: rows].tolist()
    # the last strip may be shorter
    lasts += bottom[-1:].tolist() if len(lasts) < len(firsts) else []
    for start, first, last in zip(range(0, output[0], rows), firsts, lasts, strict=True):
        # a cell more on either side: pixels at the border of a cell are made of two
        cell = max(first // stride - 1, 0)
        cells = x[:, cell : last // stride + 2]
        up = F.interpolate(cells[None], scale_factor=stride, mode="bilinear", align_corners=False)[0, ..., : image[1]]
        here = slice(start, start + rows)
        if image[0] == output[0]:
            up = up[:, start - cell * stride : min(start + rows, image[0]) - cell * stride]
        else:
            above, below = (up.index_select(1, tap[here] - cell * stride) for tap in (top, bottom))
            up = torch.lerp(above, below, weight[here, None])
        if image[1] != output[1]:
            size = up.shape[1], output[1]
            up = F.interpolate(up[None], size=size, mode="bilinear", align_corners=False)[0]
        yield start, up


def output_masks(
    probabilities: torch.Tensor, threshold: float, stride: int, image: Size, output: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks at the size of the output, and their boxes.

    Args:
        probabilities: (n, h, w) at the common stride, of the padded image.
        threshold: pixels of a mask have a higher probability.
        stride: the common stride.
        image: height and width of the image without padding, as the network saw it.
        output: height and width of the result.

    Returns:
        (n, H, W) bool, and (n, 4) float boxes around them, right and bottom excluded; zeros around an empty mask.
    """
    masks = torch.zeros(len(probabilities), *output, dtype=torch.bool, device=probabilities.device)
    rows = torch.zeros(len(masks), output[0], dtype=torch.bool, device=masks.device)
    columns = torch.zeros(len(masks), output[1], dtype=torch.bool, device=masks.device)
    # maxima of floats are much faster than `any`
    spans_y, spans_x = (_spans(probabilities.amax(dim) > threshold) for dim in (2, 1))
    for index, (vertical, horizontal) in enumerate(zip(spans_y, spans_x, strict=True)):
        if vertical[1] == 0:
            continue
        window = probabilities[index, vertical[0] : vertical[1], horizontal[0] : horizontal[1]]
        y = _Side(*vertical, stride, image[0], output[0])
        x = _Side(*horizontal, stride, image[1], output[1])
        if y.empty or x.empty:
            continue
        up = F.interpolate(window[None, None], scale_factor=stride, mode="bilinear", align_corners=False)[0, 0]
        scaled = x.scale(y.scale(up, 0), 1)
        inside = torch.gt(scaled, threshold, out=masks[index, y.first : y.last, x.first : x.last])
        rows[index, y.first : y.last] = scaled.amax(dim=1) > threshold
        columns[index, x.first : x.last] = inside.any(dim=0)
    return masks, torch.cat([_ends(columns), _ends(rows)], dim=1)[:, [0, 2, 1, 3]].float()


class _Side:
    """One side of a window of cells: which pixels of the output it reaches, and how they are made of its pixels."""

    def __init__(self, first: int, last: int, stride: int, image: int, output: int) -> None:
        """``first`` to ``last``: cells; ``image`` and ``output``: lengths of the whole side."""
        self.start, self.stop = first * stride, min(last * stride, image)
        self.identity = image == output
        if self.identity:
            self.first, self.last = self.start, self.stop
        else:
            # one pixel more at either end than the centre of the scaled pixel says
            self.first = max(int(self.start * output / image) - 1, 0)
            self.last = min(int(self.stop * output / image) + 2, output)
        self.image, self.output = image, output
        self.empty = self.start >= self.stop

    def scale(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Interpolates pixels of the upsampled window along ``dim`` to pixels ``first`` to ``last`` of the output."""
        length = self.stop - self.start
        if self.identity:
            return x.narrow(dim, 0, length)
        taps = linear_taps(self.image, self.output, x.device)
        left, right, weight = (tap[self.first : self.last] for tap in taps)
        # beyond the window there is nothing above the threshold: its border stands for it
        left, right = ((tap - self.start).clamp(min=0, max=length - 1) for tap in (left, right))
        weight = weight[:, None] if dim == 0 else weight
        return torch.lerp(x.index_select(dim, left), x.index_select(dim, right), weight)


def _spans(any_cell: torch.Tensor) -> list[tuple[int, int]]:
    """First and last + 1 cell of each mask along a side, one more on either end; (0, 0) for an empty one."""
    ends = _ends(any_cell)
    size = any_cell.shape[1]
    ends = torch.stack([(ends[:, 0] - 1).clamp(min=0), (ends[:, 1] + 1).clamp(max=size)], dim=1)
    ends[~any_cell.any(dim=1)] = 0
    return [(first, last) for first, last in ends.tolist()]


def _ends(filled: torch.Tensor) -> torch.Tensor:
    """(n, 2) first index and last index + 1 of (n, length) bool; zeros where there is none."""
    length = filled.shape[1]
    values = filled.byte()
    first = values.argmax(dim=1)
    last = length - values.flip(1).argmax(dim=1)
    return torch.stack([first, last], dim=1) * filled.any(dim=1, keepdim=True)
