"""Keeping the best model, doing interrupted evaluations again, thinning checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine.train_loop import TrainerBase
from torch import nn

from convmask.checkpoint import Checkpointer, load_file
from convmask.engine import ConfigError
from convmask.engine.hooks import EvalHook, Evaluations, PeriodicCheckpointer, PeriodicWriter, RandomStates


class Loop(TrainerBase):
    """A training that counts in its only weight."""

    def __init__(self, folder: Path, keep: int = 0, value: Callable[[int], float] = float, metric: str = "a/b") -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        self.evaluated: list[int] = []
        self.states = RandomStates()
        self.checkpointer = Checkpointer(self.model, str(folder), random_states=self.states)

        def evaluate() -> dict[str, Any]:
            torch.rand(3)
            self.evaluated.append(self.iter + 1)
            return {"a": {"b": value(self.iter + 1)}}

        self.register_hooks(
            [
                PeriodicCheckpointer(self.checkpointer, 2, self.states, keep),
                EvalHook(3, evaluate, self.checkpointer, self.states, metric),
                self.states,
            ]
        )

    def run_step(self) -> None:
        nn.init.constant_(self.model.weight, self.iter)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.pth*")}


def test_the_best_model_is_kept_and_is_not_the_one_to_resume_from(tmp_path: Path) -> None:
    loop = Loop(tmp_path, value=lambda done: -abs(done - 6))
    loop.train(0, 10)
    assert loop.evaluated == [3, 6, 9, 10]
    best = load_file(str(tmp_path / "model_best.pth"))
    assert best["model"]["weight"].item() == 5 and best["iteration"] == 5
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    record = json.loads((tmp_path / "evaluations.json").read_text())
    assert record == {"last": 10, "best": {"metric": "a/b", "value": 0, "iteration": 6}}


def test_evaluations_draw_no_random_numbers_of_the_training(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    loop.train(0, 4)
    assert loop.evaluated
    assert torch.equal(torch.rand(1), expected)


def test_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    Loop(tmp_path, value=lambda done: math.nan).train(0, 4)
    assert "model_best.pth" not in files(tmp_path)


def test_a_metric_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.BEST_METRIC is 'x'; the evaluation gives a/b"):
        Loop(tmp_path, metric="x").train(0, 4)


@pytest.mark.parametrize(("last", "done_again"), [(3, []), (0, [3])])
def test_an_interrupted_evaluation_is_done_first(tmp_path: Path, last: int, done_again: list[int]) -> None:
    record = Evaluations(str(tmp_path))
    record.last = last
    record.write()
    loop = Loop(tmp_path)
    loop.train(3, 5)
    assert loop.evaluated == [*done_again, 5]


def test_what_is_of_later_iterations_or_unreadable_is_forgotten(tmp_path: Path) -> None:
    record = Evaluations(str(tmp_path))
    record.last, record.best = 9, {"metric": "a/b", "value": 7.0, "iteration": 6}
    record.write()
    record.read(8)
    assert record.last == 0 and record.best["value"] == 7.0
    record.read(5)
    assert record.best == {}
    # In the file too: the run that has begun anew is killed in its own evaluation of that iteration, and resumed.
    record.read(9)
    assert (record.last, record.best) == (0, {})
    (tmp_path / "evaluations.json").write_text('{"last": "x"')
    record.read(9)
    assert (record.last, record.best) == (0, {})


def test_checkpoints_are_thinned(tmp_path: Path) -> None:
    other = ["model_0000100.pth", "model_12.pth", "other_0000001.pth"]
    for name in other:
        (tmp_path / name).touch()
    (tmp_path / "model_0000001.pth.partial").touch()
    Loop(tmp_path, keep=2).train(0, 9)
    kept = {"model_0000005.pth", "model_0000007.pth", "model_final.pth", "model_best.pth"}
    assert files(tmp_path) == {*kept, *other}


def test_metrics_that_cannot_be_written_name_the_folder(tmp_path: Path) -> None:
    hook = PeriodicWriter([], str(tmp_path), period=1)

    class Full:
        def write(self) -> None:
            raise OSError(28, "No space left on device")

        close = write

    hook._writers = [Full()]
    loop = Loop(tmp_path)
    loop.register_hooks([hook])
    with pytest.raises(OSError, match=f"{tmp_path}: metrics cannot be written: No space left on device"):
        loop.train(0, 3)
