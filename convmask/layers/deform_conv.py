"""Deformable convolution that predicts its own offsets (arXiv 1703.06211, and 1811.11168 with modulation).

It runs on torchvision's operator; on the CPU on the same from embedding bags, which trains about ten times as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision.ops import deform_conv2d

from convmask.utils.exporting import exporting

from .deform_sampling import deform_conv2d_by_bags


class DeformConv2d(nn.Module):
    """A convolution whose taps move by offsets that a second convolution predicts from the same input.

    Offsets are (dy, dx) pairs, tap by tap in row-major order, followed by one modulation logit a tap where there is
    modulation: the layout of Detectron2's deformable convolutions and of torchvision.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
        modulated: bool = True,
        zero_offsets: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Builds both convolutions.

        Args:
            in_channels: of the input.
            out_channels: of the result.
            kernel_size: side of the kernel, as are stride, padding and dilation as in :class:`torch.nn.Conv2d`.
            stride: see kernel_size.
            padding: see kernel_size.
            dilation: see kernel_size.
            bias: whether the result has a bias.
            modulated: each tap is multiplied by the sigmoid of a predicted logit.
            zero_offsets: the predicting convolution starts at zero, so that the layer begins as a plain convolution
                (modulated: times 1/2). Otherwise it starts with PyTorch's default weights.
            norm: applied to the result.
            activation: applied last.
        """
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.modulated = modulated
        self.taps = kernel_size**2
        self.offset = nn.Conv2d(
            in_channels,
            self.taps * (3 if modulated else 2),
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.norm = norm
        self.activation = activation
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if zero_offsets:
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W'), the sizes of a plain convolution."""
        predicted = self.offset(x)
        offsets, logits = predicted[:, : 2 * self.taps], predicted[:, 2 * self.taps :]
        # torchvision's backward pass on the CPU takes ten times as long, and few runtimes of ONNX have its operator
        by_bags = exporting() or (torch.is_grad_enabled() and x.device.type == "cpu")
        convolve = deform_conv2d_by_bags if by_bags else deform_conv2d
        # torchvision's operator takes tensors of one type, and its autocasting leaves the mask alone
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = convolve(
                x.to(kind),
                offsets.to(kind),
                self.weight.to(kind),
                None if self.bias is None else self.bias.to(kind),
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=logits.to(kind).sigmoid() if self.modulated else None,
            )
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)
