"""README says what is true: its links lead somewhere, its commands and its Python run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FEW_STEPS = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(repository: Path, tmp_path: Path) -> Path:
    """A folder in which the commands find the clone's files, and leave their output."""
    for name in ("train_net.py", "configs", "demo", "tools"):
        (tmp_path / name).symlink_to(repository / name)
    return tmp_path


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks of the language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


def run(command: list[str], workplace: Path) -> str:
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_cells(folder: Path, names: tuple[str, ...] = ("train", "val")) -> None:
    """Two images of one cell each for each split, in COCO's panoptic format."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in names:
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(2):
            name = f"{split}{index}.png"
            Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(folder / "images" / name)
            ids = np.full((96, 128, 3), (1, 0, 0), np.uint8)
            ids[20:60, 30:80] = (2, 0, 0)
            Image.fromarray(ids).save(folder / split / name)
            images.append({"id": index, "file_name": name, "height": 96, "width": 128})
            cell = {"id": 2, "category_id": 5, "bbox": [30, 20, 50, 40], "area": 2000, "iscrowd": 0}
            ground = {"id": 1, "category_id": 9, "bbox": [0, 0, 128, 96], "area": 128 * 96 - 2000, "iscrowd": 0}
            annotations.append({"image_id": index, "file_name": name, "segments_info": [cell, ground]})
        categories = [{"id": 5, "name": "cell", "isthing": 1}, {"id": 9, "name": "ground", "isthing": 0}]
        content = {"categories": categories, "images": images, "annotations": annotations}
        (folder / f"{split}.json").write_text(json.dumps(content))


def test_links_and_paths_lead_somewhere(readme: str, repository: Path) -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", readme)
    paths = [path for path in re.findall(r"`([\w./-]+/[\w./-]*)`", readme) if "<" not in path]
    assert links and paths
    assert [path for path in links + paths if not (repository / path).exists()] == []


def test_targets_of_make_exist(readme: str, repository: Path) -> None:
    targets = set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", readme))
    assert {"demo", "test"} <= targets
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)} == set()


@pytest.mark.slow
def test_commands_run(readme: str, workplace: Path) -> None:
    """The block of commands, in its order, with less training."""
    (block,) = [text for text in blocks(readme) if "--eval-only" in text]
    (workplace / "photos").mkdir()
    Image.new("RGB", (128, 96), (90, 120, 60)).save(workplace / "photos" / "a.png")
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    for command in commands:
        assert command[0] == ".venv/bin/python"
        options = FEW_STEPS if command[1] == "train_net.py" else []
        run([sys.executable, "-W", "ignore", *command[1:], *options], workplace)
    assert (workplace / "output" / "predictions" / "a.png").is_file()


@pytest.mark.slow
def test_example_with_own_data_runs(readme: str, workplace: Path) -> None:
    (code,) = [text for text in blocks(readme, "python") if "register_panoptic" in text]
    (block,) = [text for text in blocks(readme) if "--import cells.py" in text]
    (workplace / "cells.py").write_text(code)
    write_cells(workplace / "cells")
    command = shlex.split(block.replace("\\\n", " "))
    options = ["OUTPUT_DIR", "output/cells", *FEW_STEPS]
    run([sys.executable, "-W", "ignore", *command[1:], *options], workplace)
    assert (workplace / "output" / "cells" / "model_final.pth").is_file()
