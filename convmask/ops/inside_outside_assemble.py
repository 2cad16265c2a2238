"""Assembly of position-sensitive inside/outside score maps: classes and masks of RoIs (arXiv 1611.07709, section 3).

For each class there are two sets of k x k position-sensitive maps: how likely a pixel is inside the object, and how
likely in the RoI but outside of the object. Pooled to P x P (rules: see ``ps_roi_pool``), a RoI has

- the score of class c: the mean over its P x P bins of the larger of the two;
- the mask of one class: its two values a bin, as logits of a softmax (outside, inside).

The pooled (R, 2 C, P, P) values, 85 MB for 300 RoIs and 81 classes, are never stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convmask.ops._registration import register_operator
from convmask.ops.ps_roi_pool import (
    check_images,
    check_rois,
    ps_roi_pool_backward_reference,
    ps_roi_pool_reference,
)

_SCHEMA = (
    "inside_outside_assemble(Tensor maps, Tensor rois, Tensor? labels, int output_size, float spatial_scale, "
    "bool rounded, int first_class) -> (Tensor scores, Tensor mask_logits, Tensor classes)"
)
_BACKWARD_SCHEMA = (
    "inside_outside_assemble_backward(Tensor score_gradient, Tensor mask_gradient, Tensor maps, Tensor rois, "
    "Tensor classes, int output_size, float spatial_scale, bool rounded) -> Tensor"
)


def inside_outside_assemble(
    maps: Tensor,
    rois: Tensor,
    labels: Tensor | None = None,
    *,
    output_size: int = 21,
    spatial_scale: float = 1 / 16,
    rounded: bool = True,
    first_class: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class scores and mask logits of RoIs (rules: see the module).

    Differentiable in ``maps``; RoIs and classes are constants. Where a bin's two values are equal, the gradient of the
    score goes to the outside. Deterministic on the CPU; on CUDA the backward adds with atomic operations.

    Args:
        maps: (N, k, k, 2, C, H, W) floating: position row and column, outside (0) or inside (1), class. Any layout in
            memory; by far the fastest is the one in which the classes of a cell are neighbours, as they are in the
            output of a convolution in channels-last format whose channels are in this order.
        rois: (R, 5) floating: image index, x1, y1, x2, y2 in pixels of the input.
        labels: (R,) int64, the class whose mask each RoI gets; -1, or any that is no class, gives zeros. None: the
            class of the highest score.
        output_size: P, at least k.
        spatial_scale: cells of the map a pixel.
        rounded: see ``ps_roi_pool``.
        first_class: without ``labels``, the highest score is searched from this class on: 1 leaves out background.

    Returns:
        Scores (R, C) and mask logits (R, 2, P, P) of the dtype of ``maps``, and the classes of the masks, (R,) int64.

    Raises:
        ValueError: a shape, size or device does not fit, or a RoI names an image that there is not.
        TypeError: a dtype does not fit.
    """
    _check(maps, rois, labels, output_size, first_class)
    return torch.ops.convmask.inside_outside_assemble(
        maps, rois, labels, int(output_size), float(spatial_scale), bool(rounded), int(first_class)
    )


def inside_outside_assemble_reference(
    maps: Tensor,
    rois: Tensor,
    labels: Tensor | None,
    output_size: int,
    spatial_scale: float,
    rounded: bool,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch, step by step; arguments and results as those of ``inside_outside_assemble``."""
    _check(maps, rois, labels, output_size, first_class)
    check_images(rois, maps.shape[0])
    pooled = _pool(maps, rois, output_size, spatial_scale, rounded)  # (R, C, 2, P, P)
    scores = pooled.amax(dim=2).mean(dim=(2, 3))
    classes = first_class + scores[:, first_class:].argmax(dim=1) if labels is None else labels.clone()
    known = (classes >= 0) & (classes < maps.shape[4])
    rows = torch.arange(len(rois), device=rois.device)
    masks = torch.where(known[:, None, None, None], pooled[rows, torch.where(known, classes, 0)], 0)
    return scores.to(maps.dtype), masks.to(maps.dtype), classes


def inside_outside_assemble_backward_reference(
    score_gradient: Tensor,
    mask_gradient: Tensor,
    maps: Tensor,
    rois: Tensor,
    classes: Tensor,
    output_size: int,
    spatial_scale: float,
    rounded: bool,
) -> Tensor:
    """The gradient of ``maps``, computed from them anew.

    Args:
        score_gradient: (R, C).
        mask_gradient: (R, 2, P, P).
        maps: as all others, see ``inside_outside_assemble``.
        rois: see there.
        classes: (R,), those that it returned.
        output_size: see there.
        spatial_scale: see there.
        rounded: see there.

    Returns:
        (N, k, k, 2, C, H, W) of the dtype of ``maps``; in memory, the classes of a cell are neighbours.
    """
    _check_backward(score_gradient, mask_gradient, maps, rois, classes, output_size)
    images, group, _, _, count, height, width = maps.shape
    pooled = _pool(maps, rois, output_size, spatial_scale, rounded)
    outside = pooled[:, :, 0] >= pooled[:, :, 1]
    shares = (score_gradient.to(pooled.dtype) / output_size**2)[:, :, None, None, None]
    gradient = torch.stack([outside, ~outside], dim=2) * shares
    known = (classes >= 0) & (classes < count)
    rows = torch.arange(len(rois), device=rois.device)
    gradient[rows[known], classes[known]] += mask_gradient[known].to(pooled.dtype)
    result = ps_roi_pool_backward_reference(
        gradient.flatten(1, 2), rois, images, height, width, group, spatial_scale, rounded
    )
    result = result.view(images, count, 2, group, group, height, width).to(maps.dtype)
    return _like_gradient(maps).copy_(result.permute(0, 3, 4, 2, 1, 5, 6))


def _pool(maps: Tensor, rois: Tensor, output_size: int, spatial_scale: float, rounded: bool) -> Tensor:
    """(R, C, 2, P, P), of float32 at least."""
    images, group, _, _, count, height, width = maps.shape
    wide = maps if maps.dtype == torch.float64 else maps.float()
    channels = wide.permute(0, 4, 3, 1, 2, 5, 6).reshape(images, count * 2 * group**2, height, width)
    pooled = ps_roi_pool_reference(channels, rois, group, output_size, spatial_scale, rounded)
    return pooled.view(len(rois), count, 2, output_size, output_size)


def _like_gradient(maps: Tensor) -> Tensor:
    """An empty tensor of the shape of ``maps``, in which the classes of a cell are neighbours."""
    images, group, _, sides, count, height, width = maps.shape
    return maps.new_empty(images, height, width, group, group, sides, count).permute(0, 3, 4, 5, 6, 1, 2)


def _check(maps: Tensor, rois: Tensor, labels: Tensor | None, output_size: int, first_class: int) -> None:
    if maps.dim() != 7 or maps.shape[1] != maps.shape[2] or maps.shape[3] != 2:
        raise ValueError(f"maps must have shape (N, k, k, 2, C, H, W), not {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating, not {maps.dtype}")
    check_rois(rois, maps, "maps")
    if output_size < maps.shape[1]:
        raise ValueError(f"output_size is {output_size}, less than the k {maps.shape[1]} of maps")
    if labels is None:
        if not 0 <= first_class < maps.shape[4]:
            raise ValueError(f"first_class is {first_class}, but maps have {maps.shape[4]} classes")
        return
    if labels.shape != rois.shape[:1]:
        raise ValueError(f"labels must have shape ({rois.shape[0]},), not {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, not {labels.dtype}")
    if labels.device != maps.device:
        raise ValueError(f"labels is on {labels.device}, but maps is on {maps.device}")


def _check_backward(
    score_gradient: Tensor, mask_gradient: Tensor, maps: Tensor, rois: Tensor, classes: Tensor, output_size: int
) -> None:
    _check(maps, rois, classes, output_size, 0)
    shapes = (rois.shape[0], maps.shape[4]), (rois.shape[0], 2, output_size, output_size)
    for name, tensor, shape in (
        ("score_gradient", score_gradient, shapes[0]),
        ("mask_gradient", mask_gradient, shapes[1]),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


def _fake(
    maps: Tensor,
    rois: Tensor,
    labels: Tensor | None,
    output_size: int,
    spatial_scale: float,
    rounded: bool,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(maps, rois, labels, output_size, first_class)
    number = rois.shape[0]
    return (
        maps.new_empty(number, maps.shape[4]),
        maps.new_empty(number, 2, output_size, output_size),
        maps.new_empty(number, dtype=torch.int64),
    )


def _fake_backward(
    score_gradient: Tensor,
    mask_gradient: Tensor,
    maps: Tensor,
    rois: Tensor,
    classes: Tensor,
    output_size: int,
    spatial_scale: float,
    rounded: bool,
) -> Tensor:
    _check_backward(score_gradient, mask_gradient, maps, rois, classes, output_size)
    return _like_gradient(maps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, rois, _, *options, _ = inputs
    ctx.save_for_backward(maps, rois, output[2])
    ctx.options = options


def _backward(ctx: Any, score_gradient: Tensor, mask_gradient: Tensor, _: Any) -> tuple[Any, ...]:
    maps, rois, classes = ctx.saved_tensors
    gradient = torch.ops.convmask.inside_outside_assemble_backward(
        score_gradient, mask_gradient, maps, rois, classes, *ctx.options
    )
    return gradient, None, None, None, None, None, None


register_operator(
    _SCHEMA,
    reference=inside_outside_assemble_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    slowdown="about 140 times slower",
)
register_operator(
    _BACKWARD_SCHEMA,
    reference=inside_outside_assemble_backward_reference,
    fake=_fake_backward,
)
