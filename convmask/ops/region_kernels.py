"""Region kernels: one kernel for each region of an image, the average of a map of kernels over the region.

    kernel[n, k, c] = sum over cells p of masks[n, k, p] * kernel_map[n, c, p] / divisor

(Li et al., "Fully Convolutional Networks for Panoptic Segmentation", section 3.2.) This is a matrix product of (K, H W)
by (H W, C), and so is its gradient: nothing of the size (K, C, H, W) is ever stored, and a kernel written by hand is no
faster than the library's product. The divisor is the number of cells of the whole map in the authors' release, and the
size of the region in the paper.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from convmask.ops._registration import register_operator

_SCHEMA = "region_kernels(Tensor kernel_map, Tensor masks, bool over_region) -> Tensor"
_BACKWARD_SCHEMA = "region_kernels_backward(Tensor gradient, Tensor masks, bool over_region) -> Tensor"


def region_kernels(kernel_map: Tensor, masks: Tensor, *, average: Literal["map", "region"] = "map") -> Tensor:
    """Averages a map of kernels over regions (formula: see the module).

    Both tensors are on one device. Differentiable in ``kernel_map``, twice if need be; the masks are constants. Sums
    are computed in float32, or in float64 for float64 maps. As in any product of PyTorch, their rounding may depend on
    the number of threads.

    Args:
        kernel_map: (N, C, H, W) float16, bfloat16, float32 or float64.
        masks: (N, K, H, W) bool, or floating weights. Regions may overlap.
        average: what sums are divided by: "map", the number of cells H x W, as the release does; "region", the sum of
            the region's mask, as the paper says. The kernel of an empty region is 0 in both.

    Returns:
        (N, K, C), the kernels, of the dtype of ``kernel_map``.

    Raises:
        ValueError: a shape or device does not fit, ``masks`` require a gradient, or ``average`` is neither; names the
            argument.
        TypeError: a dtype does not fit; names the argument.
    """
    if average not in ("map", "region"):
        raise ValueError(f'average must be "map" or "region", not {average!r}')
    if masks.requires_grad and torch.is_grad_enabled():
        raise ValueError("masks require a gradient, but are constants of region_kernels: detach them")
    _check("kernel_map", kernel_map, masks)
    kernels: Tensor = torch.ops.convmask.region_kernels(kernel_map, masks, average == "region")
    return kernels


def region_kernels_reference(kernel_map: Tensor, masks: Tensor, over_region: bool) -> Tensor:
    """The operator: a matrix product, on every device.

    Args:
        kernel_map: as ``masks``, see ``region_kernels``.
        over_region: whether sums are divided by the sum of the mask, and not by the number of cells.

    Returns:
        (N, K, C), see ``region_kernels``.

    Raises:
        ValueError, TypeError: see ``region_kernels``.
    """
    _check("kernel_map", kernel_map, masks)
    wide = _wide(kernel_map.dtype)
    weights = masks.to(wide)
    sums = torch.bmm(weights.flatten(2), kernel_map.to(wide).flatten(2).transpose(1, 2))
    return (sums / _divisor(weights, over_region)).to(kernel_map.dtype)


def region_kernels_backward_reference(gradient: Tensor, masks: Tensor, over_region: bool) -> Tensor:
    """The gradient of ``kernel_map``.

    Args:
        gradient: (N, K, C) floating, of the kernels.
        masks: (N, K, H, W), see ``region_kernels``.
        over_region: see ``region_kernels_reference``.

    Returns:
        (N, C, H, W) of the dtype of ``gradient``.
    """
    _check("gradient", gradient, masks)
    wide = _wide(gradient.dtype)
    weights = masks.to(wide)
    shares = gradient.to(wide) / _divisor(weights, over_region)
    return torch.bmm(shares.transpose(1, 2), weights.flatten(2)).unflatten(2, masks.shape[2:]).to(gradient.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision overflows, or rounds away, sums over a map."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _divisor(weights: Tensor, over_region: bool) -> Tensor | int:
    """Number of cells, or the (N, K, 1) sums of the masks; 1 for an empty region, whose sum is 0."""
    if not over_region:
        return torch.sym_max(weights.shape[2] * weights.shape[3], 1)
    sizes = weights.sum((2, 3)).unsqueeze(2)
    return sizes.masked_fill(sizes == 0, 1)


def _check(name: str, tensor: Tensor, masks: Tensor) -> None:
    """``tensor`` is the map, or the gradient of the kernels."""
    if masks.dim() != 4:
        raise ValueError(f"masks must have shape (N, K, H, W), not {tuple(masks.shape)}")
    if masks.dtype != torch.bool and not masks.is_floating_point():
        raise TypeError(f"masks must be bool or floating, not {masks.dtype}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, not {tensor.dtype}")
    images, regions, height, width = masks.shape
    if name == "kernel_map":
        if tensor.dim() != 4 or tensor.shape[0] != images or tensor.shape[2:] != masks.shape[2:]:
            raise ValueError(
                f"kernel_map must have shape ({images}, C, {height}, {width}) to fit the masks, "
                f"not {tuple(tensor.shape)}"
            )
    elif tensor.dim() != 3 or tensor.shape[:2] != masks.shape[:2]:
        raise ValueError(f"{name} must have shape ({images}, {regions}, C) to fit the masks, not {tuple(tensor.shape)}")
    if masks.device != tensor.device:
        raise ValueError(f"masks are on {masks.device}, but {name} is on {tensor.device}")


def _fake(kernel_map: Tensor, masks: Tensor, over_region: bool) -> Tensor:
    _check("kernel_map", kernel_map, masks)
    return kernel_map.new_empty(masks.shape[0], masks.shape[1], kernel_map.shape[1])


def _backward_fake(gradient: Tensor, masks: Tensor, over_region: bool) -> Tensor:
    _check("gradient", gradient, masks)
    return gradient.new_empty(masks.shape[0], gradient.shape[2], *masks.shape[2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.over_region = inputs[2]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (masks,) = ctx.saved_tensors
    return torch.ops.convmask.region_kernels_backward(gradient, masks, ctx.over_region), None, None


def _double_backward(ctx: Any, map_gradient: Tensor) -> tuple[Tensor, None, None]:
    (masks,) = ctx.saved_tensors
    return torch.ops.convmask.region_kernels(map_gradient, masks, ctx.over_region), None, None


register_operator(
    _SCHEMA, reference=region_kernels_reference, fake=_fake, backward=_backward, setup_context=_setup_context
)
register_operator(
    _BACKWARD_SCHEMA,
    reference=region_kernels_backward_reference,
    fake=_backward_fake,
    backward=_double_backward,
    setup_context=_setup_context,
)
