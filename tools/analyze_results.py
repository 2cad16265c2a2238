#!/usr/bin/env python
"""Says what saved predictions are worth, and what has changed between two runs.

    python tools/analyze_results.py output/run --dataset nuclei_val --output output/run/analysis
    python tools/analyze_results.py output/mine --config-file output/mine/config.yaml --output output/mine/analysis
    python tools/analyze_results.py output/after --baseline output/before --dataset nuclei_val --output output/change

Reads what an evaluation writes into OUTPUT_DIR/inference: coco_instances_results.json, and panoptic_predictions.json
with its maps (TEST.DUMP_PANOPTIC True). Prints AP and PQ by class and by the size of objects, and what is taken for
what. Writes index.html with pictures of the worst images, or of those that have changed most, and results.json.

Exit code: 0, 1 after an error that standard error names in one line (--debug shows where).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable
from rich.text import Text

import convmask.data  # noqa: F401 (registers the built-in datasets)
from convmask.analysis import AnalysedDataset, RunAnalysis, SavedResults, analyse, compare
from convmask.analysis.page import Table, analysis_tables, comparison_tables, image_counts, write_report
from convmask.data.config_datasets import register_datasets_of
from convmask.data.user_modules import import_user_module
from convmask.engine import ConfigError, load_config, one_line_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="DIR", help="OUTPUT_DIR of a run, or the folder of its predictions")
    parser.add_argument("--dataset", metavar="NAME", help="registered dataset that was predicted on")
    parser.add_argument(
        "--config-file", metavar="FILE", help="of the run: registers its datasets; the first of DATASETS.TEST is taken"
    )
    parser.add_argument("--import", dest="module", metavar="MODULE", help="Python module or file that registers it")
    parser.add_argument("--baseline", metavar="DIR", help="another run on it: what got better and worse since then")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for page, pictures and results.json")
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="S",
        help="of detections that are looked at one by one (default: the one of the best F1, for each run its own)",
    )
    parser.add_argument("--quantiles", type=int, default=4, metavar="N", help="parts by size (default: %(default)s)")
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="of an image, for AP (default: TEST.AP_MAX_DETECTIONS of --config-file, else 100)",
    )
    parser.add_argument("--pictures", type=int, default=12, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    options = parser.parse_args(arguments)
    if options.dataset is None and options.config_file is None:
        parser.error("name the dataset that was predicted on: --dataset, or --config-file of the run")
    if options.max_detections is not None and options.max_detections < 1:
        parser.error(f"--max-detections {options.max_detections} is less than 1")
    for name, least in (("quantiles", 1), ("pictures", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, not at least {least}")
    return options


def dataset_name(options: argparse.Namespace) -> str:
    """Registers the datasets of the config, if one is given; returns the name of the one that was predicted on.

    Raises:
        ConfigError: the config cannot be read, or has no dataset to test on.
        DatasetError: a dataset of the config cannot be registered.
    """
    if not options.config_file:
        return str(options.dataset)
    cfg = load_config(options.config_file)
    options.max_detections = options.max_detections or cfg.TEST.AP_MAX_DETECTIONS
    register_datasets_of(cfg)
    if not (options.dataset or cfg.DATASETS.TEST):
        raise ConfigError(f"{options.config_file}: DATASETS.TEST is empty; name a --dataset")
    return str(options.dataset or cfg.DATASETS.TEST[0])


def run_names(folders: Sequence[str]) -> list[str]:
    """The names of the folders, or "before" and "after" where they are the same."""
    paths = [os.path.abspath(folder) for folder in folders]
    names = [os.path.basename(os.path.dirname(p) if os.path.basename(p) == "inference" else p) for p in paths]
    return names if len(set(names)) == len(names) else ["before", "after"]


def rich_table(table: Table) -> RichTable:
    """For the terminal."""
    result = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        result.add_column(Text(str(column)), justify="right" if index else "left")
    for row in table.rows:
        # Text is not searched for rich's markup, which class names may look like.
        result.add_row(*(Text(cell) for cell in table.cells(row)))
    return result


def analyse_runs(options: argparse.Namespace, console: Console) -> str:
    """Does what the command line asks for; returns the path of the page."""
    folders = [folder for folder in (options.baseline, options.run) if folder is not None]
    dataset = AnalysedDataset(dataset_name(options))
    results = [SavedResults.read(folder, dataset) for folder in folders]
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:

        def progress(items: Iterable[Any], description: str) -> Iterable[Any]:
            return bar.track(list(items), description=description)

        runs: list[RunAnalysis] = [
            analyse(
                result,
                score_threshold=options.score_threshold,
                quantiles=options.quantiles,
                max_detections=options.max_detections or 100,
                progress=progress,
            )
            for result in results
        ]
        comparison = compare(*runs) if len(runs) == 2 else None
        page = write_report(
            options.output, runs, run_names(folders), comparison, num_pictures=options.pictures, progress=progress
        )
    if comparison is None:
        tables = [table for analysis in runs[0].kinds.values() for table in analysis_tables(analysis)]
    else:
        tables = [table for change in comparison.values() for table in comparison_tables(change)]
    for table in tables:
        console.print(rich_table(table))
    for change in (comparison or {}).values():
        console.print(f"{change.title}: {image_counts(change)}", highlight=False)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    options = parse_arguments(arguments)
    # In a file or a pipe nothing is cut or wrapped at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    with one_line_errors(options.debug):
        if options.module:
            import_user_module(options.module)
        page = analyse_runs(options, console)
    console.print(f"report in {os.path.abspath(page)}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
