"""Mistakes of the user end with one line, mistakes of the program with a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.multiprocessing import ProcessExitedException

from convmask.checkpoint import CheckpointError
from convmask.data.errors import DatasetError
from convmask.engine.progress import stdout_handlers


class ConfigError(ValueError):
    """A config, or a command line, that cannot be carried out as it stands."""


def user_errors() -> tuple[type[Exception], ...]:
    """The errors that a user can mend: wrong configs, data sets, checkpoints and files, and a diverged training."""
    return ConfigError, DatasetError, CheckpointError, FloatingPointError, OSError


@contextmanager
def errors_of_config(what: str) -> Iterator[None]:
    """Turns an error while something is built from a config into a :class:`ConfigError`.

    Detectron2's registries, and most of its parts, raise KeyError or AssertionError for a wrong value.

    Args:
        what: is built, for the message.

    Raises:
        ConfigError: says what cannot be built, and why.
    """
    try:
        yield
    except user_errors():
        raise
    except ValueError as error:
        raise ConfigError(f"{what} cannot be built from this config: {error}") from error
    except (KeyError, AssertionError) as error:
        # Often only a name, without a word about it.
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ConfigError(f"{what} cannot be built from this config: {reason} (--debug shows where)") from error


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and len(lines) > 1:
        # An error of a loader's worker process arrives with the traceback of that process before it.
        return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return "\n".join(lines)


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Turns the errors that a user can mend into one line on standard error and exit code 1.

    These are the :func:`user_errors` and the end of a process by a signal. Everything else passes through. Ctrl-C ends
    with exit code 130.

    Args:
        debug: let these errors pass too, so that their traceback is shown.

    Raises:
        SystemExit: with the exit code.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (*user_errors(), ProcessExitedException) as error:
        if isinstance(error, ProcessExitedException) and error.exit_code > 0:  # it has said what was wrong
            raise SystemExit(error.exit_code) from None
        if debug:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], user_errors()))


@contextmanager
def without_logged_tracebacks() -> Iterator[None]:
    """Keeps the tracebacks of :func:`user_errors` that Detectron2's loop logs to the log file, off standard output."""
    handlers = stdout_handlers()
    for handler in handlers:
        handler.addFilter(_is_no_user_error)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_no_user_error)
