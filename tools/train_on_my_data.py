#!/usr/bin/env python
"""Trains a model on data of one's own in one command: checks them, chooses a config, trains, evaluates and draws.

    python tools/train_on_my_data.py --images photos --instances annotations.json --output output/mine
    python tools/train_on_my_data.py --images photos --panoptic panoptic.json --panoptic-root panoptic \\
        --output output/mine --method knet --time 10m
    python tools/train_on_my_data.py ... --dry-run
    python tools/train_on_my_data.py --output output/mine --resume

Annotations are a COCO json with instances, or COCO's panoptic json with its folder of PNG files. Without validation
data (--val-*) a fifth of the images is held out, always the same. The config that is chosen, and why, is printed and
written into the output folder, with which train_net.py and demo/demo.py go on:

    python train_net.py --config-file output/mine/config.yaml --resume
    python demo/demo.py --config-file output/mine/config.yaml --weights output/mine/model_final.pth --input photos

Exit code: 0, 1 after an error that standard error names in one line, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convmask.data.class_counts import categories_of
from convmask.data.config_datasets import register_datasets_of
from convmask.data.json_files import read_json
from convmask.data.problems import listing, raise_if_fatal
from convmask.data.splitting import split_by_image
from convmask.data.summary import summarise
from convmask.data.validation import check_before_training, validate_instances, validate_panoptic
from convmask.data.validation_files import Files
from convmask.demo.examples import draw_examples, results_table
from convmask.engine import ConfigError, Trainer, argument_parser, load_config, one_line_errors, prepare, setup
from convmask.engine.budget import iterations_within, parse_duration, with_iterations
from convmask.engine.config_files import merge_options
from convmask.engine.suggestion import METHODS, Suggestion, reasons, suggest
from convmask.utils.files import write_atomically
from convmask.utils.json_values import without_nan

CONFIG = "config.yaml"
# What the config holds already when a training goes on.
SETTLED = (
    *("images", "instances", "panoptic", "panoptic_root", "val_images", "val_instances", "val_panoptic"),
    *("val_panoptic_root", "val_share", "method", "device", "weights", "time"),
)
# Objects with a lower score are not drawn.
DRAWN_SCORE = 0.3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what belongs together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", metavar="DIR", help="folder of the images")
    add("--instances", metavar="JSON", help="COCO json with instances")
    add("--panoptic", metavar="JSON", help="COCO panoptic json")
    add("--panoptic-root", metavar="DIR", help="folder of its PNG files; default: the json's name without its ending")
    add("--val-images", metavar="DIR", help="for validation; default: --images")
    add("--val-instances", metavar="JSON", help="for validation; without one a share of the images is held out")
    add("--val-panoptic", metavar="JSON", help="for validation, likewise")
    add("--val-panoptic-root", metavar="DIR", help="folder of its PNG files")
    add("--val-share", type=float, default=0.2, metavar="X", help="of the images that is held out: %(default)s")
    add("--output", required=True, metavar="DIR", type=Path, help="folder for everything")
    add("--method", choices=METHODS, help="default: panoptic_fpn for panoptic data, embed_mask for instances")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    add("--weights", default="", metavar="FILE", help="a checkpoint to fine-tune; default: the config's")
    add("--time", metavar="T", help="train about so long (10m, 1.5h), by a short measurement on this machine")
    add("--quick-check", action="store_true", help="do not decode every image before training")
    add("--dry-run", action="store_true", help="stop after the suggestion; its config is written")
    add("--resume", action="store_true", help="go on with the training in --output")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to the config, at the end")
    options = parser.parse_args(arguments)
    if options.resume:
        for name in SETTLED:
            if getattr(options, name) != parser.get_default(name):
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"{flag}: --resume goes on with the config in --output; change the config with --opts")
        return options
    if not options.images or (options.instances is None) == (options.panoptic is None):
        parser.error("give --images and either --instances or --panoptic")
    if (options.val_instances and options.panoptic) or (options.val_panoptic and options.instances):
        parser.error("training and validation data are of one kind: both instances, or both panoptic")
    for name, owners in (
        ("panoptic_root", ["panoptic"]),
        ("val_images", ["val_instances", "val_panoptic"]),
        ("val_panoptic_root", ["val_panoptic"]),
    ):
        if getattr(options, name) and not any(getattr(options, owner) for owner in owners):
            flags = [f"--{word.replace('_', '-')}" for word in (name, *owners)]
            parser.error(f"{flags[0]} {getattr(options, name)} needs {' or '.join(flags[1:])}")
    if not 0 < options.val_share < 1:
        parser.error(f"--val-share is {options.val_share}, not between 0 and 1")
    return options


def find_files(options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Kind and absolute paths of the training data and, if they are given, the validation data: see DATASETS.REGISTER.

    Raises:
        ConfigError: one is not there.
    """

    def entry(images: str, instances: str | None, panoptic: str | None, root: str | None) -> list[str]:
        paths = [images, instances] if instances else [images, panoptic, root or os.path.splitext(panoptic or "")[0]]
        found = [os.path.abspath(str(path)) for path in paths]
        for path, isdir in zip(found, (True, False, True), strict=False):
            if not (os.path.isdir(path) if isdir else os.path.isfile(path)):
                raise ConfigError(f"{path}: there is no such {'folder' if isdir else 'file'}")
        return ["instances" if instances else "panoptic", *found]

    train = entry(options.images, options.instances, options.panoptic, options.panoptic_root)
    if not (options.val_instances or options.val_panoptic):
        return train, None
    images = options.val_images or options.images
    return train, entry(images, options.val_instances, options.val_panoptic, options.val_panoptic_root)


def validate(entry: list[str], quick: bool, console: Console) -> None:
    """Checks annotations and images; prints what will be left out.

    Raises:
        DatasetError: for everything that training would stumble over.
    """

    def progress(files: Iterable[Files]) -> Iterable[Files]:
        return track(list(files), f"Checking {entry[2]}", console=console, transient=True)

    check = validate_instances if entry[0] == "instances" else validate_panoptic
    problems = check(*entry[1:], quick=quick, progress=progress)
    raise_if_fatal(problems, entry[2])
    if problems:
        console.print(
            f"{len(problems)} entries of {entry[2]} will be left out or repaired:", markup=False, soft_wrap=True
        )
        console.print(listing(problems), markup=False, soft_wrap=True)


def split(entry: list[str], share: float, folder: Path) -> tuple[list[str], list[str]]:
    """Writes two annotation files into ``folder`` and returns their entries.

    Raises:
        ConfigError: one would replace a file of other contents, such as annotations of the user's own.
        DatasetError: the file cannot be read or split.
    """
    content = read_json(entry[2], ("images", "annotations"))
    parts = split_by_image(content, share, entry[2])
    files = {
        folder / f"{name}.json": json.dumps(part).encode() for name, part in zip(("train", "val"), parts, strict=True)
    }
    for path, new in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != new):
            raise ConfigError(f"{path} is there already, with other contents: name another --output")
    folder.mkdir(parents=True, exist_ok=True)
    for path, new in files.items():
        write_atomically(path, new)
    train, val = ([*entry[:2], os.path.abspath(path), *entry[3:]] for path in files)
    return train, val


def device_of(options: argparse.Namespace) -> tuple[str, float]:
    """``MODEL.DEVICE``, and its memory in GiB.

    Raises:
        ConfigError: CUDA is asked for where there is none.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cuda"):
        return device, 0.0
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no CUDA device")
    return device, torch.cuda.mem_get_info()[1] / 2**30


def make_config(options: argparse.Namespace, console: Console) -> CfgNode:
    """Checks the data, chooses the config, prints why, and writes it into the output folder."""
    if (options.output / CONFIG).exists():
        raise ConfigError(f"{options.output} holds a training already: go on with --resume, or name another folder")
    seconds = parse_duration(options.time) if options.time else None
    device, memory = device_of(options)
    train, val = find_files(options)
    validate(train, options.quick_check, console)
    if val is not None:
        validate(val, options.quick_check, console)
    else:
        train, val = split(train, options.val_share, options.output / "data")
    names = [f"{options.output.resolve().name}_{part}" for part in ("train", "val")]
    entries = [[name, *entry] for name, entry in zip(names, (train, val), strict=True)]
    suggestion = _suggestion(options, names, entries, console, device=device, gpu_memory=memory)
    cfg = suggestion.apply()
    merge_options(cfg, options.opts)
    cfg.OUTPUT_DIR = str(options.output)
    prepare(cfg)
    if seconds:
        cfg = _within(cfg, seconds, console)
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / CONFIG, cfg.dump().encode())
    console.print(f"config: {options.output / CONFIG}", markup=False, soft_wrap=True)
    return cfg


def _suggestion(
    options: argparse.Namespace,
    names: list[str],
    entries: list[list[str]],
    console: Console,
    *,
    device: str,
    gpu_memory: float,
) -> Suggestion:
    registered = load_config()
    registered.DATASETS.REGISTER = entries
    register_datasets_of(registered)
    data = summarise(DatasetCatalog.get(names[0]), categories_of(names[0]), names[0])
    suggestion = suggest(data, method=options.method, device=device, gpu_memory=gpu_memory, weights=options.weights)
    console.print(f"training data: {data}", markup=False, soft_wrap=True)
    console.print(f"validation data: {len(DatasetCatalog.get(names[1]))} images", markup=False, soft_wrap=True)
    table = Table("key", "value", "why", title=f"{suggestion.config}, with changes")
    for row in reasons(suggestion.choices):
        table.add_row(*row)
    console.print(table)
    suggestion.set("DATASETS.REGISTER", entries, "")
    suggestion.set("DATASETS.TRAIN", (names[0],), "")
    suggestion.set("DATASETS.TEST", (names[1],), "")
    return suggestion


def _within(cfg: CfgNode, seconds: float, console: Console) -> CfgNode:
    measured = cfg.clone()
    measured.freeze()
    iterations = iterations_within(measured, seconds)
    console.print(
        f"SOLVER.MAX_ITER {iterations}: what this machine does in {seconds:.0f} s", markup=False, soft_wrap=True
    )
    return with_iterations(cfg, iterations)


def train(options: argparse.Namespace) -> tuple[CfgNode, torch.nn.Module, dict[str, Any]]:
    """Trains, or goes on, as train_net.py does; returns the config, the model and the last evaluation."""
    arguments = ["--config-file", str(options.output / CONFIG), *(["--resume"] if options.resume else [])]
    cfg = setup(argument_parser().parse_args([*arguments, *options.opts]))
    check_before_training(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=options.resume)
    if trainer.start_iter < trainer.max_iter:
        trainer.train()
        # Detectron2 keeps the last evaluation there, and returns it only to tests with expected results.
        return cfg, trainer.model, trainer._last_eval_results
    return cfg, trainer.model, trainer.evaluate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Does everything; returns the exit code."""
    options = parse_arguments(arguments)
    console = Console()
    with one_line_errors(options.debug):
        if options.resume:
            if not (options.output / CONFIG).is_file():
                raise ConfigError(f"{options.output} holds no training to go on with: it has no {CONFIG}")
        else:
            make_config(options, console)
        if options.dry_run:
            console.print("change it as you like; --resume trains with it", markup=False, soft_wrap=True)
            return 0
        cfg, model, results = train(options)
        content = json.dumps(without_nan(results), indent=1, allow_nan=False)
        write_atomically(options.output / "results.json", content.encode())
        pictures = draw_examples(cfg, model, options.output / "pictures", threshold=DRAWN_SCORE, scale=None)
        console.print(results_table(results))
        console.print(
            f"pictures {pictures[0]}\nmodel {options.output / 'model_final.pth'}", markup=False, soft_wrap=True
        )
        console.print("low, or zero: docs/zero_ap.md", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
