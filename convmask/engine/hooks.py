"""Hooks that differ from Detectron2's, for runs that go on after any interruption as if there had been none."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from convmask.checkpoint import Checkpointer
from convmask.engine.errors import ConfigError
from convmask.utils.files import write_atomically
from convmask.utils.random_state import (
    RandomState,
    get_random_state,
    preserved_random_state,
    set_random_state,
)

logger = logging.getLogger(__name__)


class RandomStates(HookBase):
    """The random generators of every process, as an entry of a checkpoint and restored just before the first step."""

    def __init__(self) -> None:
        """Takes nothing."""
        self._gathered: list[RandomState] | None = None
        self._restored: RandomState | None = None

    def gather(self) -> None:
        """Collects the states for the checkpoint that is written next; all processes must call it."""
        self._gathered = comm.gather(get_random_state())

    def state_dict(self) -> dict[str, Any]:
        """``processes``: a state each, by rank, of the last :meth:`gather`; without one, this process's."""
        return {"processes": self._gathered or [get_random_state()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this process's state; it is in force from :meth:`before_train` on."""
        states = state["processes"]
        rank = comm.get_rank()
        if len(states) != comm.get_world_size():
            logger.warning(
                "the checkpoint is of %d processes, there are %d: random numbers are not those of an uninterrupted run",
                len(states),
                comm.get_world_size(),
            )
        self._restored = states[rank] if rank < len(states) else None

    def before_train(self) -> None:
        """Restores. To be the last of the hooks."""
        if self._restored is not None:
            set_random_state(self._restored)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, in every process (the main one writes), with random states, and thinning after each save."""

    def __init__(self, checkpointer: Checkpointer, period: int, random_states: RandomStates, keep: int = 0) -> None:
        """Takes the parts.

        Args:
            checkpointer: its checkpointables hold ``random_states``.
            period: in iterations.
            random_states: gathered before each save.
            keep: how many of the newest periodic checkpoints stay; 0: all.
        """
        super().__init__(checkpointer, period)
        self._random_states = random_states
        self._keep = keep

    def before_train(self) -> None:
        """Clears away what killed processes have left half-written."""
        super().before_train()
        if comm.is_main_process():
            self.checkpointer.remove_partial_files()

    def after_step(self) -> None:
        """Saves after every ``period`` iterations, and after the last as ``model_final``."""
        done = self.trainer.iter + 1
        names = [f"{self.file_prefix}_{self.trainer.iter:07d}"] if done % self.period == 0 else []
        names += [f"{self.file_prefix}_final"] if done >= self.trainer.max_iter else []
        if not names:
            return
        self._random_states.gather()
        for name in names:
            self.checkpointer.save(name, iteration=self.trainer.iter)
        if self._keep > 0 and comm.is_main_process():
            self.checkpointer.thin(self._keep, self.trainer.iter)


class Evaluations:
    """The file ``evaluations.json``: which evaluation was the last to be complete, and the best so far.

    It is replaced after an evaluation and after the checkpoint that it may ask for, so that one which was interrupted
    anywhere is done again.
    """

    FILE = "evaluations.json"

    def __init__(self, folder: str) -> None:
        """Takes the output folder."""
        self._path = os.path.join(folder, self.FILE)
        self.last: int = 0
        self.best: dict[str, Any] = {}

    def read(self, until: int) -> None:
        """Reads what is there.

        Args:
            until: iterations that the run has done. What is of later ones, from before an older checkpoint was resumed,
                or of a run that began anew, is forgotten, in the file too: this run will come to those iterations.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                content = json.load(file)
            last, best = int(content["last"]), dict(content["best"])
            kinds = {"metric": str, "value": float, "iteration": int}
            best = {name: kind(best[name]) for name, kind in kinds.items()} if best else {}
        except FileNotFoundError:
            last, best = 0, {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is unreadable and starts anew: %s", self._path, error)
            last, best = 0, {}
        self.last = last if last <= until else 0
        self.best = best if best.get("iteration", 0) <= until else {}
        if (self.last, self.best) != (last, best):
            self.write()

    def write(self) -> None:
        """Replaces the file."""
        content = json.dumps({"last": self.last, "best": self.best}, indent=1)
        write_atomically(self._path, f"{content}\n".encode())


class EvalHook(hooks.EvalHook):
    """Detectron2's evaluation, periodic and at the end, which also keeps the best model.

    It is not done after a training that failed in its last iteration. One that was interrupted is done first when the
    run is resumed. Random numbers drawn in it change nothing in the training.
    """

    def __init__(
        self,
        period: int,
        function: Callable[[], Any],
        checkpointer: Checkpointer,
        random_states: RandomStates,
        best_metric: str = "",
    ) -> None:
        """Takes the parts.

        Args:
            period: in iterations; 0: at the end only.
            function: returns a nested dict of numbers in the main process.
            checkpointer: writes ``model_best.pth``.
            random_states: part of it.
            best_metric: "panoptic_seg/PQ"; "": no model is kept.
        """
        super().__init__(period, function)
        self._func: Callable[[], Any] = function
        self._checkpointer = checkpointer
        self._random_states = random_states
        self._metric = best_metric
        self._record = Evaluations(checkpointer.save_dir)

    def before_train(self) -> None:
        """Does the evaluation that an interruption has prevented."""
        done = self.trainer.start_iter
        if comm.is_main_process():
            self._record.read(done)
        missed = self._period > 0 and 0 < done < self.trainer.max_iter and done % self._period == 0
        if missed and comm.all_gather(self._record.last != done)[0]:
            logger.info("the evaluation after iteration %d was interrupted: it is done now", done - 1)
            # The iteration that is done, as for an evaluation in its place.
            self.trainer.iter = self.trainer.storage.iter = done - 1
            self._do_eval()
            self.trainer.iter = self.trainer.storage.iter = done

    def after_train(self) -> None:
        """Evaluates if every iteration was done."""
        # The loop counts one further once it is through; Detectron2's own condition also holds in the last iteration.
        if self.trainer.iter >= self.trainer.max_iter:
            self.trainer.iter = self.trainer.max_iter - 1
            super().after_train()
            self.trainer.iter = self.trainer.max_iter

    def _do_eval(self) -> None:
        results: list[Any] = []
        function = self._func

        def evaluate() -> Any:
            results.append(function())
            return results[0]

        with preserved_random_state():
            self._func = evaluate
            try:
                super()._do_eval()
            finally:
                self._func = function
        self._keep_best(results[0])

    def _keep_best(self, results: Any) -> None:
        better = False
        value = math.nan
        if self._metric and comm.is_main_process():
            value = _value_of(self._metric, results)
            best = self._record.best
            known = best.get("value", -math.inf) if best.get("metric") == self._metric else -math.inf
            # NaN, of a set without a class, is better than nothing only.
            better = value > known
        if comm.all_gather(better)[0]:
            self._random_states.gather()
            self._checkpointer.save("model_best", tag=False, iteration=self.trainer.iter)
            logger.info("%s %.4f is the best so far: kept as model_best.pth", self._metric, value)
            self._record.best = {"metric": self._metric, "value": value, "iteration": self.trainer.iter + 1}
        if comm.is_main_process() and self._checkpointer.save_dir and "://" not in self._checkpointer.save_dir:
            self._record.last = self.trainer.iter + 1
            self._record.write()


def _value_of(metric: str, results: Any) -> float:
    flat = flatten_results_dict(results or {})
    if metric not in flat:
        raise ConfigError(f"TEST.BEST_METRIC is {metric!r}; the evaluation gives {', '.join(flat) or 'nothing'}")
    return float(flat[metric])


class PreciseBN(hooks.PreciseBN):
    """Detectron2's, on batches that follow from the iteration, and without an effect on random numbers."""

    def update_stats(self) -> None:
        """Replaces the running statistics of the model."""
        if self._disabled:
            return
        if hasattr(self._data_loader, "start_at"):
            self._data_loader.start_at(self.trainer.iter + 1)
            self._data_iter = None
        with preserved_random_state():
            super().update_stats()


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's, whose errors name the folder, and do not hide the error that has ended a training."""

    def __init__(self, writers: Sequence[Any], folder: str, period: int = 20) -> None:
        """Takes the writers, the folder that they write into, and the period in iterations."""
        super().__init__(writers, period=period)
        self._folder = folder

    def after_step(self) -> None:
        """Writes periodically."""
        try:
            super().after_step()
        except OSError as error:
            raise OSError(f"{self._folder}: metrics cannot be written: {error.strerror or error}") from error

    def after_train(self) -> None:
        """Writes what is left."""
        try:
            super().after_train()
        except OSError as error:
            message = f"{self._folder}: metrics cannot be written: {error.strerror or error}"
            if self.trainer.iter >= self.trainer.max_iter:
                raise OSError(message) from error
            logger.warning(message)
