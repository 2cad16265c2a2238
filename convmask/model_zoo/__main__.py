"""Lists all configs with their method, task, data, published results and our own.

    python -m convmask.model_zoo
    python -m convmask.model_zoo --method KNet --task panoptic
    python -m convmask.model_zoo --page docs/model_zoo.md

The results are kept in results.json beside the configs; ``--page`` makes the tables of a page anew from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from convmask.engine import ConfigError, one_line_errors
from convmask.model_zoo.listing import list_models, table
from convmask.model_zoo.page import updated
from convmask.utils.files import write_atomically


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convmask.model_zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", help="only those of a method, as the list names it")
    parser.add_argument("--task", choices=("panoptic", "instance", "semantic"), help="only those of a task")
    parser.add_argument("--page", metavar="FILE", type=Path, help="make the tables of this Markdown page anew")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list, or writes the page; returns the exit code."""
    options = parse_arguments(arguments)
    with one_line_errors(options.debug):
        if options.page:
            write_atomically(options.page, updated(options.page.read_text(encoding="utf-8")).encode())
            return 0
        methods = sorted({model.method for model in list_models()})
        if options.method not in (None, *methods):
            raise ConfigError(f"--method {options.method}: there are {', '.join(methods)}")
        print(table(list_models(options.method, options.task)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
