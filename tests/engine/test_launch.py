"""Starting processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convmask.engine import ConfigError, launch

_JOB = """
import torch
from convmask.engine.launch import launch
from convmask.engine.step import check_finite
from detectron2.utils import comm


def main(folder):
    # Only rank 1 has a bad loss; both must stop, and say the same.
    value = float("nan") if comm.get_rank() == 1 else 1.0
    try:
        check_finite({"loss_mask": torch.tensor(value)}, [{"file_name": f"of_rank_{comm.get_rank()}.png"}], 5)
    except FloatingPointError as error:
        text = f"{comm.get_local_rank()}/{comm.get_local_size()} {torch.distributed.get_backend()} {error}"
        with open(f"{folder}/{comm.get_rank()}.txt", "w") as file:
            file.write(text)


if __name__ == "__main__":
    import sys
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
"""


_FAILING_JOB = """
from convmask.engine import ConfigError, launch, one_line_errors


def main():
    raise ConfigError("a wrong key")


if __name__ == "__main__":
    with one_line_errors():
        launch(main, 2, dist_url="auto")
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_one_process_is_this_one(processes: int) -> None:
    assert launch(lambda a, b: (os.getpid(), a + b), processes, args=(2, 3)) == (os.getpid(), 5)


def test_a_machine_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="machine 2 of 2"):
        launch(print, 1, num_machines=2, machine_rank=2, dist_url="tcp://127.0.0.1:1")


def test_several_machines_need_an_address() -> None:
    with pytest.raises(ConfigError, match="--dist-url auto"):
        launch(print, 1, num_machines=2, dist_url="auto")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs, processes take one each")
def test_two_processes_on_the_cpu_stop_together_at_a_bad_loss(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(_JOB)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=300)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    for rank, text in enumerate(texts):
        assert text.startswith(f"{rank}/2 gloo ")
        assert "loss_mask = nan" in text
        assert "of_rank_1.png" in text
        assert "of_rank_0.png" not in text


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs, processes take one each")
def test_a_mistake_that_all_processes_notice_is_told_once(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(_FAILING_JOB)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "a wrong key" in line] == ["error: a wrong key"]
    assert "Traceback" not in done.stderr
