"""The kernel head: the map that all rounds use, the first kernels and their masks (arXiv 2106.14855, section 3.3).

Shapes: N images, P learned kernels, S stuff classes, Q = P or P + S kernels, C channels, K classes of the dense
classifier, h x w cells at the common stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from convmask.layers import SemanticFPN
from convmask.layers.position_encoding import sine_position_encoding

from .products import assemble
from .update_head import Assembly, Round, group_weights, prior_bias


class KernelHeadOutputs(NamedTuple):
    """What the rounds start from.

    Attributes:
        features: (N, C, h, w).
        seg_logits: (N, K, h, w) dense classification, trained beside the kernels.
        start: Q kernels with their masks; thing kernels first.
    """

    features: torch.Tensor
    seg_logits: torch.Tensor
    start: Round


class KernelHead(nn.Module):
    """Localisation FPN, two branches, and the first kernels: learned ones for things, a classifier's for stuff."""

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_kernels: int = 100,
        num_thing_classes: int = 80,
        num_stuff_classes: int = 0,
        channels: int = 256,
        common_stride: int = 8,
        norm: str = "GN",
        positional_encoding: str = "coarsest",
        assembly: Assembly = "hard",
        kernel_std: float = 1.0,
        conv_std: float = 0.01,
        prior: float = 0.01,
    ) -> None:
        """Builds the layers.

        Args:
            input_shape: levels of the FPN, of one width.
            num_kernels: P.
            num_thing_classes: of the dense classifier, which has K = things + stuff classes.
            num_stuff_classes: S; each has a kernel after those of things.
            channels: C.
            common_stride: stride of the result.
            norm: Detectron2's name of the normalisation.
            positional_encoding: where a sine encoding is added: "coarsest" level, there and to the "joined" map, or
                "none".
            assembly: see :func:`group_weights`; "none" leaves the first kernels as they are learned.
            kernel_std: standard deviation of the learned kernels at the start.
            conv_std: of all other weights; 0: He's initialisation, but for the dense classifier.
            prior: probability of every class at the start.
        """
        super().__init__()
        self.localization_fpn = SemanticFPN(
            input_shape, conv_dims=channels, common_stride=common_stride, norm=norm, conv_after_upsampling=True
        )
        self.coarsest = self.localization_fpn.in_features[-1]
        self.positional_encoding = positional_encoding
        self.assembly: Assembly = assembly
        self.localization = _branch(channels, norm)
        self.semantic = _branch(channels, norm)
        self.init_kernels = nn.Conv2d(channels, num_kernels, kernel_size=1, bias=False)
        self.num_thing_classes, self.num_stuff_classes = num_thing_classes, num_stuff_classes
        self.conv_seg = nn.Conv2d(channels, num_thing_classes + num_stuff_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and conv_std > 0:
                nn.init.normal_(module.weight, std=conv_std)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.normal_(self.init_kernels.weight, std=kernel_std)
        nn.init.constant_(self.conv_seg.bias, prior_bias(prior))

    def forward(self, levels: Mapping[str, torch.Tensor]) -> KernelHeadOutputs:
        """Levels (N, width, H_l, W_l) by name to the start of the rounds."""
        levels = dict(levels)
        if self.positional_encoding != "none":
            levels[self.coarsest] = _with_positions(levels[self.coarsest])
        joined = self.localization_fpn(levels)
        if self.positional_encoding == "joined":
            joined = _with_positions(joined)
        localization, semantic = self.localization(joined), self.semantic(joined)
        features = localization + semantic
        seg_logits = self.conv_seg(semantic)
        masks = self.init_kernels(localization)
        kernels = self.init_kernels.weight.flatten(1).expand(len(features), -1, -1)
        if self.assembly != "none":
            kernels = kernels + assemble(group_weights(masks, self.assembly), features)
        if self.num_stuff_classes:
            # a classifier's weights are kernels too; its bias is not used again
            stuff = self.conv_seg.weight[self.num_thing_classes :].flatten(1).expand(len(features), -1, -1)
            kernels = torch.cat([kernels, stuff], dim=1)
            masks = torch.cat([masks, seg_logits[:, self.num_thing_classes :]], dim=1)
        return KernelHeadOutputs(features, seg_logits, Round(kernels, masks))


def _with_positions(x: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) plus the sine encoding of its cells."""
    return x + sine_position_encoding(x.shape[2], x.shape[3], x.shape[1], device=x.device).to(x.dtype)


def _branch(channels: int, norm: str) -> nn.Sequential:
    """Two 1x1 convolutions with normalisation and ReLU: the release's ``conv_pred``, or ``aux_convs``, and its
    ``loc_convs``, or ``seg_convs``."""
    layers = []
    for _ in range(2):
        conv = Conv2d(
            channels, channels, kernel_size=1, bias=not norm, norm=get_norm(norm, channels), activation=F.relu
        )
        weight_init.c2_msra_fill(conv)
        layers.append(conv)
    return nn.Sequential(*layers)
