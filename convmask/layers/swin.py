"""torchvision's Swin Transformer (arXiv 2103.14030) as a Detectron2 backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

_PATCH = 4
_NAMES = ("res2", "res3", "res4", "res5")


class Swin(Backbone):
    """The stages of a Swin Transformer, each output with a layer normalisation of its own.

    Maps are res2 to res5 at strides 4, 8, 16 and 32, sizes rounded up: images need not be divisible by anything, as
    patches, merging and windows are padded with zeros. Parameters have torchvision's names (``features.1.0.attn...``)
    and ``norm0`` to ``norm3``.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.2,
        out_features: Sequence[str] = _NAMES,
    ) -> None:
        """Builds the stages up to the last of ``out_features``.

        Args:
            embed_dim: channels of res2; each later stage has twice as many.
            depths: blocks of each stage.
            num_heads: of the attention in each stage.
            window_size: side of the attention's windows.
            drop_path_rate: probability that the last block is left out in training; it grows from 0 block by block.
            out_features: of "res2" to "res5".

        Raises:
            ValueError: an unknown output, none, or lists of other lengths than 4.
        """
        super().__init__()
        if not out_features or not set(out_features) <= set(_NAMES):
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES is {list(out_features)}: known are {', '.join(_NAMES)}")
        if len(depths) != len(_NAMES) or len(num_heads) != len(_NAMES):
            raise ValueError(f"MODEL.SWIN: DEPTHS {list(depths)} and NUM_HEADS {list(num_heads)} must have 4 entries")
        whole = SwinTransformer(
            [_PATCH, _PATCH],
            embed_dim,
            list(depths),
            list(num_heads),
            [window_size, window_size],
            stochastic_depth_prob=drop_path_rate,
            num_classes=1,
        )
        last = max(_NAMES.index(name) for name in out_features)
        # patches, then stages and the mergings between them in turn
        self.features = whole.features[: 2 * last + 2]
        self._out_features = list(out_features)
        self._out_feature_channels = {name: embed_dim * 2**level for level, name in enumerate(_NAMES)}
        self._out_feature_strides = {name: _PATCH * 2**level for level, name in enumerate(_NAMES)}
        for level, name in enumerate(_NAMES):
            if name in out_features:
                self.add_module(f"norm{level}", nn.LayerNorm(self._out_feature_channels[name]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) normalised RGB images to the maps (N, C, h, w) by name."""
        outputs = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            level, is_stage = divmod(index - 1, 2)
            if is_stage == 0 and index > 0 and _NAMES[level] in self._out_features:
                normalised = self.get_submodule(f"norm{level}")(x)
                outputs[_NAMES[level]] = normalised.permute(0, 3, 1, 2).contiguous()
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """A Swin Transformer by ``MODEL.SWIN``, for images of three channels; nothing of it is frozen."""
    if input_shape.channels != 3:
        raise ValueError(f"build_swin_backbone: images have 3 channels, MODEL.PIXEL_MEAN has {input_shape.channels}")
    node = cfg.MODEL.SWIN
    return Swin(
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        out_features=node.OUT_FEATURES,
    )


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with an FPN by ``MODEL.FPN``: p2 to p5, none above."""
    return FPN(
        bottom_up=build_swin_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
