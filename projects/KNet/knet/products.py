"""Products of masks, kernels and features, in the forms that are the fastest (benchmarks/bench_knet_products.py).

Shapes: N images, Q kernels, C channels, h x w cells.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# From this many channels on, PyTorch's convolution of the CPU is faster than its matrix product, below it is slower.
_WIDE = 128


def assemble(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Sums the features of each kernel's pixels (arXiv 2106.14855, equation 4), in single precision or better.

    Args:
        weights: (N, Q, h, w), any dtype: share of each cell.
        features: (N, C, h, w).

    Returns:
        (N, Q, C): sums over cells of weight times feature.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    # thousands of terms are too many for half precision
    with torch.autocast(features.device.type, enabled=False):
        return torch.bmm(weights.flatten(2).to(dtype), features.flatten(2).to(dtype).transpose(1, 2))


def cut_out(kernels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Applies kernels as 1x1 convolutions without bias: (N, Q, C) and (N, C, h, w) to logits (N, Q, h, w)."""
    images, number, channels = kernels.shape
    if features.is_cuda or channels < _WIDE:
        return torch.bmm(kernels, features.flatten(2)).unflatten(2, features.shape[2:])
    # one group an image
    weight = kernels.reshape(images * number, channels, 1, 1)
    logits = F.conv2d(features.flatten(0, 1)[None], weight, groups=images)
    return logits[0].unflatten(0, (images, number))
