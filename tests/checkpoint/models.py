"""Small models and files that the tests of checkpoints share."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np
import torch
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import nn


def resnet(
    norm: str | Callable[[int], nn.Module] = "BN",
    depth: tuple[int, ...] = (1, 1, 1, 1),
    width: int = 8,
    stride_in_1x1: bool = False,
) -> ResNet:
    """Detectron2's ResNet with bottlenecks; ``depth`` blocks in res2, res3, ..., ``width`` channels in the stem."""
    channels, stages = width, []
    for index, blocks in enumerate(depth):
        out_channels = 4 * width * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                bottleneck_channels=out_channels // 4,
                stride_in_1x1=stride_in_1x1,
                norm=norm,
            )
        )
        channels = out_channels
    return ResNet(BasicStem(3, width, norm), stages, out_features=[f"res{i + 2}" for i in range(len(depth))])


class Detector(nn.Module):
    """The module tree of a detector: backbone.bottom_up, an FPN layer, a head and pixel statistics."""

    def __init__(self, classes: int = 3, head: str = "roi_heads", **backbone: object) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = resnet(**backbone)  # type: ignore[arg-type]
        self.backbone.fpn_lateral5 = nn.Conv2d(4, 4, 1)
        module = nn.Module()
        module.conv = nn.Conv2d(4, 4, 3)
        module.cls_score = nn.Linear(4, classes + 1)
        setattr(self, head, module)
        self.register_buffer("pixel_mean", torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1), persistent=False)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills all parameters and buffers; running variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            fresh = torch.randn(value.shape, generator=generator) * 0.1
            value.copy_(fresh.abs() + 0.5 if name.endswith("running_var") else fresh)
    return model


def equal_states(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mxnet_bytes(arrays: Mapping[str, np.ndarray], version: int = 2) -> bytes:
    """A ``.params`` file, written field by field after MXNet's own layout."""
    flags = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}
    out = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    for array in arrays.values():
        if version == 0:
            out.append(struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape))
        else:
            out.append(struct.pack("<I", {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}[version]))
            out.append(struct.pack("<i", 0) if version > 1 else b"")
            out.append(struct.pack(f"<i{array.ndim}q", array.ndim, *array.shape))
        out.append(struct.pack("<iii", 1, 0, flags[str(array.dtype)]))
        out.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
    out.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        out.append(struct.pack("<Q", len(name.encode())) + name.encode())
    return b"".join(out)
