"""K-Net for semantic segmentation: rounds on top of any semantic head (arXiv 2106.14855, sections 3.2 and 4.3).

Shapes: N images, K classes, C channels, h x w cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn
from torch.nn import functional as F

from .segmentation_heads import FCNHead, Features, SegmentationHead, cross_entropy
from .update_head import KernelUpdateHead, Round


@SEM_SEG_HEADS_REGISTRY.register()
class KNetSemSegHead(nn.Module):
    """Takes the weights of a head's last layer as kernels, one a class, and updates them round by round.

    The head may be any of ``SEM_SEG_HEADS_REGISTRY`` whose last layer is a 1x1 convolution named ``predictor``:
    Detectron2's ``SemSegFPNHead`` and DeepLab heads, and those of ``segmentation_heads``. What the head does after that
    layer, enlarging or its own loss, is left out. Works in Detectron2's ``SemanticSegmentor`` too.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        head: nn.Module,
        rounds: list[KernelUpdateHead],
        auxiliary_head: FCNHead | None = None,
        auxiliary_weight: float = 0.4,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        """Takes the parts.

        Args:
            input_shape: of the backbone.
            head: gives the first logits and the features of all rounds.
            rounds: without classes, of the width of the head's predictor.
            auxiliary_head: trained beside them, on an earlier stage.
            auxiliary_weight: factor of its loss.
            loss_weight: factor of all other losses.
            ignore_value: label of pixels without loss.

        Raises:
            ValueError: the head has no 1x1 ``predictor``.
        """
        super().__init__()
        predictor = getattr(head, "predictor", None)
        if not (isinstance(predictor, nn.Conv2d) and predictor.kernel_size == (1, 1)):
            raise ValueError(
                f"MODEL.KNET.SEMANTIC.HEAD: {type(head).__name__} has no 1x1 convolution 'predictor' as its last layer"
            )
        self.head = head
        self.rounds = nn.ModuleList(rounds)
        self.auxiliary_head, self.auxiliary_weight = auxiliary_head, auxiliary_weight
        self.loss_weight, self.ignore_value = loss_weight, ignore_value
        self.strides = {name: shape.stride for name, shape in input_shape.items()}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        node, head_node = cfg.MODEL.KNET, cfg.MODEL.SEM_SEG_HEAD
        head = SEM_SEG_HEADS_REGISTRY.get(node.SEMANTIC.HEAD)(cfg, input_shape)
        channels = head.predictor.in_channels if isinstance(getattr(head, "predictor", None), nn.Conv2d) else 256
        rounds = [
            KernelUpdateHead(
                channels=channels,
                num_classes=0,
                num_heads=node.NUM_HEADS,
                ffn_channels=node.FFN_CHANNELS,
                dropout=node.DROPOUT,
                assembly=node.SEMANTIC.GROUP_ASSEMBLY,
                gates=node.GATES,
                interaction=node.INTERACTION,
                updator_channels=node.UPDATOR_CHANNELS,
            )
            for _ in range(node.NUM_ROUNDS)
        ]
        return {
            "input_shape": input_shape,
            "head": head,
            "rounds": rounds,
            "auxiliary_head": _auxiliary_head(cfg, input_shape),
            "auxiliary_weight": node.SEMANTIC.AUX_WEIGHT,
            "loss_weight": head_node.LOSS_WEIGHT,
            "ignore_value": head_node.IGNORE_VALUE,
        }

    def predict(self, features: Features) -> tuple[torch.Tensor, list[Round]]:
        """The features (N, C, h, w) of the rounds, and what each gives; the first entry is the head's own."""
        if isinstance(self.head, SegmentationHead):
            taken = self.head.encode(features)
            logits = self.head.predictor(taken)
        else:
            taken, logits = _run_up_to(self.head, self.head.predictor, features)
        kernels = self.head.predictor.weight.flatten(1).expand(len(logits), -1, -1)
        rounds = [Round(kernels, logits)]
        for update in self.rounds:
            rounds.append(update(taken, rounds[-1]))
        return taken, rounds

    def layers(self, features: Features) -> torch.Tensor:
        """Logits (N, K, h, w) of the last round."""
        return self.predict(features)[1][-1].mask_logits

    def forward(
        self, features: Features, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Training: (None, losses of the head, of every round, and of the auxiliary head). Inference: (logits of the
        last round at the size of the padded images, as far as strides tell it, {}).

        Raises:
            ValueError: training without targets.
        """
        if not self.training:
            logits = self.layers(features)
            name = next(name for name in self.strides if name in features)
            height, width = (side * self.strides[name] for side in features[name].shape[2:])
            return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False), {}
        if targets is None:
            raise ValueError("KNetSemSegHead: training needs targets ('sem_seg' of each image)")
        losses = {
            f"decode.loss_ce.s{index}": self.loss_weight * cross_entropy(this.mask_logits, targets, self.ignore_value)
            for index, this in enumerate(self.predict(features)[1])
        }
        if self.auxiliary_head is not None:
            auxiliary = cross_entropy(self.auxiliary_head.layers(features), targets, self.ignore_value)
            losses["aux.loss_ce"] = self.auxiliary_weight * auxiliary
        return None, losses


class _ReachedError(Exception):
    """Not an error: a layer was reached."""


def _run_up_to(head: nn.Module, layer: nn.Module, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs ``head(features)`` until ``layer`` is done; input and output of that layer."""
    reached: list[torch.Tensor] = []

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        reached.extend((inputs[0], output))
        raise _ReachedError

    handle = layer.register_forward_hook(stop)
    try:
        head(features)
    except _ReachedError:
        return reached[0], reached[1]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(head).__name__} does not use its layer 'predictor'")


def _auxiliary_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> FCNHead | None:
    node = cfg.MODEL.KNET.SEMANTIC
    if not node.AUX_IN_FEATURE:
        return None
    if node.AUX_IN_FEATURE not in input_shape:
        raise ValueError(
            f"MODEL.KNET.SEMANTIC.AUX_IN_FEATURE is {node.AUX_IN_FEATURE!r}, but the backbone gives "
            f"{sorted(input_shape)}"
        )
    return FCNHead(
        {node.AUX_IN_FEATURE: input_shape[node.AUX_IN_FEATURE]},
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        num_convs=1,
        concat_input=False,
        channels=node.AUX_CHANNELS,
        norm=cfg.MODEL.SEM_SEG_HEAD.NORM,
        dropout=node.DROPOUT,
    )
