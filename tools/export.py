#!/usr/bin/env python
"""Exports a model as a torch.export program and as ONNX: one image in, named tensors out, without code of ConvMask.

    python tools/export.py --config-file output/fcis/config.yaml --weights output/fcis/model_final.pth \\
        --output exported --dynamic

Post-processing is inside as far as docs/export.md says; model.json, or model_HxW.json, beside the files describes
input, outputs and classes. Every file is checked: the table says how far its outputs are from what the model itself
predicts, on images of several sizes. Exit code 1 where they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from tabulate import tabulate
from torch import nn

import convmask.data  # noqa: F401  registers the built-in data sets
from convmask.demo.model import demo_config
from convmask.engine import ConfigError, Predictor, one_line_errors
from convmask.export import ExportError, wrap
from convmask.export.check import Difference, difference, predicted
from convmask.export.description import description
from convmask.export.images import image_files, sized_image
from convmask.export.program import (
    DEFAULT_OPSET,
    GREATEST_SIDE,
    STEP,
    check_requirements,
    export_program,
    onnx_bytes,
    onnx_runner,
    program_bytes,
    program_runner,
)
from convmask.utils.files import write_atomically

Size = tuple[int, int]
FORMATS = ("pt2", "onnx")
HEADERS = ("format", "size", "instances", "missing", "scores", "boxes", "masks", "sem_seg", "panoptic", "")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="FILE", required=True)
    parser.add_argument("--weights", metavar="FILE", default="", help="by default the config's MODEL.WEIGHTS")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where the files are written")
    parser.add_argument("--format", choices=(*FORMATS, "both"), default="both", help="by default both")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        action="append",
        metavar=("H", "W"),
        help="of the images, may be repeated: a file for each. By default INPUT.{MIN,MAX}_SIZE_TEST, or 480 640",
    )
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help=f"one file for all sizes whose sides are multiples of {STEP}, up to {GREATEST_SIDE}",
    )
    parser.add_argument("--check", type=int, default=3, metavar="N", help="images (dynamic: and sizes): %(default)s")
    parser.add_argument("--images", nargs="+", default=(), metavar="FILE", help="to check with: by default test images")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="version of ONNX's operators: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config, at the end")
    return parser.parse_args(arguments)


def sizes_of(options: argparse.Namespace, cfg: Any) -> list[Size]:
    """The sizes that files are made for; with --dynamic the one that is traced.

    Raises:
        ConfigError: a side is too short, or there are several sizes for one dynamic file.
    """
    usual = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) if cfg.INPUT.MIN_SIZE_TEST else (480, 640)
    sizes = [(height, width) for height, width in options.size or [usual]]
    for height, width in sizes:
        if min(height, width) < STEP:
            raise ConfigError(f"--size {height} {width}: sides must be at least {STEP}")
    if options.dynamic and len(sizes) > 1:
        raise ConfigError("--dynamic makes one file for all sizes: give --size once, or not at all")
    if options.check < 0:
        raise ConfigError(f"--check {options.check} is less than 0")
    return sizes


def checked_sizes(size: Size, number: int, dynamic: bool, least: int) -> list[Size]:
    """The sizes of the images that a file is checked with: other ones too where it is for all."""
    if not dynamic:
        return [size] * number
    height, width = (max(least, round(side / STEP) * STEP) for side in size)
    shapes = [(height, width), (width, height + STEP), (least, least + STEP), (height, height), (2 * least, least)]
    return [shapes[index % len(shapes)] for index in range(number)]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns what cannot be exported into an error that is shown in one line."""
    try:
        yield
    except ExportError as error:
        raise ConfigError(str(error)) from error


def rows_of_check(
    model: nn.Module, run: Callable[..., Any], format_: str, files: Sequence[str], sizes: Sequence[Size], channels: str
) -> tuple[list[list[Any]], bool]:
    """A row of the table for each image, and whether all are within tolerance."""
    rows, good = [], True
    for file, size in zip(files, sizes, strict=True):
        image = sized_image(file, size, channels)
        found = difference(predicted(model, image), run(image))
        rows.append([format_, f"{size[0]} x {size[1]}", *_cells(found)])
        good = good and found.within_tolerance
    return rows, good


def _cells(found: Difference) -> list[Any]:
    values = (found.scores, found.boxes, found.masks, found.sem_seg, found.panoptic)
    numbers = ["" if value is None else f"{value:.1e}" if value else "0" for value in values]
    counts = ["" if value is None else value for value in (found.instances, found.missing)]
    return [*counts, *numbers, "same" if found.within_tolerance else "DIFFERS"]


def run(options: argparse.Namespace) -> int:
    """Exports, checks, writes and prints; returns the exit code."""
    formats = FORMATS if options.format == "both" else (options.format,)
    check_requirements(formats, running=options.check > 0)
    cfg = demo_config(options.config_file, options.weights, None, ["MODEL.DEVICE", "cpu", *options.opts])
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED: switch it off to export")
    sizes = sizes_of(options, cfg)
    images = image_files(cfg, options.check, options.images) if options.check else []
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    model = Predictor(cfg).model
    wrapper = wrap(model)
    console = Console(stderr=True)
    table, good = [], True
    for size in sizes:
        stem = "model" if options.dynamic else f"model_{size[0]}x{size[1]}"
        with console.status(f"torch.export for {'all sizes' if options.dynamic else f'{size[0]} x {size[1]}'}"):
            program = export_program(wrapper, size, options.dynamic)
        files = {}
        for format_ in formats:
            name = f"{stem}.{format_}"
            with console.status(f"writing and checking {name}"):
                names = list(wrapper.outputs)
                content = program_bytes(program) if format_ == "pt2" else onnx_bytes(program, names, options.opset)
                runner = program_runner(content) if format_ == "pt2" else None
                if options.check:
                    runner = runner or onnx_runner(content, names)
                    checked = checked_sizes(size, options.check, options.dynamic, wrapper.least_side)
                    rows, same = rows_of_check(model, runner, format_, images, checked, cfg.INPUT.FORMAT)
                    table += rows
                    good = good and same
                write_atomically(folder / name, content)
            files[format_] = name
        text = description(wrapper, cfg, None if options.dynamic else size, files)
        write_atomically(folder / f"{stem}.json", json.dumps(text, indent=1).encode())
        print(f"wrote {', '.join([*files.values(), f'{stem}.json'])} into {folder}")
    print(f"inside: {', '.join(wrapper.inside)}")
    print(f"outside: {', '.join(wrapper.outside)}")
    if table:
        print("\nGreatest differences from the model itself; of masks and panoptic maps the share of pixels:\n")
        print(tabulate(table, headers=HEADERS, tablefmt="pipe", disable_numparse=True))
    return 0 if good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs; returns the exit code."""
    options = parse_arguments(arguments)
    with one_line_errors(options.debug), errors_in_one_line():
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
