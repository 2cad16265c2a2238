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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from convmask.comparison.records import MethodFolder, Settings
from convmask.comparison.training import train_within
from convmask.engine import load_config, one_line_errors, prepare
from convmask.engine.budget import CLOCKS, parse_duration
from convmask.engine.output_folder import claim_output_folder


@dataclass(frozen=True)
class Method:
    """A row of the comparison: its title, the project that it needs ("" for Detectron2's own), and its configs."""

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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", default="3m", metavar="TIME", help="of training, for each method: 90s, 25m, 1h (default: 3m)")
    add("--clock", choices=sorted(CLOCKS), default="wall", help="what the budget counts (default: wall)")
    add("--data", choices=("synthetic", "nuclei"), default="synthetic", help="default: synthetic")
    add("--output", type=Path, default=None, metavar="DIR", help="default: output/compare_<data>")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="default: all")
    add("--step", choices=STEPS, default=None, help="do this step only (default: all)")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to every config")
    return parser.parse_args(arguments)


def config_of(name: str, data: str, folder: MethodFolder, opts: Sequence[str]) -> CfgNode:
    """The config of a method on a data set, complete."""
    configs = METHODS[name].configs
    cfg = load_config(f"quick/{configs.get(data, configs['*'])}_{data}.yaml", opts)
    cfg.OUTPUT_DIR = str(folder.path)
    prepare(cfg)
    cfg.freeze()
    return cfg


def train(name: str, settings: Settings, output: Path, opts: Sequence[str]) -> None:
    """Trains one method in this process, if that is not done yet."""
    folder = MethodFolder(output, name)
    if folder.training_of(settings) is not None:
        return
    claim_output_folder(str(folder.path))
    for logger in ("fvcore", "detectron2", "convmask"):
        setup_logger(str(folder.path), name=logger)
    train_within(config_of(name, settings.data, folder, opts), settings, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Does the steps; returns the exit code."""
    options = parse_arguments(arguments)
    with one_line_errors(options.debug):
        settings = Settings(options.data, parse_duration(options.budget), options.clock, torch.get_num_threads())
        output = options.output or Path(f"output/compare_{options.data}")
        if options.step == "train":
            for name in options.methods:
                train(name, settings, output, options.opts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
