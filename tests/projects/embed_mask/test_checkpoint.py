"""Checkpoints of the original releases: recognised with what surrounds them, converted, and told apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from convmask.config import get_cfg
from convmask.projects.embed_mask.checkpoint import _FROZEN_EPSILON

State = dict[str, torch.Tensor]


@pytest.fixture
def narrow(repository: Path) -> Callable[[str], CfgNode]:
    """The release's config of a generation, narrow."""

    def make(generation: str) -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_file(str(repository / "configs" / "EmbedMask" / f"embed_mask_{generation}_R_50_1x.yaml"))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 32])
        cfg.merge_from_list(["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8])
        cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.EMBED_MASK.NUM_CLASSES", 3])
        return cfg

    return make


def released(state: State, position_channels: bool) -> State:
    """Weights by the names of maskrcnn-benchmark, from a model's."""
    rules: list[tuple[str, Any]] = [
        (r"backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.stem.bn1"),
        (r"backbone\.bottom_up\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}"),
        (r"backbone\.bottom_up\.", "backbone.body."),
        (r"(layer\d\.\d+)\.conv(\d)\.norm", r"\1.bn\2"),
        (r"shortcut\.norm\.", "downsample.1."),
        (r"shortcut\.", "downsample.0."),
        (r"fpn_lateral(\d)", lambda m: f"fpn.fpn_inner{int(m[1]) - 1}"),
        (r"fpn_output(\d)", lambda m: f"fpn.fpn_layer{int(m[1]) - 1}"),
        (r"backbone\.top_block", "backbone.fpn.top_blocks"),
        (r"^(fcos|embedding)_head\.", "rpn.head."),
        # convolutions first: their new numbers are followed by the same words as the normalisations' old ones
        (r"tower\.(\d)\.(weight|bias)$", lambda m: f"tower.{3 * int(m[1])}.conv_{m[2]}"),
        (r"tower\.(\d)\.norm", lambda m: f"tower.{3 * int(m[1]) + 1}"),
        (r"conv_(weight|bias)$", r"\1"),
        (r"rpn\.head\.margin\.", "rpn.head.proposal_margin_pred."),
        (r"head\.(proposal|pixel)_embed\.", r"head.\1_embed_pred."),
    ]
    result = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        match = re.fullmatch(r"(.*(?:proposal|pixel))_embed_pred\.(\w+)", name)
        if match and position_channels:
            result[f"{match[1]}_spatial_embed_pred.{match[2]}"] = value[:2]
            result[f"{match[1]}_other_embed_pred.{match[2]}"] = value[2:]
        else:
            result[name] = value
    return result


def write(path: Path, cfg: CfgNode, prefix: str = "") -> State:
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(1e-3, 2.0)
    weights = {f"{prefix}{k}": v for k, v in released(state, cfg.MODEL.EMBED_MASK.POSITION_CHANNELS).items()}
    surroundings = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01, "params": [0]}]},
        "scheduler": {"last_epoch": 90000},
        "iteration": 90000,
    }
    torch.save({"model": weights, **surroundings}, path)
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("generation", ["v0", "v1", "v2"])
def test_every_weight_has_its_place(
    narrow: Callable[[str], CfgNode], tmp_path: Path, generation: str, prefix: str
) -> None:
    state = write(tmp_path / "original.pth", narrow(generation), prefix)
    model = build_model(narrow(generation))
    Checkpointer(model, policy="strict").load(str(tmp_path / "original.pth"))
    for name, value in model.state_dict().items():
        if name.endswith("norm.weight") and name.replace("weight", "running_var") in state:
            # Detectron2 divides by sqrt(var + eps), the original by sqrt(var)
            variance = state[name.replace("weight", "running_var")]
            found = value / (variance + _FROZEN_EPSILON).sqrt()
            torch.testing.assert_close(found, state[name] / variance.sqrt(), rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(("of_file", "of_model"), [("v0", "v2"), ("v2", "v0"), ("v1", "v2"), ("v1", "v0")])
def test_generations_are_told_apart(
    narrow: Callable[[str], CfgNode], tmp_path: Path, of_file: str, of_model: str
) -> None:
    write(tmp_path / "original.pth", narrow(of_file))
    model = build_model(narrow(of_model))
    with pytest.raises(CheckpointError, match=rf"(?s)original release.*embed_mask_{of_file}_R_50_1x.yaml"):
        Checkpointer(model, policy="strict").load(str(tmp_path / "original.pth"))


def test_the_hint_says_which_means_the_weights_expect(narrow: Callable[[str], CfgNode], tmp_path: Path) -> None:
    write(tmp_path / "original.pth", narrow("v0"))
    checkpoint = read_checkpoint(str(tmp_path / "original.pth"))
    assert "102.9801" in checkpoint.hint
    assert not checkpoint.unused
