"""Embedding-distance masks: how far the embedding of each pixel is from the embedding of each proposal.

    value[k, y, x] = - sum over d of margin[k, d] (pixel[d, y, x] - proposal[k, d])^2

is the logarithm of the mask probability in EmbedMask (Ying et al., arXiv 1912.01954, equation 4), where a margin is
1 / (2 sigma^2); it may be one number for all dimensions. Differences are squared as they are. The square expanded into
a matrix product, ``p^2 - 2 p q + q^2``, loses small distances to cancellation, and they are those inside the objects.

Two forms: the whole map of each proposal, or the values inside its box alone, one box after the other. Nothing of the
size (K, D, H, W) is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convmask.ops._registration import register_operator

_ARGUMENTS = "Tensor pixels, Tensor proposals, Tensor margins"
_SLOWDOWN = "about 7 to 25 times slower"


def embedding_masks(
    pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor | None = None, *, fill: float = -10.0
) -> Tensor:
    """Logarithms of mask probabilities, a map for each proposal (formula: see the module).

    All tensors are on one device. Differentiable, once, in the first three, if all pixels are finite, those outside the
    boxes too. Computed in float32, or in float64 for float64; the result does not depend on the number of threads.

    Args:
        pixels: (D, H, W) float16, bfloat16, float32 or float64.
        proposals: (K, D) of the same dtype.
        margins: (K,) or (K, D) of the same dtype; larger is tighter.
        boxes: (K, 4) int64, the cells (x1, y1, x2, y2) of each proposal, x2 and y2 excluded. What lies outside the map
            is cut off. None: the whole map.
        fill: the value outside the box.

    Returns:
        (K, H, W), at most 0, of the same dtype.

    Raises:
        ValueError: a shape or device does not fit; names the argument.
        TypeError: a dtype does not fit; names the argument.
    """
    _check(pixels, proposals, margins, boxes)
    values: Tensor = torch.ops.convmask.embedding_masks(pixels, proposals, margins, boxes, float(fill))
    return values


class ValuesInBoxes(NamedTuple):
    """What :func:`embedding_masks_in_boxes` returns.

    Attributes:
        values: (P,), row by row, one box after the other.
        offsets: (K + 1,) int64: the values of box k are ``values[offsets[k]:offsets[k + 1]]``.
        boxes: (K, 4) int64, cut to the map; of an empty one x2 is x1, or y2 is y1.
    """

    values: Tensor
    offsets: Tensor
    boxes: Tensor


def embedding_masks_in_boxes(pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor) -> ValuesInBoxes:
    """The same values inside the boxes alone: memory is proportional to their area.

    The number of values is read from the device; the operator below, ``torch.ops.convmask.embedding_masks_in_boxes``,
    is told it and does not wait.

    Args:
        pixels: as all arguments, see :func:`embedding_masks`.

    Raises:
        ValueError, TypeError: see :func:`embedding_masks`.
    """
    _check(pixels, proposals, margins, boxes)
    inside = clamp_boxes(boxes, pixels.shape[1], pixels.shape[2])
    areas = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    offsets = torch.cat([areas.new_zeros(1), areas.cumsum(0)])
    size = int(offsets[-1])
    values = torch.ops.convmask.embedding_masks_in_boxes(pixels, proposals, margins, inside, size)
    return ValuesInBoxes(values, offsets, inside)


def clamp_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """(K, 4) int64 boxes cut to a map of ``height`` x ``width`` cells; x1 <= x2 and y1 <= y2."""
    x = boxes[:, 0::2].clamp(min=0, max=width)
    y = boxes[:, 1::2].clamp(min=0, max=height)
    x2 = torch.maximum(x[:, 0], x[:, 1])
    y2 = torch.maximum(y[:, 0], y[:, 1])
    return torch.stack([x[:, 0], y[:, 0], x2, y2], dim=1)


def embedding_masks_reference(
    pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor | None, fill: float
) -> Tensor:
    """The operator in plain PyTorch, one proposal after the other; the kernel where no compiled one is loaded.

    Args:
        pixels: as all arguments, see :func:`embedding_masks`.

    Returns:
        See :func:`embedding_masks`.

    Raises:
        ValueError, TypeError: see :func:`embedding_masks`.
    """
    _check(pixels, proposals, margins, boxes)
    values = pixels.new_full((len(proposals), *pixels.shape[1:]), fill)
    for k, rows, columns, window in _windows(pixels, boxes, len(proposals)):
        values[k, rows, columns] = _log_probability(window, proposals[k], margins[k])
    return values


def embedding_masks_in_boxes_reference(
    pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor, size: int
) -> Tensor:
    """The operator in plain PyTorch.

    Args:
        pixels: as the next three, see :func:`embedding_masks_in_boxes`.
        proposals: see above.
        margins: see above.
        boxes: see above.
        size: number of cells in all boxes.

    Returns:
        (size,), see :class:`ValuesInBoxes`.

    Raises:
        ValueError, TypeError: see :func:`embedding_masks`; ``size`` is another number.
    """
    _check(pixels, proposals, margins, boxes)
    parts = [
        _log_probability(window, proposals[k], margins[k]).flatten().to(pixels.dtype)
        for k, _, _, window in _windows(pixels, boxes, len(proposals))
    ]
    values = torch.cat([pixels.new_empty(0), *parts])
    _check_size(size, len(values))
    return values


def embedding_masks_backward_reference(
    gradient: Tensor, pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of pixels, proposals and margins.

    Args:
        gradient: (K, H, W), of the values. What lies outside the boxes does not count.
        pixels: as the others, see :func:`embedding_masks`.
        proposals: see above.
        margins: see above.
        boxes: see above.
    """
    _check(pixels, proposals, margins, boxes)
    _check_gradient(gradient, pixels, (len(proposals), *pixels.shape[1:]))
    windows = _windows(pixels, boxes, len(proposals))
    return _add_gradients(
        ((k, r, c, w, gradient[k, r, c]) for k, r, c, w in windows), pixels, proposals, margins, pixels.dtype
    )


def embedding_masks_in_boxes_backward_reference(
    gradient: Tensor, pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of pixels, proposals and margins.

    Args:
        gradient: (P,), of the values.
        pixels: as the others, see :func:`embedding_masks_in_boxes`.
        proposals: see above.
        margins: see above.
        boxes: see above.
    """
    _check(pixels, proposals, margins, boxes)
    _check_gradient(gradient, pixels, None)
    windows = list(_windows(pixels, boxes, len(proposals)))
    areas = [(r.stop - r.start) * (c.stop - c.start) for _, r, c, _ in windows]
    _check_size(len(gradient), sum(areas), "gradient")
    parts = gradient.split(areas)
    shaped = (
        (k, r, c, w, part.view(r.stop - r.start, c.stop - c.start))
        for (k, r, c, w), part in zip(windows, parts, strict=True)
    )
    return _add_gradients(shaped, pixels, proposals, margins, pixels.dtype)


def _add_gradients(
    windows: Any, pixels: Tensor, proposals: Tensor, margins: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(dtype)
    of_pixels, of_proposals, of_margins = (torch.zeros_like(x, dtype=wide) for x in (pixels, proposals, margins))
    for k, rows, columns, window, gradient in windows:
        difference = window.to(wide) - proposals[k].to(wide)[:, None, None]
        weighted = gradient.to(wide) * difference
        factor = 2 * margins[k].to(wide)
        of_pixels[:, rows, columns] -= factor.view(-1, 1, 1) * weighted
        of_proposals[k] = factor * weighted.sum((1, 2))
        of_margin = -(weighted * difference).sum((1, 2))
        of_margins[k] = of_margin.sum() if margins.dim() == 1 else of_margin
    return of_pixels.to(dtype), of_proposals.to(dtype), of_margins.to(dtype)


def _log_probability(window: Tensor, proposal: Tensor, margin: Tensor) -> Tensor:
    """(h, w) from (D, h, w), (D,) and () or (D,), in the wide dtype."""
    wide = _wide(window.dtype)
    squares = (window.to(wide) - proposal.to(wide)[:, None, None]).square_()
    return -(margin.to(wide).view(-1, 1, 1) * squares).sum(0)


def _windows(pixels: Tensor, boxes: Tensor | None, count: int) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """For each proposal its index, rows, columns and (D, h, w) pixels."""
    height, width = pixels.shape[1:]
    whole = [[0, 0, width, height]] * count
    cells = whole if boxes is None else clamp_boxes(boxes, height, width).tolist()
    for k, (x1, y1, x2, y2) in enumerate(cells):
        rows, columns = slice(y1, y2), slice(x1, x2)
        yield k, rows, columns, pixels[:, rows, columns]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision rounds sums away."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor | None) -> None:
    if pixels.dim() != 3:
        raise ValueError(f"pixels must have shape (D, H, W), not {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise TypeError(f"pixels must be floating, not {pixels.dtype}")
    dims = pixels.shape[0]
    if proposals.dim() != 2 or proposals.shape[1] != dims:
        raise ValueError(f"proposals must have shape (K, {dims}) to fit the pixels, not {tuple(proposals.shape)}")
    count = proposals.shape[0]
    if margins.shape != (count,) and margins.shape != (count, dims):
        raise ValueError(
            f"margins must have shape ({count},) or ({count}, {dims}) to fit the proposals, not {tuple(margins.shape)}"
        )
    for name, tensor in (("proposals", proposals), ("margins", margins)):
        if tensor.dtype != pixels.dtype:
            raise TypeError(f"{name} must be {pixels.dtype}, as the pixels are, not {tensor.dtype}")
    if boxes is not None:
        if boxes.shape != (count, 4):
            raise ValueError(f"boxes must have shape ({count}, 4) to fit the proposals, not {tuple(boxes.shape)}")
        if boxes.dtype != torch.int64:
            raise TypeError(f"boxes must be int64, not {boxes.dtype}")
    for name, other in (("proposals", proposals), ("margins", margins), ("boxes", boxes)):
        if other is not None and other.device != pixels.device:
            raise ValueError(f"{name} is on {other.device}, but pixels are on {pixels.device}")


def _check_gradient(gradient: Tensor, pixels: Tensor, shape: tuple[int, ...] | None) -> None:
    if gradient.dim() != 1 if shape is None else gradient.shape != shape:
        raise ValueError(f"gradient must have shape {shape or '(P,)'}, not {tuple(gradient.shape)}")
    if gradient.dtype != pixels.dtype:
        raise TypeError(f"gradient must be {pixels.dtype}, as the pixels are, not {gradient.dtype}")
    if gradient.device != pixels.device:
        raise ValueError(f"gradient is on {gradient.device}, but pixels are on {pixels.device}")


def _check_size(size: int, cells: int, name: str = "size") -> None:
    if size != cells:
        raise ValueError(f"{name}: {size} values, but the boxes have {cells} cells")


def _fake(pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor | None, fill: float) -> Tensor:
    _check(pixels, proposals, margins, boxes)
    return pixels.new_empty(proposals.shape[0], *pixels.shape[1:])


def _fake_in_boxes(pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor, size: int) -> Tensor:
    _check(pixels, proposals, margins, boxes)
    return pixels.new_empty(size)


def _fake_backward(
    gradient: Tensor, pixels: Tensor, proposals: Tensor, margins: Tensor, boxes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(pixels, proposals, margins, boxes)
    return pixels.new_empty(pixels.shape), proposals.new_empty(proposals.shape), margins.new_empty(margins.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.convmask.embedding_masks_backward(gradient, *ctx.saved_tensors), None, None)


def _backward_in_boxes(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.convmask.embedding_masks_in_boxes_backward(gradient, *ctx.saved_tensors), None, None)


register_operator(
    f"embedding_masks({_ARGUMENTS}, Tensor? boxes, float fill) -> Tensor",
    reference=embedding_masks_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    slowdown=_SLOWDOWN,
)
register_operator(
    f"embedding_masks_backward(Tensor gradient, {_ARGUMENTS}, Tensor? boxes) -> (Tensor, Tensor, Tensor)",
    reference=embedding_masks_backward_reference,
    fake=_fake_backward,
    slowdown=_SLOWDOWN,
)
register_operator(
    f"embedding_masks_in_boxes({_ARGUMENTS}, Tensor boxes, SymInt size) -> Tensor",
    reference=embedding_masks_in_boxes_reference,
    fake=_fake_in_boxes,
    backward=_backward_in_boxes,
    setup_context=_setup_context,
    slowdown=_SLOWDOWN,
)
register_operator(
    f"embedding_masks_in_boxes_backward(Tensor gradient, {_ARGUMENTS}, Tensor boxes) -> (Tensor, Tensor, Tensor)",
    reference=embedding_masks_in_boxes_backward_reference,
    fake=_fake_backward,
    slowdown=_SLOWDOWN,
)
