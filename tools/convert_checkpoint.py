#!/usr/bin/env python
"""Makes a clean file of ours out of any checkpoint that ConvMask reads, or gives a model its original's names back.

    python tools/convert_checkpoint.py model_final.pkl weights.safetensors
    python tools/convert_checkpoint.py fcis_coco-0000.params fcis.pth --config-file FCIS/fcis_R_101_coco_ohem.yaml
    python tools/convert_checkpoint.py output/knet/model_final.pth released.pth --to-original
    python tools/convert_checkpoint.py model_final.pkl --dry-run --json tensors.json

The result holds the weights alone, with the config's name, the source and the version as metadata; MODEL.WEIGHTS takes
it, and gives the same model as the source. A table says what became of the tensors: kept or renamed, reordered
(permuted channels, anchors, boxes), joined or part of one, recomputed, dropped as of no use, or left over, because no
place for them is known. Nothing that a file names is executed. ``--to-original`` is refused where something would be
lost: the result is converted again, and has to be the same bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convmask.checkpoint import Checkpointer, CheckpointError
from convmask.checkpoint.conversion import (
    Conversion,
    as_json,
    check_target,
    convert,
    convert_to_original,
    metadata_of,
    save_weights,
)
from convmask.checkpoint.provenance import summary, table
from convmask.config import get_cfg
from convmask.engine import Trainer, load_config, one_line_errors, prepare
from convmask.utils.files import write_atomically


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint: a file, or a URL that Detectron2 knows")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="the file to write: .safetensors or .pth")
    parser.add_argument("--config-file", metavar="FILE", help="also check that the weights fit its model; recorded")
    parser.add_argument("--to-original", action="store_true", help="write the original release's names and layout")
    parser.add_argument("--average", action="store_true", help="take the moving average (ema_model) where there is one")
    parser.add_argument("--json", metavar="FILE", help="also write what became of each tensor into a file")
    parser.add_argument("--dry-run", action="store_true", help="only show the table")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes to the config")
    options = parser.parse_args(arguments)
    if options.target is None and not options.dry_run:
        parser.error("name the file to write, or ask for --dry-run")
    if options.opts and not options.config_file:
        parser.error(f"{' '.join(options.opts)}: options of a config need --config-file")
    return options


def check_files(options: argparse.Namespace) -> None:
    """Makes sure, before work starts, that the files can be written, and replace neither the source nor each other.

    Raises:
        CheckpointError: one cannot, or would.
    """
    source = options.source.partition("?")[0]
    for path in filter(None, (options.target, options.json)):
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(source, path):
            raise CheckpointError(f"{path}: is the source itself; name another file")
    if options.target:
        check_target(options.target, options.force)
    if options.json:
        details = Path(options.json)
        if options.target and os.path.realpath(details) == os.path.realpath(options.target):
            raise CheckpointError(f"{details}: is the file of the weights; name another one with --json")
        if not details.parent.is_dir():
            raise CheckpointError(f"{details}: there is no folder {details.parent}")
        if details.is_dir() or (details.exists() and not options.force):
            raise CheckpointError(f"{details}: exists (--force replaces a file)")


def check_fit(options: argparse.Namespace) -> None:
    """Loads the source into the model of the config, as ``--eval-only`` does; backbones as training does.

    Raises:
        CheckpointError: it does not fit.
    """
    cfg = load_config(options.config_file, options.opts)
    cfg.MODEL.DEVICE = "cpu"
    prepare(cfg)
    model = Trainer.build_model(cfg)
    relative = convert(options.source, average=options.average).relative
    policy = "finetune" if relative else "strict"
    Checkpointer(model, policy=policy, average=options.average).load(options.source, checkpointables=[])


def report(options: argparse.Namespace, conversion: Conversion) -> None:
    """Prints the table, and what the weights expect."""
    print(f"{options.source}: {conversion.source}" if not options.to_original else f"to {conversion.source}")
    print(table(conversion.rows))
    print(summary(conversion.rows))
    if conversion.config or options.config_file:
        print(f"config: {options.config_file or conversion.config}")
    if conversion.hint:
        print(conversion.hint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    options = parse_arguments(arguments)
    with one_line_errors(options.debug):
        get_cfg()  # imports the methods, which register their converters
        check_files(options)
        if options.config_file:
            check_fit(options)
        make = convert_to_original if options.to_original else convert
        conversion = make(options.source, average=options.average)
        if options.config_file:
            conversion.config = options.config_file
        report(options, conversion)
        metadata = {} if options.to_original else metadata_of(conversion, options.source)
        if not conversion.state:
            raise CheckpointError(f"{options.source}: nothing is left to write")
        if options.json:
            write_atomically(options.json, as_json(conversion, metadata))
        if options.target and not options.dry_run:
            save_weights(options.target, conversion, metadata)
            print(f"{len(conversion.state)} tensors in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
