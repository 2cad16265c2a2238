"""The command itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shrinks the quick config; the hard split is evaluated because it has the fewest images.
_SMALL = [
    *("DATASETS.TEST", "('synthetic_panoptic_hard_val',)", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "48"),
]


def _run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train_net.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_train_evaluate_and_resume(repository: Path, tmp_path: Path) -> None:
    config = ("--config-file", "configs/quick/panoptic_fpn_synthetic.yaml")
    options = [*_SMALL, "OUTPUT_DIR", str(tmp_path)]
    trained = _run(repository, *config, *options, "SOLVER.MAX_ITER", "3")
    assert trained.returncode == 0, trained.stderr
    assert "total_loss" in trained.stdout and "data_time" in trained.stdout
    assert "PQ,SQ,RQ" in trained.stdout

    resumed = _run(repository, *config, "--resume", *options, "SOLVER.MAX_ITER", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 3" in resumed.stdout

    weights = ("MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    evaluated = _run(repository, *config, "--eval-only", "--num-gpus", "0", *options, *weights)
    assert evaluated.returncode == 0, evaluated.stderr
    line = "copypaste: PQ,SQ,RQ"
    numbers = [output.split(line)[1].splitlines()[1] for output in (resumed.stdout, evaluated.stdout)]
    assert numbers[0].split("copypaste:")[1] == numbers[1].split("copypaste:")[1]


def test_a_wrong_key_is_one_line_and_an_exit_code(repository: Path, tmp_path: Path) -> None:
    run = _run(repository, "OUTPUT_DIR", str(tmp_path), "SOLVER.NO_SUCH_KEY", "1")
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if "SOLVER.NO_SUCH_KEY" in line]
    assert errors == ["error: option SOLVER.NO_SUCH_KEY 1: Non-existent key: SOLVER.NO_SUCH_KEY"]
    assert "Traceback" not in run.stderr
