"""What docs/getting_started.md says about own data works as it is written, with less training."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .commands import commands, own_file
from .pages import ROOT, blocks

PAGE = "docs/getting_started.md"
FEW_STEPS = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


def run(arguments: list[str], folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


def runnable(command: str) -> bool:
    """Installs and downloads nothing; trainings on the synthetic set have tests of their own."""
    absent = (" -m ", "://", "configs/quick/")
    return command.startswith("python ") and not any(text in command for text in absent)


@pytest.mark.slow
def test_from_own_data_to_predictions(tmp_path: Path) -> None:
    for name in ("train_net.py", "configs", "demo", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks(PAGE):
        if block.file_name:
            own_file(tmp_path, block.file_name, block.text)
        elif block.not_run:
            own_file(tmp_path, "predict.py", block.text)
        for command in filter(runnable, commands(block.text) if block.language == "bash" else []):
            words = shlex.split(command)[1:]
            run([*words, *(FEW_STEPS if words[0] == "train_net.py" else [])], tmp_path)
    run(["predict.py"], tmp_path)
    output = tmp_path / "output"
    assert (output / "cells" / "model_final.pth").is_file() and (output / "cells" / "metrics.json").is_file()
    pictures = sorted(path.name for path in (tmp_path / "cells" / "images").iterdir())
    assert sorted(path.name for path in (output / "cells_predictions").glob("*.png")) == pictures
    assert (output / "cells_predictions" / "panoptic.json").is_file()
    assert list((output / "cells_pictures").iterdir())
