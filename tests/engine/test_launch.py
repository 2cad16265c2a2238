"""Starting processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convmask.checkpoint import load_file
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
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=1800)
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
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "a wrong key" in line] == ["error: a wrong key"]
    assert "Traceback" not in done.stderr


_TORCHRUN_JOB = """
import os, sys
from pathlib import Path
from convmask.data.panoptic import register_panoptic_records
from convmask.data.synthetic import CATEGORIES, load_records
from convmask.engine import argument_parser, launch, one_line_errors
from convmask.engine.step import TrainStep

root = Path(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
import train_net

register_panoptic_records("few", CATEGORIES, lambda: load_records("panoptic_hard_val")[:4])
losses = TrainStep._losses


def fail_once(step, batch):
    if step.iter == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise TypeError("a bug that is there once")
    return losses(step, batch)


if root.name == "failing":
    TrainStep._losses = fail_once
arguments = argument_parser().parse_args()
with one_line_errors():
    launch(train_net.main, arguments.num_gpus, args=(arguments,))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs, processes take one each")
def test_torchrun_restarts_from_the_last_checkpoint_after_a_traceback(repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(_TORCHRUN_JOB)
    options = ["--config-file", "quick/panoptic_fpn_synthetic.yaml", "--resume"]
    options += ["DATASETS.TRAIN", "('few',)", "DATASETS.TEST", "()", "DATASETS.VALIDATE", "False", "SEED", "1"]
    options += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(48,)"]
    options += ["MODEL.NARROW_RESNET.WIDTH", "8", "MODEL.FPN.OUT_CHANNELS", "32", "SOLVER.MAX_ITER", "5"]
    options += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "SOLVER.CHECKPOINT_PERIOD", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    states = []
    for name in ("whole", "failing"):
        folder = tmp_path / name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", str(script), str(folder), str(repository), *options]
        command += ["OUTPUT_DIR", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("TypeError: a bug that is there once" in done.stderr) == (name == "failing")
        assert ("Starting training from iteration 2" in done.stdout) == (name == "failing")
        states.append(load_file(str(folder / "model_final.pth")))
    whole, failing = states
    assert len(whole["random_states"]["processes"]) == 2
    for key, value in whole["model"].items():
        assert torch.equal(failing["model"][key], value), key


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "2 of 3 processes")],
)
def test_what_torchrun_has_started(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    # A job of one process is that process, whatever --num-gpus says.
    assert launch(lambda a: (os.getpid(), a), 8, args=(2,)) == (os.getpid(), 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launch(print, 1)
