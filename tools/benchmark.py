#!/usr/bin/env python
"""Measures what a config's model costs at inference: parameters, FLOPs, activations, peak memory, and time by stage.

    python tools/benchmark.py --config-file configs/quick/embed_mask_nuclei.yaml --size 384 384
    python tools/benchmark.py --config-file output/knet/config.yaml --weights output/knet/model_final.pth --dataset
    python tools/benchmark.py --config-file ... --precision float32 bfloat16 --batch-size 1 8 --mode eager compiled
    python tools/benchmark.py --all configs/quick --size 256 256 --json quick.json

Stages: preprocess (images to the device, normalised, padded), backbone (with the feature pyramid), heads (to the
outputs of the last layers), postprocess (suppression, masks, merging, resizing to the image, Detectron2's results), and
transfer (results to the CPU). A model that does not say which of its parts are which (convmask.inference.stages) has
backbone and rest.

Warm-up comes first, a GPU is waited for, and medians and quartiles are given. "total" is of calls that nothing but the
clock around them disturbs; they alternate with those that are split into stages. Peak memory is above what is there
with the model before its first call: on the CPU of a fresh process, on a GPU of PyTorch's allocator.

Images are noise by default, and weights are random: the post-processing then has nothing of what a trained model gives
it. For numbers that mean something take --weights with --images or --dataset. With --all each config runs in a process
of its own, and one that fails does not end the others; a config.yaml with a model_final.pth beside it, which is what a
training leaves, is measured with these weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from convmask.benchmark import ModelOptions, benchmark_config, check_options, table_of
from convmask.benchmark.images import Input, images_of_dataset, images_of_files, random_images
from convmask.benchmark.model import PRECISIONS
from convmask.data.errors import DatasetError
from convmask.data.user_modules import import_user_module
from convmask.engine import ConfigError, load_config, one_line_errors, prepare
from convmask.utils.files import write_atomically

# What --all hands on to the process of each config.
_SINGLE = ("device", "backend", "number", "warmup", "repeats", "threads", "weights")
_SEVERAL = ("precision", "batch_size", "mode", "size", "images")
_SWITCHES = ("dataset", "no_counts", "no_memory", "debug")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE")
    what.add_argument(
        "--all", metavar="FOLDER", nargs="?", const="configs/quick", help="every config below (%(const)s)"
    )
    add("--weights", metavar="FILE", help="a checkpoint, as MODEL.WEIGHTS (default: the config's, or random)")
    add("--device", help="cpu, cuda, cuda:1 (default: the config's)")
    add("--precision", nargs="+", choices=PRECISIONS, default=["float32"], help="the last two by autocasting (AMP)")
    add("--batch-size", nargs="+", type=int, default=[1], metavar="N", help="images a call (default: 1)")
    add("--mode", nargs="+", choices=("eager", "compiled"), default=["eager"], help="compiled: the dense parts")
    add("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="of noise (default: the config's for tests)"
    )
    images.add_argument("--images", nargs="+", metavar="PATH", help="files, folders, patterns")
    images.add_argument("--dataset", action="store_true", help="images of DATASETS.TEST")
    add(
        "--number",
        type=int,
        default=8,
        metavar="N",
        help="at most so many of --images or --dataset (default: %(default)s)",
    )
    add("--warmup", type=int, default=3, metavar="N", help="calls before those that count (default: %(default)s)")
    add("--repeats", type=int, default=20, metavar="N", help="calls that count (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of PyTorch on the CPU (default: its own choice)")
    add("--no-counts", action="store_true", help="without parameters, FLOPs and activations")
    add("--no-memory", action="store_true", help="without the peak of memory")
    add("--json", metavar="FILE", help="write all that was measured")
    add("--markdown", metavar="FILE", help="write the table")
    add("--import", dest="modules", action="append", default=[], metavar="MODULE", help="registers datasets or models")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config, at the end")
    return parser.parse_args(arguments)


def runs_of(args: argparse.Namespace) -> list[ModelOptions]:
    """Every combination of precision, batch size and mode."""
    return [
        ModelOptions(precision, batch_size, args.backend if mode == "compiled" else None)
        for precision, batch_size, mode in itertools.product(args.precision, args.batch_size, args.mode)
    ]


def read_config(path: str, args: argparse.Namespace) -> CfgNode:
    """A config with what the command line changes in it, after making sure that it can be run so.

    Raises:
        ConfigError: it cannot.
    """
    cfg = load_config(path, args.opts)
    if args.device:
        cfg.MODEL.DEVICE = args.device
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    if args.number < 1 or min(args.size or [1]) < 1 or (args.threads or 1) < 1:
        raise ConfigError("--number, --size and --threads are at least 1")
    if args.repeats < 1 or args.warmup < 0:
        raise ConfigError("--repeats is at least 1, --warmup at least 0")
    for run in runs_of(args):
        check_options(run, cfg.MODEL.DEVICE)
    return cfg


def complete(cfg: CfgNode, needs_dataset: bool) -> None:
    """:func:`prepare`; class counts are those of the config where its datasets are not at hand."""
    try:
        prepare(cfg)
    except DatasetError as error:
        if needs_dataset:
            raise
        print(f"class counts are those of the config: {error}", file=sys.stderr)


def images_for(cfg: CfgNode, args: argparse.Namespace, batch_size: int) -> list[Input]:
    """What the command line says to predict on."""
    if args.images:
        return images_of_files(cfg, args.images, args.number)
    if args.dataset:
        return images_of_dataset(cfg, args.number)
    return random_images(cfg, batch_size, tuple(args.size) if args.size else None)


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """On a terminal's standard error."""
    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def measure(path: str, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The record of every run of one config."""
    cfg = read_config(path, args)
    complete(cfg, args.dataset)
    records = []
    runs = runs_of(args)
    with progress_bar("calls") as progress:
        task = progress.add_task("", total=len(runs) * args.repeats)
        for number, run in enumerate(runs):
            progress.update(task, description=str(run))
            record = benchmark_config(
                cfg,
                images_for(cfg, args, run.batch_size),
                options=run,
                warmup=args.warmup,
                repeats=args.repeats,
                counts=not args.no_counts and number == 0,
                memory=not args.no_memory,
                imports=args.modules,
                progress=lambda: progress.advance(task),
            )
            if number and not args.no_counts:
                record.update({key: records[0][key] for key in ("parameters", "flops", "activations")})
            kind = "files" if args.images else "dataset" if args.dataset else "noise"
            records.append({"name": name, "config": path, "kind_of_images": kind, **record})
    return records


def find_configs(folder: str) -> dict[str, Path]:
    """Configs below a folder by a short name; those of which others are made, Base-*.yaml, are none.

    Raises:
        ConfigError: there is none.
    """
    root = Path(folder)
    paths = [path for path in sorted(root.rglob("*.yaml")) if not path.name.startswith("Base")]
    if not paths:
        raise ConfigError(f"no configs below {folder!r}")
    found = {}
    for path in paths:
        name = path.parent if path.name == "config.yaml" and path.parent != root else path.with_suffix("")
        found[name.relative_to(root).as_posix()] = path
    return found


def command_for(path: Path, args: argparse.Namespace, output: str) -> list[str]:
    """The command line that measures one of several configs."""
    command = [sys.executable, __file__, "--config-file", str(path), "--json", output]
    # first those of several values: the last of them would take the changes to the config at the end for its own
    for name in (*_SEVERAL, *_SINGLE):
        value = getattr(args, name)
        if value is not None:
            values = value if name in _SEVERAL else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    command += [f"--{name.replace('_', '-')}" for name in _SWITCHES if getattr(args, name)]
    for module in args.modules:
        command += ["--import", module]
    weights = path.with_name("model_final.pth")
    if path.name == "config.yaml" and weights.is_file() and args.weights is None:
        command += ["--weights", str(weights)]
    return command + args.opts


def measure_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The records of all configs that could be measured, and why the others could not."""
    configs = find_configs(args.all)
    for name, path in configs.items():
        try:
            read_config(str(path), args)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with progress_bar("configs") as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(configs))
        for name, path in configs.items():
            progress.update(task, description=name)
            output = Path(folder) / "records.json"
            output.unlink(missing_ok=True)
            done = subprocess.run(command_for(path, args, str(output)), capture_output=True, text=True)
            if done.returncode == 0 and output.is_file():
                records += [{**record, "name": name} for record in json.loads(output.read_text())["records"]]
            else:
                failed[name] = done.stderr if args.debug else _reason(done)
            save(args, records, failed)
            progress.advance(task)
    return records, failed


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process wrote, or the signal that ended it."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"ended with exit code {done.returncode}"


def save(args: argparse.Namespace, records: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """Writes the files that the command line asks for."""
    if args.json:
        write_atomically(args.json, json.dumps({"records": records, "failed": failed}, indent=1).encode())
    if args.markdown and records:
        write_atomically(args.markdown, (table_of(records) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code: 1 where a config failed."""
    args = parse_arguments(arguments)
    with one_line_errors(args.debug):
        for module in args.modules:
            import_user_module(module)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.all:
            records, failed = measure_all(args)
        else:
            records, failed = measure(args.config_file, Path(args.config_file).stem, args), {}
        save(args, records, failed)
        if records:
            print(table_of(records))
        for name, reason in failed.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
