from __future__ import annotations

import torch
from torch import nn

from convmask.benchmark import count, image_size
from convmask.config import get_cfg


class TwoLayers(nn.Module):
    """Takes and gives Detectron2's list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def inference(self, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return self(inputs)

    def forward(self, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return self.head(self.conv(inputs[0]["image"][None].float()))


def test_counts_of_two_convolutions() -> None:
    counts = count(TwoLayers(), torch.zeros(3, 20, 30))
    cells = 10 * 15
    assert counts["params"] == {"": 224 + 18, "conv": 224, "conv.weight": 216, "conv.bias": 8} | {
        "head": 18,
        "head.weight": 16,
        "head.bias": 2,
    }
    assert counts["flops"] == {"": cells * (216 + 16), "conv": cells * 216, "head": cells * 16}
    assert counts["activations"] == {"": cells * 10, "conv": cells * 8, "head": cells * 2}


def test_images_that_are_not_resized_have_the_usual_size() -> None:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 320, 640
    assert image_size(cfg) == (320, 640)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert image_size(cfg) == (800, 1333)
