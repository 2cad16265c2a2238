from __future__ import annotations

import os
import sys

import pytest
import torch

from convmask.benchmark import extra_memory, in_fresh_process


def fill(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes << 20, dtype=torch.uint8)


def in_between(mebibytes: int) -> int:
    """Takes memory that is free again when it returns."""
    return len(fill(mebibytes))


def measured() -> tuple[int, float, float, float]:
    """Runs in a process of its own."""
    fill(1)
    in_between(150)  # what was taken and freed before does not count
    return os.getpid(), extra_memory(lambda: fill(60)), extra_memory(lambda: in_between(90)), extra_memory(int)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be set back on Linux only")
def test_extra_memory_of_a_process() -> None:
    process, kept, freed, nothing = in_fresh_process(measured)
    assert process != os.getpid()
    assert kept == pytest.approx(60, abs=3)
    assert freed == pytest.approx(90, abs=3)
    assert nothing < 1


def test_an_error_in_a_fresh_process_arrives() -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        in_fresh_process(int, "x")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_extra_memory_of_a_gpu() -> None:
    assert extra_memory(lambda: torch.ones(2**20, device="cuda"), "cuda") == pytest.approx(4)
