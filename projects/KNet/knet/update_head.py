"""One round: kernels gather the features of their masks, are updated, exchange messages, and cut out new masks
(arXiv 2106.14855, section 3.2).

Shapes: N images, Q kernels, C channels, K classes, h x w cells.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .products import assemble, cut_out

Assembly = Literal["hard", "soft", "softmax", "none"]
ASSEMBLIES = ("hard", "soft", "softmax", "none")


class Round(NamedTuple):
    """What a round gives.

    Attributes:
        kernels: (N, Q, C), which the next round takes.
        mask_logits: (N, Q, h, w).
        class_logits: (N, Q, K); None before the first round and in semantic segmentation.
    """

    kernels: torch.Tensor
    mask_logits: torch.Tensor
    class_logits: torch.Tensor | None = None


def group_weights(mask_logits: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """Share of each cell in the group feature of each kernel, (N, Q, h, w).

    "hard": 1 where the probability is above one half, as released; masks get no gradient. "soft": the probability, as
    the paper writes it. "softmax": the probability among the kernels, for one kernel a class. "none": all cells alike,
    to measure what masks are good for; a mean, as nothing else bounds the sum.
    """
    if assembly == "hard":
        # sigmoid(x) > 0.5
        return (mask_logits > 0).to(mask_logits.dtype)
    if assembly == "soft":
        return mask_logits.sigmoid()
    if assembly == "softmax":
        return mask_logits.softmax(dim=1)
    return torch.full_like(mask_logits, 1 / (mask_logits.shape[2] * mask_logits.shape[3]))


class KernelUpdator(nn.Module):
    """Adaptive kernel update: gates decide how much of the kernel and of its group feature is kept (equations 5, 6)."""

    def __init__(self, channels: int, gates: bool = True) -> None:
        """Builds the layers.

        Args:
            channels: width in which it works. Kernels of a multiple of it are cut into pieces that are updated alike,
                as the released semantic models do (512 in halves of 256).
            gates: False: kernel and group feature are added as they are.
        """
        super().__init__()
        self.channels, self.gates = channels, gates
        self.dynamic_layer = nn.Linear(channels, 2 * channels if gates else channels)
        self.input_layer = nn.Linear(channels, 2 * channels if gates else channels)
        if gates:
            self.input_gate = nn.Linear(channels, channels)
            self.update_gate = nn.Linear(channels, channels)
            self.norm_in = nn.LayerNorm(channels)
            self.input_norm_in = nn.LayerNorm(channels)
        self.norm_out = nn.LayerNorm(channels)
        self.input_norm_out = nn.LayerNorm(channels)
        self.fc_layer = nn.Linear(channels, channels)
        self.fc_norm = nn.LayerNorm(channels)

    def forward(self, group: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Group features and kernels (N, Q, C) to new kernels (N, Q, C)."""
        shape = kernels.shape
        group, kernels = (x.reshape(*shape[:2], -1, self.channels) for x in (group, kernels))
        # the last C channels are values, those before them (with gates) go into the gates
        group_in, group_out = self.dynamic_layer(group).tensor_split([-self.channels], dim=-1)
        kernel_in, kernel_out = self.input_layer(kernels).tensor_split([-self.channels], dim=-1)
        group_out, kernel_out = self.norm_out(group_out), self.input_norm_out(kernel_out)
        if self.gates:
            gate = kernel_in * group_in
            kernel_out = self.input_norm_in(self.input_gate(gate)).sigmoid() * kernel_out
            group_out = self.norm_in(self.update_gate(gate)).sigmoid() * group_out
        return F.relu(self.fc_norm(self.fc_layer(group_out + kernel_out))).reshape(shape)


class KernelUpdateHead(nn.Module):
    """A round with weights of its own."""

    def __init__(
        self,
        *,
        channels: int = 256,
        num_classes: int = 80,
        num_heads: int = 8,
        ffn_channels: int = 2048,
        dropout: float = 0.0,
        assembly: Assembly = "hard",
        gates: bool = True,
        interaction: bool = True,
        updator_channels: int = 0,
    ) -> None:
        """Builds the layers.

        Args:
            channels: C.
            num_classes: K; 0: no classes are predicted.
            num_heads: of the attention among kernels.
            ffn_channels: of the hidden layer of the feed-forward network.
            dropout: probability in the attention and the feed-forward network.
            assembly: see :func:`group_weights`.
            gates: see :class:`KernelUpdator`.
            interaction: False: neither attention among kernels nor feed-forward network.
            updator_channels: see :class:`KernelUpdator`; 0: C.

        Raises:
            ValueError: C is no multiple of ``num_heads`` or ``updator_channels``.
        """
        super().__init__()
        updator_channels = updator_channels or channels
        if channels % num_heads or channels % updator_channels:
            raise ValueError(
                f"KernelUpdateHead: {channels} channels are no multiple of {num_heads} heads and of the "
                f"{updator_channels} channels of the kernel updator"
            )
        self.assembly: Assembly = assembly
        self.feat_transform = nn.Conv2d(channels, channels, kernel_size=1)
        self.updator = KernelUpdator(updator_channels, gates)
        self.interaction = interaction
        if interaction:
            self.attention = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
            self.attention_norm = nn.LayerNorm(channels)
            self.ffn = nn.Sequential(
                nn.Linear(channels, ffn_channels),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(ffn_channels, channels),
                nn.Dropout(dropout),
            )
            self.ffn_norm = nn.LayerNorm(channels)
        self.class_branch = None
        if num_classes:
            self.class_branch = _branch(channels)
            self.fc_cls = nn.Linear(channels, num_classes)
        self.mask_branch = _branch(channels)
        self.fc_mask = nn.Linear(channels, channels)

    def init_weights(self, prior: float = 0.01) -> None:
        """Xavier for every matrix and a prior probability for the classes, as the released detectors are trained.

        The released semantic models never call theirs and keep PyTorch's initialisation.
        """
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if self.class_branch is not None:
            nn.init.constant_(self.fc_cls.bias, prior_bias(prior))

    def forward(self, features: torch.Tensor, before: Round) -> Round:
        """Features (N, C, h, w) and the round before to this round; masks of another size are resized to the
        features."""
        transformed = self.feat_transform(features)
        masks = before.mask_logits
        if masks.shape[2:] != features.shape[2:]:
            masks = F.interpolate(masks, size=features.shape[2:], mode="bilinear", align_corners=False)
        group = assemble(group_weights(masks, self.assembly), transformed)
        kernels = self.updator(group, before.kernels)
        if self.interaction:
            exchanged, _ = self.attention(kernels, kernels, kernels, need_weights=False)
            kernels = self.attention_norm(kernels + exchanged)
            kernels = self.ffn_norm(kernels + self.ffn(kernels))
        class_logits = None if self.class_branch is None else self.fc_cls(self.class_branch(kernels))
        return Round(kernels, cut_out(self.fc_mask(self.mask_branch(kernels)), transformed), class_logits)


def build_round(prior: float = 0.01, **options: Any) -> KernelUpdateHead:
    """A round of a detector, with its initial weights.

    Args:
        prior: probability of every class at the start.
        options: see :class:`KernelUpdateHead`.
    """
    head = KernelUpdateHead(**options)
    head.init_weights(prior)
    return head


def prior_bias(prior: float) -> float:
    """The logit of a probability."""
    return math.log(prior / (1 - prior))


def _branch(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU(inplace=True))
