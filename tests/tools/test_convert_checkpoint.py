"""The command line: what it refuses, before it writes and without a trace. Conversions: tests/projects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from convmask import model_zoo
from convmask.checkpoint import load_file

CONFIG = "quick/fcis_fpn_synthetic.yaml"


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/convert_checkpoint.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training's checkpoint."""
    state = model_zoo.get(CONFIG, weights="", device="cpu").state_dict()
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "ema_model": average, "iteration": 3, "meta_architecture": "FCIS"}, path)
    return path


def test_the_average_and_the_config_are_asked_for(
    tool: ModuleType, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "clean.pth"
    assert tool.main([str(weights), str(target), "--config-file", CONFIG]) == 0
    assert f"config: {CONFIG}" in capsys.readouterr().out
    content = load_file(str(target))
    assert content["config"] == CONFIG and "iteration" not in content and "ema_model" not in content
    assert tool.main([str(weights), str(tmp_path / "average.pth"), "--average"]) == 0
    average = load_file(str(tmp_path / "average.pth"))["model"]
    assert all(torch.equal(average[name], value + 1) for name, value in content["model"].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "quick/panoptic_fcn_synthetic.yaml"], "does not fit this PanopticFCN"),
        (["--config-file", CONFIG, "--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "many"], "option MODEL.ROI_HEADS"),
        (["--to-original"], "without loss: FCIS"),
    ],
)
def test_what_does_not_fit_writes_nothing(
    tool: ModuleType,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main([str(weights), str(tmp_path / "x.pth"), *arguments])
    assert end.value.code == 1 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_with_force(
    tool: ModuleType, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "there.pth"
    target.write_bytes(b"precious")
    with pytest.raises(SystemExit):
        tool.main([str(weights), str(target)])
    assert "--force" in capsys.readouterr().err and target.read_bytes() == b"precious"
    assert tool.main([str(weights), str(target), "--force"]) == 0
    assert len(load_file(str(target))["model"]) > 10


def test_details_are_replaced_only_with_force(
    tool: ModuleType, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    details = tmp_path / "tensors.json"
    details.write_bytes(b"precious")
    given = [str(weights), "--dry-run", "--json"]
    for path, message in (
        (details, "--force"),
        (tmp_path / "no" / "x.json", "there is no folder"),
        (tmp_path, "exists"),
    ):
        with pytest.raises(SystemExit) as end:
            tool.main([*given, str(path)])
        printed = capsys.readouterr()
        # before anything is converted
        assert end.value.code == 1 and message in printed.err and not printed.out
    with pytest.raises(SystemExit):
        tool.main([str(weights), str(tmp_path / "x.pth"), "--json", str(tmp_path / "x.pth")])
    assert "is the file of the weights" in capsys.readouterr().err
    assert details.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [details]
    assert tool.main([*given, str(details), "--force"]) == 0
    assert json.loads(details.read_text())["tensors"]


def test_the_source_is_never_replaced(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(b"precious")
    (tmp_path / "link.pth").symlink_to(source)
    for more in ([str(source)], [str(tmp_path / "link.pth")], ["--dry-run", "--json", str(source)]):
        with pytest.raises(SystemExit) as end:
            tool.main([str(source), *more, "--force"])
        assert end.value.code == 1 and "is the source itself" in capsys.readouterr().err
    assert source.read_bytes() == b"precious"


def test_code_in_a_file_is_not_run(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch hackedq\x00\x85R.")
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "evil.pkl"), "--dry-run"])
    assert "evil.pkl" in capsys.readouterr().err


def test_the_command_line_is_checked(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["x.pth"], ["x.pth", "y.pth", "--opts", "A", "1"]):
        with pytest.raises(SystemExit) as end:
            tool.parse_arguments(arguments)
        assert end.value.code == 2
    capsys.readouterr()
