"""Products of masks, kernels and features, in the forms that are the fastest (benchmarks/bench_knet_products.py).

Shapes: N images, Q kernels, C channels, h x w cells.
"""

from __future__ import annotations

import torch


def assemble(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Sums the features of each kernel's pixels (arXiv 2106.14855, equation 4), in single precision.

    Args:
        weights: (N, Q, h, w), any dtype: share of each cell.
        features: (N, C, h, w).

    Returns:
        (N, Q, C): sums over cells of weight times feature.
    """
    flat = features.flatten(2)
    return torch.bmm(weights.flatten(2).to(flat.dtype), flat.transpose(1, 2))


def cut_out(kernels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Applies kernels as 1x1 convolutions without bias: (N, Q, C) and (N, C, h, w) to logits (N, Q, h, w)."""
    return torch.bmm(kernels, features.flatten(2)).unflatten(2, features.shape[2:])
