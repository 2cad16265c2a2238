"""Provenance of tensors, inverse rules, and what the written files say about themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import convmask
from convmask.checkpoint import Checkpointer, CheckpointError, inverse_rules, load_file, read_checkpoint, rename_keys
from convmask.checkpoint.conversion import check_target, convert, convert_to_original, metadata_of, save_weights
from convmask.checkpoint.provenance import summary, table, trace
from convmask.checkpoint.recognition import State

from .models import Detector, randomise, resnet


def conversion_of_everything(state: State) -> State:
    state.pop("useless")
    result = rename_keys(state, [(r"old\.(\w+)", r"new.\1"), (r"(same)", r"\1")])
    result["flat"] = state.pop("square").flatten()
    result["turned"] = state.pop("turn").flip(0)
    result["half"] = state.pop("whole")[2:]
    result["both"] = torch.cat([state.pop("a"), state.pop("b")])
    result["scaled"] = state.pop("scale") * 2
    return result


def test_every_fate_of_a_tensor_is_found() -> None:
    state = {
        name: torch.rand(2, 2) if name == "square" else torch.rand(4)
        for name in ("old.x", "same", "square", "turn", "whole", "a", "b", "scale", "useless", "unknown")
    }
    rows = {row.target or row.sources[0]: row.status for row in trace(state, conversion_of_everything)}
    assert rows == {
        "new.x": "renamed",
        "same": "kept",
        "flat": "renamed",
        "turned": "reordered",
        "half": "part",
        "both": "joined",
        "scaled": "recomputed",
        "useless": "dropped",
        "unknown": "left over",
    }
    assert summary(trace(state, conversion_of_everything)).startswith("1 kept, 2 renamed, 1 reordered")


def test_a_table_joins_names_that_differ_in_numbers() -> None:
    state = {f"old.x{i}": torch.rand(3) for i in range(12)}
    text = table(trace(state, lambda s: rename_keys(s, [(r"old\.(\w+)", r"new.\1")])))
    assert [line.split("|")[2].strip() for line in text.splitlines()[2:]] == ["12"]
    assert "old.x*" in text and "new.x*" in text


def test_rules_the_other_way_round() -> None:
    rules = [
        (r"layer1\.(\d+)\.conv(\d)\.(\w+)", r"res2.\1.conv\2.\3"),
        (r"neck\.((?:a|b)\.\w+)\.(?P<tensor>weight|bias)", r"fpn-\g<tensor>.\1"),
    ]
    state = {"layer1.10.conv2.weight": 1, "neck.b.x.bias": 2}
    there = rename_keys(dict(state), rules)
    assert there == {"res2.10.conv2.weight": 1, "fpn-bias.b.x": 2}
    assert rename_keys(there, inverse_rules(rules)) == state
    for pattern in (r"a.b", r"a(b)?", r"(?:a)b", r"a\d"):
        with pytest.raises(ValueError, match="no inverse"):
            inverse_rules([(pattern, "x")])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_ours_says_where_it_is_from_and_backbones_stay_relative(tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    source = randomise(resnet("BN")).state_dict()
    torchvision = {"conv1.weight": source["stem.conv1.weight"], "fc.weight": torch.ones(2, 2), "odd": torch.ones(1)}
    for name, value in source.items():
        if name.startswith("stem.conv1.norm"):
            torchvision[name.replace("stem.conv1.norm", "bn1")] = value
        elif name.startswith("res"):
            layer = name.replace("res", "layer", 1).replace("shortcut.norm", "downsample.1")
            for number in "123":
                layer = layer.replace(f"conv{number}.norm", f"bn{number}")
            torchvision[f"layer{int(layer[5]) - 1}{layer[6:]}".replace("shortcut", "downsample.0")] = value
    torch.save(torchvision, tmp_path / "resnet.pth")
    conversion = convert(str(tmp_path / "resnet.pth"))
    left = {row.sources[0]: row.status for row in conversion.rows if not row.target}
    assert left == {"fc.weight": "dropped", "odd": "left over"}
    target = str(tmp_path / f"clean{suffix}")
    save_weights(target, conversion, metadata_of(conversion, "folder/resnet.pth"))
    rest = read_checkpoint(target).rest
    assert rest["source"] == "torchvision ResNet weights" and rest["source_file"] == "resnet.pth"
    assert rest["convmask_version"] == convmask.__version__ and "RGB" in rest["conventions"]
    model = Detector(norm="BN")
    Checkpointer(model).load(target)
    assert all(torch.equal(value, source[name]) for name, value in model.backbone.bottom_up.state_dict().items())


def test_metadata_of_others_are_no_weights_and_no_marks(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors", {"matching_heuristics": "True"})
    assert load_file(str(tmp_path / "other.safetensors")).keys() == {"x"}


def test_targets_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.pth").write_bytes(b"precious")
    for target, force, message in (
        (tmp_path / "x.pkl", False, r"'\.pkl', not one of"),
        (tmp_path / "absent" / "x.pth", False, "no folder"),
        (tmp_path / "there.pth", False, "exists"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_target(str(target), force)
    check_target(str(tmp_path / "there.pth"), force=True)


def test_no_way_back_for_an_unknown_model(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.ones(2)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: is no model that there is a way back for"):
        convert_to_original(str(tmp_path / "x.pth"))
