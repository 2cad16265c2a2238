"""Two processes on the CPU: ``python two_processes.py FOLDER SCENARIO ...``; scenarios are the functions below.

The processes are forked from this one, with the environment that ``torchrun`` would give them: starting Python and
importing PyTorch takes longer than what they do. Each scenario writes what it finds into FOLDER; its first exit code
that is not 0 is printed, 3 for one that hangs.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from convmask.data.panoptic import register_panoptic_records
from convmask.data.synthetic import CATEGORIES, load_records
from convmask.engine import Trainer, launch, load_config, one_line_errors, prepare
from convmask.engine.model_options import distribute
from convmask.engine.optimizer import build_optimizer
from convmask.engine.step import TrainStep
from convmask.utils.processes import mean_over_processes

# Seconds after which a scenario of some seconds is said to hang: a loaded machine has taken 20 times as long.
HANGS = 600

NAME = "images_of_two_processes"
SMALL = [
    *("DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0", "SEED", "3"),
    *("INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48", "SOLVER.IMS_PER_BATCH", "4"),
    *("MODEL.NARROW_RESNET.WIDTH", "8", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
]
METHODS = {
    "panoptic_fpn": ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"],
    "panoptic_fcn": ["MODEL.PANOPTIC_FCN.POSITION_HEAD.CONVS_DIM", "32"],
    "fcis": [],
    "embed_mask": [],
    "knet_instance": [],
    "knet_panoptic": [],
    # group normalisation needs two channels a group where the pyramid pools to one cell
    "knet_semantic": ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "64"],
}


def config(name: str, *options: str) -> CfgNode:
    cfg = load_config(f"quick/{name}_synthetic.yaml", [*SMALL, *METHODS[name], *options])
    prepare(cfg)
    return cfg


def semantic_training(folder: Path, passes: int, name: str) -> None:
    """Three iterations of Semantic FPN, which samples nothing; losses and weights go to a file."""
    options = ["MODEL.PANOPTIC_FPN.TASK", "semantic", "INPUT.TARGETS", "('sem_seg',)", "SOLVER.MAX_ITER", "3"]
    options += ["SOLVER.ACCUMULATION_STEPS", str(passes), "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.01"]
    options += ["SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", str(folder / name), "MODEL.MASK_ON", "False"]
    seed_all_rng(3)
    trainer = Trainer(config("panoptic_fpn", *options))
    before = {name: value.detach().clone() for name, value in trainer.checkpointer.model.named_parameters()}
    trainer.train()
    if comm.is_main_process():
        history = {key: value.values() for key, value in trainer.storage.histories().items() if "loss" in key}
        weights = {name: value.detach() for name, value in trainer.checkpointer.model.named_parameters()}
        torch.save({"losses": history, "weights": weights, "before": before}, folder / f"{name}.pth")


def equivalence(folder: Path) -> None:
    """As one process does with two passes."""
    semantic_training(folder, 1, "two_processes")


def image(empty: bool, generator: torch.Generator) -> dict[str, Any]:
    """A dataset dict, 64 x 64, of one instance or none."""
    instances = Instances((64, 64))
    masks = torch.zeros(0 if empty else 1, 64, 64, dtype=torch.bool)
    masks[:, 10:40, 20:50] = True
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 10.0, 50.0, 40.0]])[: len(masks)])
    instances.gt_classes = torch.zeros(len(masks), dtype=torch.int64)
    semantic = torch.full((64, 64), 255) if empty else torch.where(masks[0], 0, 1)
    pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "sem_seg": semantic, "file_name": f"empty_{empty}.png"}


def empty_images(folder: Path) -> None:
    """Three steps of each method, in which the second process has images of nothing only; no step may hang."""
    assert mean_over_processes(torch.tensor(float(comm.get_rank()))) == 0.5
    for name in METHODS:
        seed_all_rng(3)
        cfg = config(name)
        model = Trainer.build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        generator = torch.Generator().manual_seed(comm.get_rank())
        batches = [[image(comm.get_rank() == 1, generator) for _ in range(2)] for _ in range(3)]
        step = TrainStep(distribute(model), batches, optimizer, every_parameter=True)
        with EventStorage():
            for step.iter in range(3):
                step.run_step()
        weights = torch.cat([value.detach().flatten() for value in model.parameters()])
        others = comm.all_gather(weights)
        assert all(torch.equal(weights, other) for other in others), f"{name}: the processes' weights differ"
    (folder / f"empty_{comm.get_rank()}").touch()


class _HalfUsed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        loss = self.used(torch.ones(2)).sum()
        return {"loss": loss if comm.get_rank() else loss + self.unused(torch.ones(2)).sum()}


def unused_parameter(folder: Path) -> None:
    """The second process leaves a parameter out: it has to say so instead of letting the first one wait."""
    model = _HalfUsed()
    batches = [[{"file_name": "a.png"}]] * 2
    step = TrainStep(distribute(model), batches, torch.optim.SGD(model.parameters(), 0.1), every_parameter=True)
    with EventStorage():
        step.run_step()
        step.run_step()


def a_process_dies(folder: Path) -> None:
    """The second process fails in an iteration of both."""
    if comm.get_rank() == 1:
        raise TypeError("a bug in the second process")
    comm.synchronize()


def resumed(folder: Path) -> None:
    """A training of both, whole and in two halves, has to end with the same checkpoint."""
    for part, iterations, resume in (("whole", 4, False), ("halves", 2, False), ("halves", 4, True)):
        seed_all_rng(3 + comm.get_rank())
        # The schedule of four iterations in each: it stands still.
        options = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
        options += ["SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"]
        trainer = Trainer(config("panoptic_fpn", *options, "OUTPUT_DIR", str(folder / part)))
        trainer.resume_or_load(resume=resume)
        trainer.train()
        comm.synchronize()


SCENARIOS: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (equivalence, empty_images, unused_parameter, a_process_dies, resumed)
}


def _environment(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")


def start(scenario: str, folder: Path, rank: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"{scenario}_{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _environment(rank, port)
        with one_line_errors():
            launch(SCENARIOS[scenario], 2, args=(folder,), timeout=timedelta(seconds=HANGS))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(scenario: str, folder: Path) -> int:
    """The first exit code that is not 0, if any, as ``torchrun`` would have it: a failure ends the other process."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    running = {start(scenario, folder, rank, port) for rank in range(2)}
    deadline, status = time.monotonic() + HANGS, 0
    while running and not status:
        ended, code = os.waitpid(-1, os.WNOHANG)
        if ended:
            running.discard(ended)
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > deadline:
            status = 3
        else:
            time.sleep(0.05)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return status


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    register_panoptic_records(NAME, CATEGORIES, lambda: load_records("panoptic_hard_val")[:6])
    for argument in sys.argv[2:]:
        if argument == "equivalence":
            # Forked too: a process that has computed gradients must not fork.
            child = os.fork()
            if not child:
                semantic_training(root, 2, "one_process")
                os._exit(0)
            os.waitpid(child, 0)
        print(argument, run(argument, root), flush=True)
