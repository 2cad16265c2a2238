#!/usr/bin/env python
"""Measures how fast training images are made, and how long a training waits for them.

    python tools/benchmark_data.py --config-file configs/quick/panoptic_fpn_synthetic.yaml
    python tools/benchmark_data.py --config-file ... --workers 0 2 4 --steps 40
    python tools/benchmark_data.py --config-file ... --steps 20 --profile

For each number of workers: images a second where nothing else is done with them. With ``--steps`` the model is trained
for so many iterations too, with nothing written: the median time of a step, and the share of it that is spent waiting
for a batch. The first quarter of everything is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.table import Table

from convmask.data.loader import build_train_loader
from convmask.data.user_modules import import_user_module
from convmask.engine import ConfigError, Trainer, load_config, one_line_errors, prepare
from convmask.engine.model_options import prepare_model, training_precision
from convmask.engine.step import TrainStep


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="whose INPUT, DATALOADER and DATASETS.TRAIN are used")
    add("--import", dest="module", metavar="MODULE", help="Python module or file that registers the dataset")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers of workers (default: 0 1 2)")
    add("--batches", type=int, default=20, metavar="N", help="batches to time (default: %(default)s)")
    add("--steps", type=int, default=0, metavar="N", help="also train so many iterations (default: none)")
    add("--profile", action="store_true", help="with --steps: where the time of the steps goes, by PyTorch's profiler")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config, at the end")
    return parser.parse_args(arguments)


def images_per_second(cfg: CfgNode, batches: int) -> float:
    """Images a second that the loader of a config makes by itself."""
    loader = iter(build_train_loader(cfg))
    skipped = max(batches // 4, 1)
    count = 0
    for number in range(skipped + batches):
        if number == skipped:
            began = time.perf_counter()
        count += len(next(loader)) * (number >= skipped)
    return count / (time.perf_counter() - began)


@contextmanager
def _profiled(wanted: bool) -> Iterator[None]:
    with torch.profiler.profile() if wanted else nullcontext() as profiler:
        yield
    if profiler is not None:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def step_times(cfg: CfgNode, steps: int, profile: bool = False) -> tuple[float, float]:
    """The median seconds of a training step, and the share of all steps' time that was spent waiting for a batch."""
    seed_all_rng(max(cfg.SEED, 0))
    model = Trainer.build_model(cfg)
    prepare_model(cfg, model)
    step = TrainStep(
        model,
        build_train_loader(cfg),
        Trainer.build_optimizer(cfg, model),
        precision=training_precision(cfg),
        passes=cfg.SOLVER.ACCUMULATION_STEPS,
    )
    skipped = max(steps // 4, 1)
    seconds, waited = [], []
    with EventStorage() as storage:
        for step.iter in range(skipped):
            step.run_step()
        with _profiled(profile):
            for step.iter in range(skipped, skipped + steps):
                began = time.perf_counter()
                step.run_step()
                seconds.append(time.perf_counter() - began)
                waited.append(storage.latest()["data_time"][0])
    return statistics.median(seconds), sum(waited) / sum(seconds)


def measure(cfg: CfgNode, args: argparse.Namespace) -> Table:
    """The table that is printed."""
    threads = f"{torch.get_num_threads()} threads" if cfg.MODEL.DEVICE == "cpu" else cfg.MODEL.DEVICE
    table = Table(title=f"{', '.join(cfg.DATASETS.TRAIN)}, {cfg.SOLVER.IMS_PER_BATCH} images a batch, {threads}")
    for name in ("workers", "images/s", *(["step [ms]", "waiting"] if args.steps else [])):
        table.add_column(name, justify="right")
    for workers in args.workers:
        cfg.DATALOADER.NUM_WORKERS = workers
        row = [str(workers), f"{images_per_second(cfg, args.batches):.1f}"]
        if args.steps:
            median, share = step_times(cfg, args.steps, args.profile)
            row += [f"{1000 * median:.0f}", f"{100 * share:.1f} %"]
        table.add_row(*row)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, and prints."""
    args = parse_arguments(arguments)
    with one_line_errors(args.debug):
        if args.module:
            import_user_module(args.module)
        if min(*args.workers, 0) < 0 or args.batches < 1 or args.steps < 0:
            raise ConfigError("--workers and --steps must not be negative, --batches is at least 1")
        cfg = load_config(args.config_file, args.opts)
        prepare(cfg)
        Console().print(measure(cfg, args))


if __name__ == "__main__":
    main()
