from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from convmask.export import ExportError
from convmask.export.program import check_requirements

from ..export.models import photograph, quick_config, random_model


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/export.py")


@pytest.fixture
def semantic(tmp_path: Path) -> list[str]:
    """The arguments for a small model with its weights."""
    return arguments_of("knet_semantic_synthetic", tmp_path)


def arguments_of(name: str, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(quick_config(name).dump())
    torch.save({"model": random_model(name).state_dict()}, folder / "model.pth")
    return ["--config-file", str(folder / "config.yaml"), "--weights", str(folder / "model.pth")]


def needs(*formats: str) -> None:
    try:
        check_requirements(formats, running=True)
    except ExportError as error:
        pytest.skip(str(error))


def test_a_program_and_its_description(
    tool: ModuleType, semantic: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("pt2")
    output = tmp_path / "exported"
    arguments = [*semantic, "--output", str(output), "--format", "pt2", "--size", "64", "96", "--check", "1"]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| pt2 +\| 64 x 96 \|.*\| same \|", printed) and "inside: network" in printed
    assert sorted(path.name for path in output.iterdir()) == ["model_64x96.json", "model_64x96.pt2"]
    about = json.loads((output / "model_64x96.json").read_text())
    assert about["input"]["shape"] == [3, 64, 96] and about["input"]["channels"] == "BGR"
    assert list(about["outputs"]) == ["sem_seg"] and about["files"] == {"pt2": "model_64x96.pt2"}
    assert about["classes"]["stuff_classes"]
    program = torch.export.load(output / "model_64x96.pt2").module()
    assert program(photograph(64, 96))["sem_seg"].shape == (9, 64, 96)


def test_wrong_outputs_are_shown_and_end_with_exit_code_1(
    tool: ModuleType,
    semantic: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs("pt2")

    def wrong(content: bytes) -> object:
        return lambda image: {"sem_seg": np.zeros((9, *image.shape[1:]), np.float32)}

    monkeypatch.setattr(tool, "export_program", lambda *_: None)
    monkeypatch.setattr(tool, "program_bytes", lambda _: b"")
    monkeypatch.setattr(tool, "program_runner", wrong)
    arguments = [*semantic, "--output", str(tmp_path / "o"), "--format", "pt2", "--size", "64", "96", "--check", "1"]
    assert tool.main(arguments) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "16", "64"], "--size 16 64: sides must be at least 32"),
        (["--dynamic", "--size", "64", "64", "--size", "64", "96"], "--dynamic makes one file for all sizes"),
        (["--images", "nowhere.png"], "no file nowhere.png"),
        (["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED: switch it off to export"),
        (["--check", "-1"], "--check -1 is less than 0"),
    ],
)
def test_mistakes_are_said_before_work_starts(
    tool: ModuleType,
    semantic: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    needs("pt2")
    with pytest.raises(SystemExit) as ended:
        tool.main([*semantic, "--format", "pt2", "--output", str(tmp_path / "exported"), *options])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_packages_that_are_missing_are_named(
    tool: ModuleType,
    semantic: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "onnx" else find(name))
    with pytest.raises(SystemExit):
        tool.main([*semantic, "--output", str(tmp_path / "exported")])
    assert "--format onnx needs onnx" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_of_the_page_runs_without_this_code(tool: ModuleType, repository: Path, tmp_path: Path) -> None:
    needs("pt2", "onnx")
    arguments = arguments_of("embed_mask_synthetic", tmp_path)
    output = tmp_path / "exported"
    options = ["--format", "onnx", "--dynamic", "--size", "128", "160", "--check", "2"]
    assert tool.main([*arguments, "--output", str(output), *options]) == 0
    page = (repository / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = [
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "photo" in block
    ]
    (tmp_path / "run_exported.py").write_text(code)
    pixels = photograph(128, 160).permute(1, 2, 0).numpy()[:, :, ::-1].astype(np.uint8)
    Image.fromarray(pixels).resize((200, 150)).save(tmp_path / "photo.png")
    guard = "import sys; sys.modules['torch'] = sys.modules['convmask'] = None; sys.argv = sys.argv[1:]; "
    run = guard + "exec(open('run_exported.py').read())"
    command = [sys.executable, "-c", run, "run_exported.py", "exported", "photo.png", "0.0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines and all(re.match(r"\w+ +0\.\d\d +\[", line) for line in lines), done.stdout
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.size == (200, 150)
