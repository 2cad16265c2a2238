"""Position-sensitive RoI pooling as FCIS does it (Li et al., arXiv 1611.07709, section 2; the authors' release).

A RoI is divided into P x P bins. Bin (p, q) reads the channels of cell (g, h) of a k x k grid, g = floor(p k / P) and
h = floor(q k / P): P may be larger than k, so that several bins read one cell. A bin is the mean over the map cells
that it touches; bins may overlap, nothing is interpolated, and a bin without cells is 0.

Where a RoI begins and ends on the map, in float32 whatever the dtype, with scale s:

- rounded (MXNet, the release): from s round(x1) to s (round(x2) + 1), halves away from zero. Both ends are pixels
  of the RoI.
- not rounded (ChainerCV): from s x1 to s x2. The end is outside of the RoI.

Bins of length b divide this range, at least 0.1 cells long, evenly; bin p reads the cells from floor(start + p b) to
ceil(start + (p + 1) b) - 1 that there are. ``torchvision.ops.ps_roi_pool`` differs: it rounds after scaling, and its P
is k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convmask.ops._registration import register_operator

SHORTEST_SIDE = 0.1  # of a RoI, in cells of the map

_SCHEMA = (
    "ps_roi_pool(Tensor maps, Tensor rois, int group_size, int output_size, float spatial_scale, bool rounded) "
    "-> Tensor"
)
_BACKWARD_SCHEMA = (
    "ps_roi_pool_backward(Tensor gradient, Tensor rois, int images, int height, int width, int group_size, "
    "float spatial_scale, bool rounded) -> Tensor"
)


def ps_roi_pool(
    maps: Tensor,
    rois: Tensor,
    *,
    group_size: int = 7,
    output_size: int = 21,
    spatial_scale: float = 1 / 16,
    rounded: bool = True,
) -> Tensor:
    """Pools RoIs from position-sensitive maps (rules: see the module).

    Differentiable, twice, in ``maps``; RoIs are constants. Deterministic on the CPU; on CUDA the backward adds with
    atomic operations, in any order.

    Args:
        maps: (N, D k k, H, W) floating; channel ``(d k + g) k + h`` is output d of grid cell (g, h).
        rois: (R, 5) floating of any precision: image index, x1, y1, x2, y2 in pixels of the input. On CUDA a RoI of an
            image that there is not gives zeros.
        group_size: k.
        output_size: P, at least k.
        spatial_scale: cells of the map a pixel.
        rounded: MXNet's rule, else ChainerCV's.

    Returns:
        (R, D, P, P) of the dtype of ``maps``.

    Raises:
        ValueError: a shape, size or device does not fit, or a RoI names an image that there is not.
        TypeError: a dtype does not fit.
    """
    _check(maps, rois, group_size, output_size)
    return torch.ops.convmask.ps_roi_pool(
        maps, rois, int(group_size), int(output_size), float(spatial_scale), bool(rounded)
    )


def ps_roi_pool_reference(
    maps: Tensor, rois: Tensor, group_size: int, output_size: int, spatial_scale: float, rounded: bool
) -> Tensor:
    """The operator in plain PyTorch; arguments and results as those of ``ps_roi_pool``."""
    _check(maps, rois, group_size, output_size)
    check_images(rois, maps.shape[0])
    height, width = maps.shape[2:]
    wide = _wide(maps).unflatten(1, (-1, group_size, group_size)) if maps.shape[0] else maps
    rows, columns, areas = bins(rois, height, width, output_size, spatial_scale, rounded)
    pooled = maps.new_zeros(len(rois), maps.shape[1] // group_size**2, output_size, output_size)
    for index, image in enumerate(rois[:, 0].long().tolist()):
        crop, (y, x) = _members(rows[index], columns[index], group_size, wide)
        if crop is None:
            continue
        window = wide[image][..., crop[0], crop[1]]
        sums = torch.einsum("dghyx,gsy,htx->dgsht", window, y, x).flatten(3).flatten(1, 2)
        at = _positions(output_size, group_size, maps.device)
        pooled[index] = (sums[:, at][:, :, at] / areas[index].clamp(min=1)).to(maps.dtype)
    return pooled


def ps_roi_pool_backward_reference(
    gradient: Tensor,
    rois: Tensor,
    images: int,
    height: int,
    width: int,
    group_size: int,
    spatial_scale: float,
    rounded: bool,
) -> Tensor:
    """Each cell of a bin receives the bin's gradient divided by the number of its cells.

    Args:
        gradient: (R, D, P, P).
        rois: (R, 5).
        images: N.
        height: H.
        width: W.
        group_size: k.
        spatial_scale: see ``ps_roi_pool``.
        rounded: see ``ps_roi_pool``.

    Returns:
        (N, D k k, H, W) of the dtype of ``gradient``.
    """
    _check_backward(gradient, rois, group_size)
    check_images(rois, images)
    size, channels = gradient.shape[2], gradient.shape[1]
    rows, columns, areas = bins(rois, height, width, size, spatial_scale, rounded)
    wide = _wide(gradient)
    result = wide.new_zeros(images, channels, group_size, group_size, height, width)
    at = _positions(size, group_size, gradient.device)
    slots = -(-size // group_size)
    for index, image in enumerate(rois[:, 0].long().tolist()):
        crop, (y, x) = _members(rows[index], columns[index], group_size, wide)
        if crop is None:
            continue
        shares = wide.new_zeros(channels, group_size * slots, group_size * slots)
        shares[:, at[:, None], at] = wide[index] / areas[index].clamp(min=1)
        shares = shares.view(channels, group_size, slots, group_size, slots)
        result[image][..., crop[0], crop[1]] += torch.einsum("dgsht,gsy,htx->dghyx", shares, y, x)
    return result.flatten(1, 3).to(gradient.dtype)


def bins(
    rois: Tensor, height: int, width: int, output_size: int, spatial_scale: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [begin, end) of each bin: rows (R, P, 2), columns (R, P, 2) int64, and numbers of cells (R, P, P)."""
    edges = rois.detach()[:, 1:].float()
    if rounded:
        edges = _round_half_away(edges) + edges.new_tensor([0, 0, 1, 1])
    edges = edges * spatial_scale
    ranges = []
    for axis, limit in ((1, height), (0, width)):
        start, end = edges[:, axis, None], edges[:, axis + 2, None]
        step = (end - start).clamp(min=SHORTEST_SIDE) / output_size
        place = torch.arange(output_size + 1, device=rois.device)
        borders = place * step + start
        begin, stop = borders[:, :-1].floor(), borders[:, 1:].ceil()
        both = torch.stack([begin, stop], dim=2).nan_to_num(0.0).clamp(0, limit).long()
        ranges.append(both)
    counts = [(both[..., 1] - both[..., 0]).clamp(min=0) for both in ranges]
    return ranges[0], ranges[1], counts[0][:, :, None] * counts[1][:, None]


def check_images(rois: Tensor, images: int) -> None:
    """Raises ValueError where a RoI names an image that there is not; on the CPU only, since it waits for the data."""
    if rois.device.type != "cpu" or len(rois) == 0:
        return
    index = rois[:, 0]
    if not bool(((index >= 0) & (index < images)).all()):
        raise ValueError(f"rois name images from {index.min()} to {index.max()}, but there are {images}")


def check_rois(rois: Tensor, other: Tensor, name: str) -> None:
    """Raises an error that names the argument if shape, dtype or device of ``rois`` do not fit."""
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must have shape (R, 5), not {tuple(rois.shape)}")
    if not rois.is_floating_point():
        raise TypeError(f"rois must be floating, not {rois.dtype}")
    if rois.device != other.device:
        raise ValueError(f"rois is on {rois.device}, but {name} is on {other.device}")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _round_half_away(values: Tensor) -> Tensor:
    whole = values.trunc()
    return whole + torch.where((values - whole).abs() >= 0.5, values.sign(), torch.zeros_like(values))


def _positions(size: int, group: int, device: torch.device) -> Tensor:
    """(P,): where bin p lies among the k groups of ceil(P / k) slots."""
    place = torch.arange(size, device=device)
    cell = place * group // size
    first = -(-cell * size // group)  # of the bins of its cell
    return cell * -(-size // group) + place - first


def _members(rows: Tensor, columns: Tensor, group: int, like: Tensor) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The slices of rows and columns that a RoI touches (None if none), and (k, slots, cells) which bin reads which."""
    members, crop = [], []
    for ranges in (rows, columns):
        seen = ranges[ranges[:, 1] > ranges[:, 0]]
        if len(seen) == 0:
            return None, (like, like)
        first, last = int(seen[:, 0].min()), int(seen[:, 1].max())
        cells = torch.arange(first, last, device=ranges.device)
        member = (cells >= ranges[:, :1]) & (cells < ranges[:, 1:])
        slots = -(-len(ranges) // group)
        placed = like.new_zeros(group * slots, last - first)
        placed[_positions(len(ranges), group, ranges.device)] = member.to(like.dtype)
        members.append(placed.view(group, slots, -1))
        crop.append(slice(first, last))
    return crop, (members[0], members[1])


def _check(maps: Tensor, rois: Tensor, group_size: int, output_size: int) -> None:
    if maps.dim() != 4:
        raise ValueError(f"maps must have shape (N, D k k, H, W), not {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating, not {maps.dtype}")
    check_rois(rois, maps, "maps")
    if group_size < 1 or maps.shape[1] % group_size**2:
        raise ValueError(f"group_size is {group_size}: its square must divide the {maps.shape[1]} channels of maps")
    if output_size < group_size:
        raise ValueError(f"output_size is {output_size}, less than the group_size {group_size}")


def _check_backward(gradient: Tensor, rois: Tensor, group_size: int) -> None:
    if gradient.dim() != 4 or gradient.shape[0] != rois.shape[0] or gradient.shape[2] != gradient.shape[3]:
        raise ValueError(f"gradient must have shape ({rois.shape[0]}, D, P, P), not {tuple(gradient.shape)}")
    if not gradient.is_floating_point():
        raise TypeError(f"gradient must be floating, not {gradient.dtype}")
    check_rois(rois, gradient, "gradient")
    if group_size < 1 or gradient.shape[2] < group_size:
        raise ValueError(f"group_size is {group_size}, not from 1 to the {gradient.shape[2]} bins of gradient")


def _fake(maps: Tensor, rois: Tensor, group_size: int, output_size: int, spatial_scale: float, rounded: bool) -> Tensor:
    _check(maps, rois, group_size, output_size)
    return maps.new_empty(rois.shape[0], maps.shape[1] // group_size**2, output_size, output_size)


def _fake_backward(
    gradient: Tensor,
    rois: Tensor,
    images: int,
    height: int,
    width: int,
    group_size: int,
    spatial_scale: float,
    rounded: bool,
) -> Tensor:
    _check_backward(gradient, rois, group_size)
    return gradient.new_empty(images, gradient.shape[1] * group_size**2, height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, rois, group_size, _, spatial_scale, rounded = inputs
    ctx.save_for_backward(rois)
    ctx.options = maps.shape[0], maps.shape[2], maps.shape[3], group_size, spatial_scale, rounded


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (rois,) = ctx.saved_tensors
    return torch.ops.convmask.ps_roi_pool_backward(gradient, rois, *ctx.options), None, None, None, None, None


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, rois, _, _, _, *options = inputs
    ctx.save_for_backward(rois)
    ctx.options = options[0], gradient.shape[2], options[1], options[2]


def _backward_of_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """The backward is linear in the gradient, and its transpose is the pooling itself."""
    (rois,) = ctx.saved_tensors
    pooled = torch.ops.convmask.ps_roi_pool(gradient, rois, *ctx.options)
    return pooled, None, None, None, None, None, None, None


register_operator(
    _SCHEMA,
    reference=ps_roi_pool_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    slowdown="about 18 times slower",
)
register_operator(
    _BACKWARD_SCHEMA,
    reference=ps_roi_pool_backward_reference,
    fake=_fake_backward,
    backward=_backward_of_backward,
    setup_context=_setup_context_of_backward,
)
