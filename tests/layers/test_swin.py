"""The Swin backbone against torchvision's own forward pass, on sizes that no window divides, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from convmask.checkpoint import Checkpointer, recognise
from convmask.config import get_cfg
from convmask.layers import Swin

OPTIONS: dict[str, Any] = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def narrow(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", name, "MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", (2, 2, 2, 2)),
            *("MODEL.SWIN.NUM_HEADS", (1, 2, 2, 4), "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.DEVICE", "cpu"),
        ]
    )
    return cfg


def torchvision_swin() -> SwinTransformer:
    return SwinTransformer([4, 4], 12, [2, 2, 2, 2], [1, 2, 2, 4], [7, 7], num_classes=3)


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (33, 250)])
def test_stages_are_those_of_torchvision(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    whole, backbone = torchvision_swin().eval(), Swin(**OPTIONS).eval()
    backbone.features.load_state_dict(whole.features.state_dict())
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        outputs = backbone(image)
        x = image
        for index, layer in enumerate(whole.features):
            x = layer(x)
            if index % 2:
                expected = nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
                torch.testing.assert_close(outputs[f"res{(index - 1) // 2 + 2}"], expected, rtol=1e-4, atol=1e-5)
    for name, shape in backbone.output_shape().items():
        # every merging rounds up
        height, width = size[0] // 4, size[1] // 4
        for _ in range(int(name[3]) - 2):
            height, width = -(-height // 2), -(-width // 2)
        assert outputs[name].shape == (2, shape.channels, height, width)


def test_only_what_is_asked_for_is_built() -> None:
    backbone = Swin(**OPTIONS, out_features=["res3"])
    assert set(backbone(torch.randn(1, 3, 64, 64))) == {"res3"}
    assert len(backbone.features) == 4 and not hasattr(backbone, "norm0")


def test_fpn() -> None:
    backbone = build_backbone(narrow("build_swin_fpn_backbone")).eval()
    assert backbone.size_divisibility == 32
    outputs = backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(x.shape[1:]) for name, x in outputs.items()} == {
        f"p{level}": (16, 64 // 2**level, 96 // 2**level) for level in range(2, 6)
    }


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="OUT_FEATURES"):
        Swin(**OPTIONS, out_features=["res6"])
    with pytest.raises(ValueError, match="DEPTHS"):
        Swin(embed_dim=12, depths=(2, 2), num_heads=(1, 2))


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = build_backbone(narrow(name))


def original_names(swin: SwinTransformer) -> dict[str, torch.Tensor]:
    """The state by the names of the original release."""
    state = {}
    for name, value in swin.state_dict().items():
        part, *rest = name.removeprefix("features.").split(".", 1)
        tail = rest[0] if rest else ""
        if not name.startswith("features."):
            state[name] = value
        elif part == "0":
            state["patch_embed." + tail.replace("0.", "proj.", 1).replace("2.", "norm.", 1)] = value
        elif int(part) % 2:
            tail = tail.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            block, inner = tail.split(".", 1)
            state[f"layers.{int(part) // 2}.blocks.{block}.{inner}"] = value
        else:
            state[f"layers.{int(part) // 2 - 1}.downsample.{tail}"] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    return state


@pytest.mark.parametrize("name", ["build_swin_backbone", "build_swin_fpn_backbone"])
@pytest.mark.parametrize("original", [False, True])
def test_imagenet_weights_are_loaded(name: str, original: bool, tmp_path: Path) -> None:
    source, model = torchvision_swin(), Model(name)
    state = original_names(source) if original else source.state_dict()
    assert recognise(dict(state), "f").unused == []
    torch.save({"model": dict(state)}, tmp_path / "swin.pth")
    Checkpointer(model, policy="finetune").load(str(tmp_path / "swin.pth"))
    swin = model.backbone.bottom_up if "fpn" in name else model.backbone
    for key, value in source.features.state_dict().items():
        assert torch.equal(swin.features.state_dict()[key], value), key
