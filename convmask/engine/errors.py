"""Mistakes of the user end with one line, mistakes of the program with a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException


class ConfigError(ValueError):
    """A config, or a command line, that cannot be carried out as it stands."""


def _user_errors() -> tuple[type[Exception], ...]:
    from convmask.checkpoint import CheckpointError
    from convmask.data.errors import DatasetError

    return ConfigError, DatasetError, CheckpointError, FloatingPointError, OSError


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and len(lines) > 1:
        # An error of a loader's worker process arrives with the traceback of that process before it.
        return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return "\n".join(lines)


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Turns the errors that a user can mend into one line on standard error and exit code 1.

    These are wrong configs, data sets and checkpoints, missing or unreadable files, and a diverged training. Everything
    else passes through. Ctrl-C ends with exit code 130.

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
    except ProcessExitedException as error:  # the process has said what was wrong
        raise SystemExit(error.exit_code if error.exit_code > 0 else 1) from None
    except _user_errors() as error:
        if debug:
            raise
        # A diverged training raises the same error in all processes.
        if comm.is_main_process() or not isinstance(error, FloatingPointError):
            print(f"error: {_message(error)}", file=sys.stderr)
        raise SystemExit(1) from None
