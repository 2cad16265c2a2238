"""tools/convert_checkpoint.py on files of the releases; the way back has to mind the folded normalisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.checkpoint import load_file

from .test_checkpoint import narrow, write  # noqa: F401 (a fixture)


@pytest.mark.parametrize("generation", ["v1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v0", "v2"))])
def test_the_way_back_gives_a_file_that_loads_alike(
    narrow: Callable[[str], CfgNode],  # noqa: F811
    tmp_path: Path,
    generation: str,
    check_conversion: Callable,
    convert_checkpoint: Callable,
) -> None:
    """Of two originals that load alike one is written: they differ in the last bit of a normalisation's weight."""
    cfg = narrow(generation)
    write(tmp_path / "original.pth", cfg)
    converted = check_conversion(tmp_path / "original.pth", lambda: build_model(cfg))
    assert convert_checkpoint([str(converted), str(tmp_path / "back.pth"), "--to-original"]) == 0
    again = tmp_path / "again.safetensors"
    assert convert_checkpoint([str(tmp_path / "back.pth"), str(again)]) == 0
    first, second = load_file(str(converted)), load_file(str(again))
    assert all(torch.equal(x, second[name]) for name, x in first.items() if isinstance(x, torch.Tensor))
    found, expected = load_file(str(tmp_path / "back.pth"))["model"], load_file(str(tmp_path / "original.pth"))["model"]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if not torch.equal(value, expected[name]):
            assert name.endswith(".weight") and f"{name.removesuffix('weight')}running_var" in expected, name
            torch.testing.assert_close(value, expected[name], rtol=2e-7, atol=0)


def test_weights_that_no_file_of_the_release_gives_are_refused(
    narrow: Callable[[str], CfgNode],  # noqa: F811
    tmp_path: Path,
    convert_checkpoint: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a factor of 1.7 most weights are no rounded product."""
    state = build_model(narrow("v0")).state_dict()
    torch.manual_seed(0)
    for name, value in state.items():
        if name.endswith("norm.running_var"):
            value.fill_(1e-5 / (1.7**2 - 1))
        elif "norm.weight" in name:
            value.uniform_(0.5, 1.0)
    torch.save({"model": state}, tmp_path / "ours.pth")
    with pytest.raises(SystemExit):
        convert_checkpoint([str(tmp_path / "ours.pth"), str(tmp_path / "back.pth"), "--to-original"])
    error = capsys.readouterr().err
    assert "without loss" in error and "norm.weight" in error and not (tmp_path / "back.pth").exists()
