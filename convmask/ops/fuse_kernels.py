"""Kernel fusion: kernels of one object, found at several places and levels, become one.

The rule (Li et al., "Fully Convolutional Networks for Panoptic Segmentation", section 3.2; the authors' release), with
N kernels in descending order of score, equal scores in their own order:

1. Kernel i covers a later kernel j if their cosine similarity is at or above the threshold and, where fusion is
   class-specific, their classes are equal. It always covers itself.
2. A kernel that no earlier one covers is kept. It does not matter whether the earlier one is kept itself: with A
   similar to B and B to C, but not A to C, only A is kept.
3. Each kernel belongs to the first that covers it. A kept kernel becomes the mean of those that belong to it. What
   belongs to a kernel that is not kept, such as C above, goes into no mean.

A kernel of zeros has no direction: it is similar to none and stays as it is. The release divides zero by zero there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convmask.ops._registration import register_operator

SMALLEST_NORM = 1e-8  # shorter kernels are divided by this to normalise them

_SCHEMA = (
    "fuse_kernels(Tensor kernels, Tensor scores, Tensor classes, float threshold, bool class_specific) "
    "-> (Tensor fused, Tensor kept, Tensor groups, Tensor count)"
)


def fuse_kernels(
    kernels: Tensor, scores: Tensor, classes: Tensor, *, threshold: float = 0.9, class_specific: bool = True
) -> tuple[Tensor, Tensor]:
    """Fuses similar kernels (rules: see the module).

    All tensors are on one device. The number of kept kernels M is read from the device; the operator below,
    ``torch.ops.convmask.fuse_kernels``, does not wait for it. Differentiable in ``kernels``, with the groups as
    constants. Similarities are computed in float32, or in float64 for float64 kernels; they, and the result, do not
    depend on the number of threads.

    Args:
        kernels: (N, D) float16, bfloat16, float32 or float64.
        scores: (N,) floating, in any order; NaN ranks last.
        classes: (N,) int64. Not used unless ``class_specific``.
        threshold: kernels are similar from this cosine on.
        class_specific: whether only kernels of one class are fused.

    Returns:
        The fused kernels, (M, D) of the dtype of ``kernels``, in descending order of score, and for each the index of
        the kept kernel in the arguments, (M,) int64: its score and class are ``scores[index]`` and ``classes[index]``.

    Raises:
        ValueError: a shape or device does not fit; names the argument.
        TypeError: a dtype does not fit; names the argument.
    """
    _check(kernels, scores, classes)
    fused, kept, _, count = torch.ops.convmask.fuse_kernels(
        kernels, scores, classes, float(threshold), bool(class_specific)
    )
    number = int(count)
    return fused[:number], kept[:number]


def fuse_kernels_reference(
    kernels: Tensor, scores: Tensor, classes: Tensor, threshold: float, class_specific: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch; the kernel where no compiled one is loaded.

    Args:
        kernels: as all arguments, see ``fuse_kernels``.

    Returns:
        - ``fused``: (N, D), the M fused kernels, and zeros from there on.
        - ``kept``: (N,) int64, the indices of the kept kernels, and -1 from there on.
        - ``groups``: (N,) int64, for each kernel the row of ``fused`` of whose mean it is part, or -1.
        - ``count``: () int64, M.

    Raises:
        ValueError, TypeError: see ``fuse_kernels``.
    """
    _check(kernels, scores, classes)
    order = torch.argsort(-scores.double(), stable=True)
    rank = torch.arange(len(order), device=order.device)
    ranked = kernels[order] if kernels.dtype == torch.float64 else kernels[order].float()
    first = _first_covering(ranked, classes[order], threshold, class_specific)
    is_kept = first == rank
    row = torch.where(is_kept, is_kept.cumsum(0) - 1, -1)[first]
    members = torch.zeros_like(rank).index_add(0, row.clamp(min=0), (row >= 0).long())
    sums = torch.zeros_like(ranked).index_add(0, row.clamp(min=0), ranked.masked_fill((row < 0)[:, None], 0))
    fused = (sums / members.clamp(min=1)[:, None]).to(kernels.dtype)
    count = is_kept.sum()
    kept = torch.where(rank < count, order[torch.argsort(~is_kept, stable=True)], -1)
    return fused, kept, torch.empty_like(row).scatter(0, order, row), count


def _first_covering(ranked: Tensor, classes: Tensor, threshold: float, class_specific: bool) -> Tensor:
    """(N,) int64: the rank of the first kernel that covers each, from (N, D) kernels in rank order."""
    unit = ranked / ranked.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    covers = unit @ unit.T >= threshold
    if class_specific:
        covers &= classes[:, None] == classes
    covers = covers.triu(1) | torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return covers.int().argmax(dim=0) if len(unit) else classes.new_empty(0)  # the first of equal values


def _fake(
    kernels: Tensor, scores: Tensor, classes: Tensor, threshold: float, class_specific: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(kernels, scores, classes)
    return (
        kernels.new_empty(kernels.shape),
        classes.new_empty(len(kernels)),
        classes.new_empty(len(kernels)),
        classes.new_empty(()),
    )


def _check(kernels: Tensor, scores: Tensor, classes: Tensor) -> None:
    if kernels.dim() != 2:
        raise ValueError(f"kernels must have shape (N, D), not {tuple(kernels.shape)}")
    for name, tensor in (("kernels", kernels), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, not {tensor.dtype}")
    if classes.dtype != torch.int64:
        raise TypeError(f"classes must be int64, not {classes.dtype}")
    for name, tensor in (("scores", scores), ("classes", classes)):
        if tensor.shape != kernels.shape[:1]:
            raise ValueError(f"{name} must have shape ({kernels.shape[0]},), not {tuple(tensor.shape)}")
        if tensor.device != kernels.device:
            raise ValueError(f"{name} is on {tensor.device}, but kernels are on {kernels.device}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, fused_gradient: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
    """Each member of a group has an equal share in the mean: one gather, in plain PyTorch."""
    (groups,) = ctx.saved_tensors
    part = groups >= 0
    row = groups.clamp(min=0)
    members = torch.zeros_like(groups).scatter_add(0, row, part.long())
    shares = fused_gradient / members.clamp(min=1)[:, None]
    return shares[row].masked_fill(~part[:, None], 0), None, None, None, None


register_operator(
    _SCHEMA,
    reference=fuse_kernels_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    slowdown="about 4 times slower",
)
