"""Two processes on the CPU, as torchrun starts them; what they do is in ``two_processes.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from convmask.checkpoint import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder that the scenarios have written into, and the exit code of each."""
    if not (hasattr(os, "fork") and dist.is_gloo_available()):
        pytest.skip("needs fork and GLOO")
    folder = tmp_path_factory.mktemp("two_processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    scenarios = ("equivalence", "empty_images", "unused_parameter", "a_process_dies", "resumed")
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *scenarios]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return folder, {name: int(code) for name, code in (line.split() for line in done.stdout.splitlines())}


def log(folder: Path, scenario: str, rank: int) -> str:
    return (folder / f"{scenario}_{rank}.txt").read_text()


def test_they_train_as_one_does_in_two_passes(found: tuple[Path, dict[str, int]]) -> None:
    folder, codes = found
    assert codes["equivalence"] == 0, log(folder, "equivalence", 0)
    alone, together = (torch.load(folder / f"{name}_process{s}.pth") for name, s in (("one", ""), ("two", "es")))
    assert alone["losses"].keys() == together["losses"].keys()
    for name, values in alone["losses"].items():
        assert [value for value, _ in together["losses"][name]] == pytest.approx([value for value, _ in values])
        assert len({value for value, _ in values}) == 3
    for name, value in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], value, msg=name)
        assert not torch.equal(value, alone["before"][name]), name


def test_images_of_nothing_do_not_hang_and_touch_every_parameter(found: tuple[Path, dict[str, int]]) -> None:
    folder, codes = found
    assert codes["empty_images"] == 0, log(folder, "empty_images", 0) + log(folder, "empty_images", 1)
    assert (folder / "empty_0").exists() and (folder / "empty_1").exists()


def test_a_parameter_without_gradient_is_named_instead_of_waited_for(found: tuple[Path, dict[str, int]]) -> None:
    folder, codes = found
    assert codes["unused_parameter"] not in (0, 3)
    text = log(folder, "unused_parameter", 1)
    assert "unused.bias, module.unused.weight" in text and "a.png" in text and "FIND_UNUSED_PARAMETERS" in text


def test_a_process_that_dies_leaves_its_traceback(found: tuple[Path, dict[str, int]]) -> None:
    folder, codes = found
    assert codes["a_process_dies"] not in (0, 3)
    assert "TypeError: a bug in the second process" in log(folder, "a_process_dies", 1)


def test_a_resumed_training_of_two_is_the_same(found: tuple[Path, dict[str, int]]) -> None:
    folder, codes = found
    assert codes["resumed"] == 0, log(folder, "resumed", 0)
    whole, halves = (load_file(str(folder / name / "model_final.pth")) for name in ("whole", "halves"))
    for name, value in whole["model"].items():
        assert torch.equal(halves["model"][name], value), name
    ours, theirs = whole["random_states"]["processes"], halves["random_states"]["processes"]
    assert len(ours) == 2 and not torch.equal(ours[0]["torch"], ours[1]["torch"])
    assert all(torch.equal(mine["torch"], other["torch"]) for mine, other in zip(ours, theirs, strict=True))
