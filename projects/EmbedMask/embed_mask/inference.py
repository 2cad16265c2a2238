"""From embeddings to the masks of one image (arXiv 1912.01954, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from convmask.inference.windows import paste_windows
from convmask.ops.embedding_masks import ValuesInBoxes, embedding_masks_in_boxes

from .losses import margins_in_use

Size = tuple[int, int]

# Logarithm of the probability outside a box.
LOG_OUTSIDE = -10.0


@dataclass(frozen=True)
class MaskOptions:
    """See the keys of ``MODEL.EMBED_MASK.INFERENCE``.

    Attributes:
        threshold: pixels of a mask have a higher probability.
        values: "probability" or "logarithm", what is interpolated.
        cells: "near" or "wide", see :func:`mask_cells`.
        fixed_margin: takes the place of the predicted one; None: does not.
    """

    threshold: float = 0.5
    values: Literal["probability", "logarithm"] = "probability"
    cells: Literal["near", "wide"] = "near"
    fixed_margin: float | None = None

    @property
    def fill(self) -> float:
        """The value outside a box."""
        return 0.0 if self.values == "probability" else LOG_OUTSIDE

    @property
    def least(self) -> float:
        """Values of a mask are higher."""
        return self.threshold if self.values == "probability" else math.log(self.threshold)


def mask_cells(boxes: torch.Tensor, stride: int, cells: Literal["near", "wide"]) -> torch.Tensor:
    """(n, 4) int64: the cells (x1, y1, x2, y2; the last two excluded) in which the mask of each box is computed.

    Args:
        boxes: (n, 4) corners in pixels.
        stride: of the masks.
        cells: "near", cells c with x1 - 1 <= c < x2 + 1 (v0); "wide", two cells more than the box in whole cells (v2).
    """
    first, last = (boxes / stride).split(2, dim=1)
    if cells == "near":
        return torch.cat([(first - 1).ceil(), (last + 1).ceil()], dim=1).long()
    return torch.cat([first.trunc() - 2, last.trunc() + 2], dim=1).long()


def masks_in_boxes(
    pixels: torch.Tensor,
    proposals: torch.Tensor,
    margins: torch.Tensor,
    boxes: torch.Tensor,
    stride: int,
    options: MaskOptions,
) -> ValuesInBoxes:
    """Values of the masks in the cells of their boxes.

    Args:
        pixels: (D, h, w) at the stride of the masks.
        proposals: (n, D).
        margins: (n, M).
        boxes: (n, 4) corners in pixels.
        stride: of the masks.
        options: see :class:`MaskOptions`.
    """
    cells = mask_cells(boxes, stride, options.cells)
    inside = embedding_masks_in_boxes(pixels, proposals, margins_in_use(margins, options.fixed_margin), cells)
    return inside._replace(values=inside.values.exp()) if options.values == "probability" else inside


def output_masks(
    inside: ValuesInBoxes, size: Size, stride: int, image: Size, output: Size, options: MaskOptions
) -> torch.Tensor:
    """(n, H, W) bool masks at the size of the output.

    Maps are scaled (bilinear) from the padded image to its share of the output, rounded up, and cut.

    Args:
        inside: see :func:`masks_in_boxes`.
        size: (h, w) of the maps.
        stride: of the maps.
        image: height and width that the network saw, without padding.
        output: (H, W).
        options: see :class:`MaskOptions`.
    """
    scaled = tuple(math.ceil(cells * stride * new / old) for cells, new, old in zip(size, output, image, strict=True))
    return paste_windows(
        *inside,
        size=size,
        scaled=(scaled[0], scaled[1]),
        output=output,
        fill=options.fill,
        threshold=options.least,
    )
