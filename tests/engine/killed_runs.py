"""Trainings that are killed and resumed: ``python killed_runs.py FOLDER KILL ...``; KILL of ``KILLS`` or ``random:N``.

A reference run is left alone; every other run is killed by SIGKILL, once or, with ``random:N``, N runs once each at a
random moment, and resumed. Each has to end with the files of the reference run, bit by bit. Runs are forked from this
process: starting Python and importing PyTorch takes longer than the training does.

Prints a line for each run, and ends with exit code 1 if one differs.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog

from convmask.checkpoint import Checkpointer, load_file
from convmask.data.panoptic import register_panoptic_records
from convmask.data.synthetic import CATEGORIES, load_records
from convmask.engine import argument_parser
from convmask.engine.step import TrainStep
from convmask.evaluation import PanopticEvaluator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_net

NAME = "images_of_killed_runs"
OPTIONS = [
    *("DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)", "DATASETS.VALIDATE", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48", "INPUT.COLOR_AUG_SSD", "True", "SEED", "5"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.NARROW_RESNET.WIDTH", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("SOLVER.CHECKPOINTS_TO_KEEP", "2", "SOLVER.EMA.ENABLED", "True", "SOLVER.WARMUP_ITERS", "3"),
    *("TEST.EVAL_PERIOD", "4", "TEST.BEST_METRIC", "sem_seg/mIoU"),
]


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: Any, name: str, condition: Callable[..., bool]) -> None:
    """Makes a method kill the process when it is called and the condition holds for its arguments."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if condition(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def _after_replacing(name: str) -> None:
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        original(source, target)
        if Path(target).name == name:
            die()

    os.replace = replace  # type: ignore[assignment]


def _while_writing(name: str) -> None:
    original = Checkpointer._write

    def write(self: Checkpointer, path: str, content: Any) -> None:
        if Path(path).name == name:
            Path(f"{path}.partial").write_bytes(b"PK\x03\x04 the first bytes")
            die()
        original(self, path, content)

    Checkpointer._write = write  # type: ignore[method-assign]


def _calls(count: int) -> Callable[..., bool]:
    """True in the call number ``count``."""
    left = [count]

    def condition(*_: Any, **__: Any) -> bool:
        left[0] -= 1
        return left[0] == 0

    return condition


KILLS: dict[str, Callable[[], None]] = {
    "iteration": lambda: _before(TrainStep, "_losses", lambda step, batch: step.iter == 6),
    "before_the_first_checkpoint": lambda: _before(TrainStep, "_losses", lambda step, batch: step.iter == 1),
    "write": lambda: _while_writing("model_0000005.pth"),
    "rename": lambda: _after_replacing("model_0000005.pth"),
    "pointer": lambda: _before(Checkpointer, "thin", lambda self, keep, iteration: iteration == 5),
    "evaluation": lambda: _before(PanopticEvaluator, "process", _calls(3)),
    "best": lambda: _after_replacing("model_best.pth"),
    "last_evaluation": lambda: _before(PanopticEvaluator, "process", _calls(4 * 2 + 3)),
}


def start(folder: Path, resume: bool, workers: int, kill: Callable[[], None] | None = None) -> int:
    """Forks a training; returns its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder.parent / f"{folder.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill is not None:
            kill()
        options = [*OPTIONS, "OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS", str(workers)]
        flags = ["--config-file", "quick/panoptic_fpn_synthetic.yaml", *(["--resume"] if resume else [])]
        train_net.main(argument_parser().parse_args([*flags, *options]))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(process: int) -> int:
    """0, the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def equal(first: Any, second: Any) -> bool:
    """Whether nested containers hold the same, tensors bit by bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def differences(folder: Path, reference: Path) -> list[str]:
    """What the files of two runs differ in."""
    found = []
    names = [
        sorted(path.name for path in run.iterdir() if path.suffix in (".pth", ".partial"))
        for run in (folder, reference)
    ]
    if names[0] != names[1]:
        found.append(f"files {names[0]} and {names[1]}")
    for name in ("last_checkpoint", "evaluations.json"):
        if (folder / name).read_text() != (reference / name).read_text():
            found.append(name)
    for name in sorted(set(names[0]) & set(names[1])):
        ours, theirs = load_file(str(folder / name)), load_file(str(reference / name))
        found += [f"{name}:{key}" for key in ours.keys() | theirs.keys() if not equal(ours.get(key), theirs.get(key))]
    return found


def report(name: str, status: int, folder: Path, reference: Path) -> bool:
    """Prints a line about a resumed run; returns whether it ended as it should."""
    wrong = [f"exit code {status}"] if status else differences(folder, reference)
    print(f"{name}: {', '.join(wrong) if wrong else 'equal'}", flush=True)
    return not wrong


def main(root: Path, kills: list[str]) -> bool:
    register_panoptic_records(NAME, CATEGORIES, lambda: load_records("panoptic_hard_val")[:4])
    DatasetCatalog.get(NAME)  # drawn once, here
    reference = root / "reference"
    began = time.monotonic()
    status = wait(start(reference, False, 0))
    duration = time.monotonic() - began
    if status:
        print((root / "reference.txt").read_text())
        return False
    print(f"reference: {duration:.1f} s", flush=True)
    good = True
    for number, kill in enumerate(kills):
        if not kill.startswith("random:"):
            folder = root / kill
            status = wait(start(folder, True, number % 2, KILLS[kill]))
            if status != -signal.SIGKILL:
                print(f"{kill}: not killed, exit code {status}")
                good = False
            good &= report(kill, wait(start(folder, True, 0)), folder, reference)
            continue
        moments = random.Random(0)
        for trial in range(int(kill.removeprefix("random:"))):
            folder = root / f"random_{trial}"
            process = start(folder, False, trial % 3)
            delay = moments.uniform(0, duration)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            wait(process)
            reached = sorted(path.name for path in folder.glob("model_*"))
            name = f"killed after {delay:.2f} s of {duration:.2f} with {', '.join(reached) or 'nothing'}"
            good &= report(name, wait(start(folder, True, (trial + 1) % 3)), folder, reference)
    return good


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(not main(Path(sys.argv[1]), sys.argv[2:]))
