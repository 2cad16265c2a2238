"""Checkpoints of the original release: recognised, converted, and told apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer, CheckpointError, read_checkpoint

STAR = ("MODEL.PANOPTIC_FCN.FEATURE_ENCODER.DEFORM", True)


def released(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of the release, from a model's."""
    result = {}
    for name, value in state.items():
        head, _, rest = name.partition(".tower.")
        if rest:
            number, rest = rest.split(".", 1)
            part = "encode_head" if head == "feature_encoder" else head
            deformable = f"{head}.tower.{number}.offset.weight" in state
            if rest.startswith("offset."):
                rest = "offset_mask_conv." + rest.removeprefix("offset.")
            elif deformable:
                rest = f"dcnv2.{rest}"
            name = f"{head}.{part}.{part}_head_{int(number) + 1}.{rest}"
        name = name.replace("head.centers", "head.out_inst").replace("head.regions", "head.out_sem")
        name = name.replace("kernel_head.kernels", "kernel_head.out_conv")
        if re.fullmatch(r"(thing|stuff)_embedding\.\w+", name):
            name = name.replace("embedding", "generator.embed_extractor")
            value = value[..., None, None] if name.endswith("weight") else value
        result[name] = value
    return result


def write(path: Path, cfg: CfgNode) -> dict[str, torch.Tensor]:
    state = build_model(cfg).state_dict()
    torch.save({"model": released(state), "iteration": 269999}, path)
    return state


@pytest.mark.parametrize("options", [(), STAR])
def test_every_weight_has_its_place(small_cfg: Callable[..., CfgNode], tmp_path: Path, options: tuple) -> None:
    state = write(tmp_path / "original.pth", small_cfg(*options))
    model = build_model(small_cfg(*options))
    Checkpointer(model, policy="strict").load(str(tmp_path / "original.pth"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(("of_file", "of_model", "config"), [(STAR, (), "star_R_50_3x"), ((), STAR, "R_50_3x")])
def test_base_and_star_are_told_apart(
    small_cfg: Callable[..., CfgNode], tmp_path: Path, of_file: tuple, of_model: tuple, config: str
) -> None:
    write(tmp_path / "original.pth", small_cfg(*of_file))
    model = build_model(small_cfg(*of_model))
    with pytest.raises(CheckpointError, match=rf"(?s)original release.*configs/PanopticFCN/panoptic_fcn_{config}.yaml"):
        Checkpointer(model, policy="strict").load(str(tmp_path / "original.pth"))


def test_other_class_counts_name_their_dataset(small_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    write(tmp_path / "original.pth", small_cfg("MODEL.PANOPTIC_FCN.NUM_CLASSES", 8))
    assert (
        read_checkpoint(str(tmp_path / "original.pth")).config
        == "configs/PanopticFCN/panoptic_fcn_R_50_cityscapes.yaml"
    )


def test_the_hint_says_which_means_the_weights_expect(small_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    write(tmp_path / "original.pth", small_cfg())
    assert "BGR" in read_checkpoint(str(tmp_path / "original.pth")).hint
