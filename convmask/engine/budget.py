"""Schedules that fill a given time: how many iterations of a config a machine does in it, found by a short trial."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from convmask.engine.errors import ConfigError
from convmask.engine.trainer import Trainer

# "wall": what passes on a clock. "cpu": what this process has the processor for, on all of its threads, which other
# work on the machine changes little; processes that load data are not in it.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

_UNITS = {"s": 1, "m": 60, "h": 3600}
# The first steps allocate memory, choose algorithms and start processes that load data.
_WARM_UP = 3


def parse_duration(text: str) -> float:
    """Seconds from ``"90s"``, ``"25m"``, ``"1.5h"``; a number alone is seconds.

    Raises:
        ConfigError: something else, or nothing above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh]?)\s*", text)
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"duration {text!r}: give it as 90s, 25m or 1.5h, more than 0")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that :func:`parse_duration` reads: ``"25m"``, ``"90s"``, ``"2h"``."""
    unit = next(unit for unit in "hms" if seconds % _UNITS[unit] == 0 or unit == "s")
    return f"{seconds / _UNITS[unit]:g}{unit}"


class _Trial(Trainer):
    """A trainer that writes nothing."""

    def build_hooks(self) -> list[HookBase | None]:
        return [hooks.LRScheduler()]


def seconds_per_iteration(cfg: CfgNode, seconds: float, clock: str = "wall") -> float:
    """Trains with random data of the config for about ``seconds``, throws the model away, and returns the mean.

    The first iterations are not counted; at least three are, however long they take.

    Args:
        cfg: complete, see :func:`convmask.engine.setup`.
        seconds: by ``clock``.
        clock: of :data:`CLOCKS`.
    """
    now = CLOCKS[clock]
    with _silence():
        seed_all_rng(cfg.SEED if cfg.SEED >= 0 else 0)
        trainer = _Trial(cfg)
    began, counted = 0.0, 0
    with EventStorage() as storage:
        trainer.storage = storage
        trainer.before_train()
        for iteration in range(trainer.max_iter):
            if iteration == _WARM_UP:
                began = now()
            trainer.iter = iteration
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            storage.step()
            counted = max(iteration + 1 - _WARM_UP, 0)
            if counted >= 3 and now() - began >= seconds:
                break
    if not counted:
        raise ConfigError(f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is too short to measure an iteration")
    return (now() - began) / counted


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the description of the model and the data, which the training logs too, out of the log."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def iterations_within(cfg: CfgNode, seconds: float, clock: str = "wall", trial: float = 0.03) -> int:
    """How many iterations of a config this machine does in ``seconds``, at least one.

    Args:
        cfg: complete, see :func:`convmask.engine.setup`.
        seconds: by ``clock``.
        clock: of :data:`CLOCKS`.
        trial: the share of ``seconds`` that is spent to find out, on top of them.
    """
    return max(int(seconds / seconds_per_iteration(cfg, trial * seconds, clock)), 1)


def with_iterations(cfg: CfgNode, iterations: int) -> CfgNode:
    """A copy of a config whose whole schedule is stretched, or shortened, to a number of iterations.

    Steps and periods of checkpoints and evaluations keep their place in the schedule; the warm-up grows with it but
    never takes more than a tenth.
    """
    result = cfg.clone()
    result.defrost()
    solver, factor = result.SOLVER, iterations / cfg.SOLVER.MAX_ITER
    solver.MAX_ITER = iterations
    # In a short schedule several may fall together, or to its beginning.
    steps = sorted({round(step * factor) for step in cfg.SOLVER.STEPS})
    solver.STEPS = tuple(step for step in steps if 0 < step < iterations)
    solver.WARMUP_ITERS = min(round(solver.WARMUP_ITERS * max(factor, 1.0)), iterations // 10)
    solver.CHECKPOINT_PERIOD = max(round(solver.CHECKPOINT_PERIOD * factor), 1)
    result.TEST.EVAL_PERIOD = round(result.TEST.EVAL_PERIOD * factor)
    result.freeze()
    return result
