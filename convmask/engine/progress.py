"""Progress of a training: a live bar on a terminal, Detectron2's log lines in a file or a pipe."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def on_terminal(stream: TextIO | None = None) -> bool:
    """Whether ``stream`` (standard output by default) is a terminal, where a bar can be redrawn."""
    stream = sys.stdout if stream is None else stream
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def stdout_handlers() -> list[logging.StreamHandler[TextIO]]:
    """The log handlers, of any logger, that write to standard output."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return [
        handler
        for logger in (logging.root, *loggers)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout
    ]


def _not_a_metric_line(record: logging.LogRecord) -> bool:
    # The end only: a formatter of Detectron2 shortens the name's beginning in place.
    return not record.name.endswith("utils.events")


class ProgressBar(HookBase):
    """A line at the foot of the terminal: iteration, loss, learning rate, share of time spent waiting for data, ETA.

    Log lines go on above it. Detectron2's metric lines, which say the same, are kept from the terminal while the bar
    is there and still reach the log file.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Makes a bar on ``console``, by default one on standard output."""
        self._console = console
        self._progress: Progress | None = None
        self._handlers: list[logging.StreamHandler[TextIO]] = []

    def before_train(self) -> None:
        """Draws the bar and leads log lines past it."""
        # Handlers hold the stream that they were made with: they are handed rich's stand-in while the bar is live.
        self._handlers = stdout_handlers()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  data {task.fields[wait]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console or Console(),
            expand=True,
            speed_estimate_period=60,
        )
        self._progress.start()
        for handler in self._handlers:
            handler.setStream(sys.stdout)
            handler.addFilter(_not_a_metric_line)
        self._task = self._progress.add_task(
            "", total=self.trainer.max_iter, completed=self.trainer.start_iter, loss="-", lr="-", wait="-"
        )

    def after_step(self) -> None:
        """Advances the bar."""
        if self._progress is not None:
            loss, lr, wait = describe(self.trainer.storage)
            self._progress.update(self._task, completed=self.trainer.iter + 1, loss=loss, lr=lr, wait=wait)

    def after_train(self) -> None:
        """Leaves the finished bar and gives standard output back; also after an error."""
        if self._progress is None:
            return
        self._progress.stop()
        for handler in self._handlers:
            handler.setStream(sys.stdout)
            handler.removeFilter(_not_a_metric_line)
        self._progress = None


def describe(storage: EventStorage) -> tuple[str, str, str]:
    """The latest total loss (median of 20), learning rate and share of the step spent waiting for data, as text."""
    histories = storage.histories()
    loss = f"{histories['total_loss'].median(20):.3f}" if "total_loss" in histories else "-"
    lr = f"{histories['lr'].latest():.2g}" if "lr" in histories else "-"
    wait = "-"
    if "data_time" in histories and "time" in histories and histories["time"].avg(20) > 0:
        wait = f"{100 * min(1.0, histories['data_time'].avg(20) / histories['time'].avg(20)):.0f}%"
    return loss, lr, wait
