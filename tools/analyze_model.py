#!/usr/bin/env python
"""Counts the parameters, FLOPs and activations of a config's model, module by module, with fvcore.

    python tools/analyze_model.py --config-file configs/PanopticFPN/panoptic_fpn_R_50_1x.yaml
    python tools/analyze_model.py --config-file ... --task flops --size 800 1333 --depth 1 --json counts.json KEY VALUE

FLOPs count a multiplication with its addition as one, as papers do. Activations are the output values of convolutions
and matrix products. Both are of one forward pass, without the post-processing, of random weights; heads that work on
regions get as many as the config allows (R-CNNs: RPN.POST_NMS_TOPK_TEST and TEST.DETECTIONS_PER_IMAGE).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from convmask.benchmark.counts import TASKS, count_config, image_size
from convmask.engine import load_config, one_line_errors, prepare
from convmask.utils.files import write_atomically

UNITS = {"params": ("parameters, 10^6", 1e6), "flops": ("FLOPs, 10^9", 1e9), "activations": ("activations, 10^6", 1e6)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="FILE", required=True)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="what to count: by default all")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of the image: by default INPUT.{MIN,MAX}_SIZE_TEST, 800 1333 where images are not resized",
    )
    parser.add_argument("--depth", type=int, default=2, help="levels of modules in the table: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and image: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write the counts of all modules into a file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config, at the end")
    return parser.parse_args(arguments)


def table(counts: Mapping[str, Mapping[str, int]], depth: int) -> str:
    """A row for each module down to ``depth``, in the model's order."""
    first = next(iter(counts.values()))
    names = [name for name in first if name.count(".") < depth and any(c.get(name) for c in counts.values())]
    headers = ["module", *(UNITS[task][0] for task in counts)]
    rows = [
        [name or "model", *(by_module.get(name, 0) / UNITS[task][1] for task, by_module in counts.items())]
        for name in names
    ]
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f")


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts and prints; returns the exit code."""
    options = parse_arguments(arguments)
    with one_line_errors(options.debug):
        cfg = load_config(options.config_file, options.opts)
        cfg.MODEL.DEVICE = "cpu"
        prepare(cfg)
        height, width = options.size or image_size(cfg)
        counts = count_config(cfg, height, width, options.task, options.seed)
        print(f"{options.config_file}, image of {height} x {width}")
        print(table(counts, options.depth))
        if options.json:
            content = {"config": options.config_file, "size": [height, width], "counts": counts}
            write_atomically(options.json, json.dumps(content, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
