"""The bar on a terminal."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from rich.console import Console

from convmask.engine.progress import ProgressBar, describe, on_terminal


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_terminal(_Terminal())
    assert not on_terminal(io.StringIO())
    closed = io.StringIO()
    closed.close()
    assert not on_terminal(closed)
    monkeypatch.setattr(sys, "stdout", None)
    assert not on_terminal()


def test_the_bar_shows_numbers_and_lets_log_lines_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, file = _Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    logger = logging.getLogger("convmask.test_progress.utils.events")
    other = logging.getLogger("convmask.test_progress.other")
    handlers = [logging.StreamHandler(sys.stdout), logging.StreamHandler(file)]
    for target in (logger, other):
        target.propagate = False
        target.setLevel(logging.INFO)
        target.handlers = list(handlers)

    bar = ProgressBar(Console(file=screen, force_terminal=True, width=160))
    with EventStorage() as storage:
        bar.trainer = SimpleNamespace(storage=storage, start_iter=0, max_iter=2, iter=0)
        bar.before_train()
        for iteration in range(2):
            bar.trainer.iter = iteration
            storage.put_scalars(total_loss=1.5, lr=0.02, data_time=0.01, time=0.1)
            logger.info("metric line %d", iteration)
            other.info("plain line %d", iteration)
            bar.after_step()
            storage.step()
        bar.after_train()

    shown = screen.getvalue()
    for part in ("2/2", "loss 1.500", "lr 0.02", "data 10%", "ETA", "plain line 1"):
        assert part in shown, part
    assert "metric line" not in shown
    assert "metric line 1" in file.getvalue()
    assert sys.stdout is screen
    assert handlers[0].stream is screen
    logger.info("afterwards")
    assert "afterwards" in screen.getvalue()


def test_ending_a_bar_that_never_began_does_nothing() -> None:
    ProgressBar().after_train()


def test_numbers_that_are_not_there_yet_are_dashes() -> None:
    with EventStorage() as storage:
        assert describe(storage) == ("-", "-", "-")
