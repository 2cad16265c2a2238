"""A training that is killed at any moment and resumed is the training that nothing has happened to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_runs.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def run(folder: Path, *kills: str) -> list[str]:
    """The lines about the runs, each of which has to be equal to the reference."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *kills]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert lines and all(line.endswith(": equal") for line in lines)
    return lines


def test_killed_in_a_checkpoint_and_in_an_evaluation(tmp_path: Path) -> None:
    assert len(run(tmp_path, "rename", "evaluation")) == 2


@pytest.mark.slow
def test_killed_at_every_step_of_writing_and_evaluating(tmp_path: Path) -> None:
    kills = ("iteration", "before_the_first_checkpoint", "write", "pointer", "best", "last_evaluation")
    assert len(run(tmp_path, *kills)) == len(kills)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    lines = run(tmp_path, "random:20")
    assert len(lines) == 20
    # The moments are spread over the whole run: before the first checkpoint, between checkpoints, after the last.
    assert len({line.split(" with ")[1] for line in lines}) > 3
