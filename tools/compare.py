#!/usr/bin/env python
"""Trains all methods for the same time on the same data, one after the other, and writes a page that compares them.

    python tools/compare.py --budget 3m
    python tools/compare.py --budget 25m --data nuclei --output output/compare_nuclei

Beside the five methods runs Detectron2's Mask R-CNN on the same backbone. Each method trains with its quick config
(configs/quick/*_<data>.yaml), whose schedule is stretched to the budget. What is done is kept in the output folder: the
same command again goes on where it stopped. With `--step train` and `--methods` the trainings can be done at several
times; `--step write` makes the page of those that are there.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from convmask import projects
from convmask.benchmark.machine import in_a_line
from convmask.comparison.measure import measure as measure_model
from convmask.comparison.page import Comparison, Row, write_pages
from convmask.comparison.pictures import draw_inputs, examples
from convmask.comparison.records import MethodFolder, Settings
from convmask.comparison.training import train_within
from convmask.engine import ConfigError, load_config, one_line_errors, prepare
from convmask.engine.budget import CLOCKS, format_duration, parse_duration
from convmask.engine.output_folder import claim_output_folder


@dataclass(frozen=True)
class Method:
    """A row of the comparison: its title, the project that it needs, and its configs."""

    title: str
    project: str
    configs: dict[str, str]


METHODS = {
    "panoptic_fpn": Method("Panoptic FPN", "panoptic_fpn", {"*": "panoptic_fpn"}),
    "panoptic_fcn": Method("Panoptic FCN", "panoptic_fcn", {"*": "panoptic_fcn"}),
    "fcis": Method("FCIS", "fcis", {"*": "fcis"}),
    "embed_mask": Method("EmbedMask", "embed_mask", {"*": "embed_mask"}),
    "knet": Method("K-Net", "knet", {"nuclei": "knet_instance", "*": "knet_panoptic"}),
    "mask_rcnn": Method("Mask R-CNN (Detectron2)", "panoptic_fpn", {"*": "mask_rcnn"}),
}
STEPS = ("train", "measure", "write")
# Images that are shown.
EXAMPLES = 5


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", default="3m", metavar="TIME", help="of training, for each method: 90s, 25m, 1h (default: 3m)")
    add("--clock", choices=sorted(CLOCKS), default="wall", help="what the budget counts (default: wall)")
    add("--data", choices=("synthetic", "nuclei"), default="synthetic", help="default: synthetic")
    add("--output", type=Path, default=None, metavar="DIR", help="default: output/compare_<data>")
    add("--page", type=Path, default=None, metavar="DIR", help="where comparison.{md,html} go (default: --output)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="default: all")
    add("--step", choices=STEPS, default=None, help="do this step only (default: all)")
    add("--note", action="append", default=[], metavar="TEXT", help="a line that goes below the table; may be repeated")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to every config")
    return parser.parse_args(arguments)


def config_of(name: str, settings: Settings, folder: MethodFolder, weights: str = "") -> CfgNode:
    """The config of a method on a data set, complete."""
    configs = METHODS[name].configs
    data = settings.data
    cfg = load_config(f"quick/{configs.get(data, configs['*'])}_{data}.yaml", settings.opts)
    cfg.OUTPUT_DIR = str(folder.path)
    cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
    prepare(cfg)
    cfg.freeze()
    return cfg


def train(name: str, settings: Settings, output: Path) -> None:
    """Trains one method in this process, if that is not done yet."""
    folder = MethodFolder(output, name)
    if folder.training_of(settings) is not None:
        return
    claim_output_folder(str(folder.path))
    for logger in ("fvcore", "detectron2", "convmask"):
        setup_logger(str(folder.path), name=logger)
    train_within(config_of(name, settings, folder), settings, folder)


def measure(name: str, settings: Settings, output: Path) -> None:
    """Measures one trained method in this process, if that is not done yet."""
    folder = MethodFolder(output, name)
    if folder.training_of(settings) is None:
        raise ConfigError(f"{folder.path}: {METHODS[name].title} has not been trained")
    if folder.read("measured") is not None:
        return
    cfg = config_of(name, settings, folder, weights=str(folder.path / "model_final.pth"))
    dataset = cfg.DATASETS.TEST[0]
    indices = examples(dataset, EXAMPLES)
    draw_inputs(dataset, indices, output / "pictures")
    measure_model(cfg, folder, indices)


def write(names: Sequence[str], settings: Settings, output: Path, page: Path, notes: Sequence[str]) -> None:
    """Writes the pages of all methods that have been trained and measured."""
    rows = []
    for name in names:
        folder = MethodFolder(output, name)
        training, measured = folder.training_of(settings), folder.read("measured")
        if training is not None and measured is not None:
            rows.append(Row(METHODS[name].title, training, measured, folder.path))
    if not rows:
        raise ConfigError(f"{output}: no method has been trained and measured yet")
    inputs = output / "pictures"
    comparison = Comparison(
        title=f"{len(rows)} methods on {settings.data}, {format_duration(settings.budget)} of training each",
        settings=settings.as_json(),
        rows=rows,
        command=command_of(settings),
        machine=sorted({_on_its_day(row.measured["benchmark"]["machine"]) for row in rows}),
        notes=[*explanations(rows), *notes],
        inputs=inputs,
        examples=sorted(int(path.stem.removesuffix("_image")) for path in inputs.glob("*_image.webp")),
    )
    for path in write_pages(comparison, page):
        print(path)


def _on_its_day(machine: dict[str, Any]) -> str:
    return in_a_line({**machine, "time": str(machine["time"]).partition("T")[0]})


def command_of(settings: Settings) -> str:
    """What makes the page of a comparison with these settings."""
    command = f"make compare BUDGET={format_duration(settings.budget)} DATA={settings.data} CLOCK={settings.clock}"
    return f"{command} ARGS={shlex.quote('--opts ' + shlex.join(settings.opts))}" if settings.opts else command


def explanations(rows: Sequence[Row]) -> list[str]:
    """Lines about the columns."""
    trained = {row.training["seconds"]["wall"] / max(row.training["seconds"]["cpu"], 1e-9) for row in rows}
    lines = [
        "AP is COCO's, of masks and of boxes, in percent; F1 is that of masks matched at an IoU of 0.5, at the score "
        "where it is highest. Empty: the method, as configured, does not predict it. Single runs.",
        "GFLOPs (a multiplication with its addition is one; an image of median size), time (median) and memory (peak "
        "above the model's own) are of the trained model on images of the test set, at the size that the config asks "
        "for, which differs between methods.",
    ]
    if max(trained) > 1.1:
        lines.append(f"By the clock the trainings took up to {max(trained):.1f} times as long as on the processor.")
    return lines


def available(names: Sequence[str]) -> list[str]:
    """The methods whose project is there."""
    present = projects.available()
    for name in names:
        if METHODS[name].project not in present:
            print(f"{METHODS[name].title} is left out: there is no projects folder with {METHODS[name].project}")
    return [name for name in names if METHODS[name].project in present]


def run_step(step: str, name: str, options: argparse.Namespace) -> None:
    """Runs a step of one method in a process of its own.

    Raises:
        ConfigError: it failed.
    """
    command = [sys.executable, "-W", "ignore", __file__, "--step", step, "--methods", name]
    for option in ("budget", "clock", "data", "output"):
        if getattr(options, option) is not None:
            command += [f"--{option}", str(getattr(options, option))]
    if options.debug:
        command.append("--debug")
    done = subprocess.run([*command, "--opts", *options.opts], stdout=None if step == "train" else subprocess.DEVNULL)
    if done.returncode:
        raise ConfigError(f"{METHODS[name].title}: step {step} failed with exit code {done.returncode}")


def run_all(options: argparse.Namespace, settings: Settings, output: Path, names: Sequence[str]) -> list[str]:
    """Trains and measures method after method; returns what failed, and goes on with the next."""
    failures = []
    for number, name in enumerate(names, 1):
        for step in ("train", "measure"):
            print(f"== {METHODS[name].title} ({number} of {len(names)}): {step}", flush=True)
            try:
                run_step(step, name, options)
            except ConfigError as error:
                failures.append(str(error))
                break
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Does the steps; returns the exit code."""
    options = parse_arguments(arguments)
    with one_line_errors(options.debug):
        settings = Settings(options.data, parse_duration(options.budget), options.clock, tuple(options.opts))
        output = options.output or Path(f"output/compare_{options.data}")
        names = available(options.methods)
        failures: list[str] = []
        if options.step is None:
            failures = run_all(options, settings, output, names)
        for name in names:
            if options.step == "train":
                train(name, settings, output)
            elif options.step == "measure":
                measure(name, settings, output)
        if options.step in (None, "write"):
            write(names, settings, output, options.page or output, options.note)
        if failures:
            raise ConfigError("; ".join(failures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
