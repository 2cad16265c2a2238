#!/usr/bin/env python
"""Finds what is wrong with a dataset: annotations that contradict themselves, and files that are missing or broken.

    python tools/validate_dataset.py nuclei_train
    python tools/validate_dataset.py --image-root images --panoptic-json panoptic.json --panoptic-root panoptic
    python tools/validate_dataset.py --image-root images --instances-json instances.json

Exit code: 0 if nothing is wrong, 1 if something is, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import convmask.data  # noqa: F401 (registers the built-in datasets)
from convmask.data.errors import DatasetError
from convmask.data.problems import Problem
from convmask.data.user_modules import import_user_module
from convmask.data.validation import validate, validate_instances, validate_panoptic
from convmask.data.validation_files import Files


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks that it names one dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="a registered dataset")
    parser.add_argument(
        "--import", dest="module", metavar="MODULE", help="Python module or file that registers the dataset"
    )
    parser.add_argument("--image-root", help="folder of the pictures")
    parser.add_argument("--panoptic-json", help="COCO panoptic json")
    parser.add_argument("--panoptic-root", help="folder of the panoptic PNG files")
    parser.add_argument("--instances-json", help="COCO json with instances")
    parser.add_argument("--quick", action="store_true", help="do not decode pictures and PNG files")
    parser.add_argument("--max-problems", type=int, metavar="N", help="stop after N problems")
    args = parser.parse_args(arguments)
    panoptic = args.panoptic_json is not None or args.panoptic_root is not None
    if (args.name is not None) + panoptic + (args.instances_json is not None) != 1:
        parser.error("name one dataset: a registered name, --panoptic-json with --panoptic-root, or --instances-json")
    if args.name is None and args.image_root is None:
        parser.error("--image-root is missing")
    if panoptic and (args.panoptic_json is None or args.panoptic_root is None):
        parser.error("--panoptic-json and --panoptic-root belong together")
    if args.max_problems is not None and args.max_problems < 1:
        parser.error(f"--max-problems is {args.max_problems}, not at least 1")
    return args


def find_problems(args: argparse.Namespace, console: Console) -> list[Problem]:
    """Validates the dataset of the command line, with a progress bar where there is a terminal."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def progress(files: Iterable[Files]) -> Iterable[Files]:
            return bar.track(list(files), description="Decoding images")

        if args.panoptic_json is not None:
            return validate_panoptic(
                args.image_root,
                args.panoptic_json,
                args.panoptic_root,
                quick=args.quick,
                max_problems=args.max_problems,
                progress=progress,
            )
        if args.instances_json is not None:
            return validate_instances(
                args.image_root,
                args.instances_json,
                quick=args.quick,
                max_problems=args.max_problems,
                progress=progress,
            )
        return validate(args.name, quick=args.quick, max_problems=args.max_problems, progress=progress)


def as_table(problems: Iterable[Problem]) -> Table:
    """The problems, one a row."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("file", "image", "field", "problem"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        note = "" if problem.fatal else " (training goes on without)"
        # Text is not searched for rich's markup, which file names may look like.
        cells = (problem.file, problem.image, problem.field, problem.message + note)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = parse_arguments(arguments)
    try:
        if args.module is not None:
            import_user_module(args.module)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems = find_problems(args, Console(stderr=True))
    # In a file or a pipe nothing is cut or wrapped at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    if not problems:
        console.print("No problems found.")
        return 0
    console.print(as_table(problems))
    limited = " (stopped there)" if len(problems) == args.max_problems else ""
    console.print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}{limited}", highlight=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
