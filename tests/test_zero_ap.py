"""docs/zero_ap.md: every command in it works as it is written, on a small set, with less training."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .tools.own_data import write_own_data

FEW = ["SOLVER.MAX_ITER", "8", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def workplace(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("train_net.py", "demo", "tools"):
        (tmp_path / name).symlink_to(repository / name)
    write_own_data(tmp_path / "data")
    (tmp_path / "data" / "images").rename(tmp_path / "photos")
    (tmp_path / "data" / "panoptic").rename(tmp_path / "panoptic")
    for name in ("panoptic", "instances"):
        target = "annotations.json" if name == "instances" else "panoptic.json"
        (tmp_path / "data" / f"{name}.json").rename(tmp_path / target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code; programs of ours run in this process, which has imported what takes seconds."""
    if command[0] != "python":
        return subprocess.run(command, capture_output=True).returncode
    monkeypatch.setattr(sys, "argv", command[1:])
    try:
        runpy.run_path(command[1], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def shortened(command: list[str]) -> list[str]:
    if "tools/train_on_my_data.py" in command:
        command = ["2s" if word == "5m" else word for word in command]
        return [*command, *([] if "--opts" in command else ["--opts"]), *FEW]
    few = FEW if "--eval-only" not in command else FEW[4:]
    return [*command, *few] if "train_net.py" in command else command


@pytest.mark.slow
def test_every_command_works(repository: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (repository / "docs" / "zero_ap.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) > 15
    for command in commands:
        assert run(shortened(command), monkeypatch) == 0, command
    assert list((workplace / "output" / "looked_at").glob("*.png"))
    assert list((workplace / "output" / "fed").glob("*.png"))


def test_links_lead_somewhere(repository: Path) -> None:
    page = (repository / "docs" / "zero_ap.md").read_text(encoding="utf-8")
    titles = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", page, re.M)
    }
    anchors = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert anchors and anchors <= titles


def test_named_keys_exist(repository: Path) -> None:
    """Dotted names in capitals are keys of the config."""
    from convmask.config import get_cfg

    page = (repository / "docs" / "zero_ap.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"\b(?:MODEL|INPUT|SOLVER|TEST|DATASETS|DATALOADER)(?:\.[A-Z][A-Z0-9_]*)+", page))
    assert len(keys) > 20
    for key in keys:
        node = get_cfg()
        for part in key.split("."):
            assert part in node, key
            node = node[part]
