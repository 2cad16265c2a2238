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
import inspect
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
from tabulate import tabulate
from torch import nn

from convmask.engine import load_config, one_line_errors, prepare
from convmask.engine.errors import errors_of_config
from convmask.utils.files import write_atomically

TASKS = ("params", "flops", "activations")
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


def count(model: nn.Module, image: torch.Tensor, tasks: Sequence[str]) -> dict[str, dict[str, int]]:
    """The counts of each task by name of the module; "" is the whole model.

    Args:
        model: takes Detectron2's list of dicts. Set to evaluation mode.
        image: (3, H, W), 0 to 255.
        tasks: of ``TASKS``.
    """
    model.eval()
    counts: dict[str, dict[str, int]] = {}
    if "params" in tasks:
        counts["params"] = dict(parameter_count(model))
    traced = _traceable(model, image)
    for task, analysis_type in (("flops", FlopCountAnalysis), ("activations", ActivationCountAnalysis)):
        if task in tasks:
            analysis = analysis_type(traced, traced.flattened_inputs)
            # element-wise operations are left out, as Detectron2's analysis does
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                by_module = analysis.by_module()
            counts[task] = {
                name.removeprefix("model").removeprefix("."): int(value)
                for name, value in by_module.items()
                if name.split(".")[0] in ("", "model")
            }
            counts[task][""] = int(by_module["model"])
    return counts


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) that images are resized to in tests; MIN_SIZE_TEST 0 leaves them as they are: COCO's then."""
    return (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) if cfg.INPUT.MIN_SIZE_TEST else (800, 1333)


def faint_image(cfg: CfgNode, height: int, width: int) -> torch.Tensor:
    """Noise (3, height, width) around the mean colour, 0 to 255.

    It is faint, so that a network without training keeps its activations in a range in which it proposes boxes.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return mean + 0.01 * std * torch.randn(3, height, width)


def _traceable(model: nn.Module, image: torch.Tensor) -> TracingAdapter:
    """The network without its post-processing, which no paper counts, as far as the model can leave it out."""

    def forward(model: nn.Module, inputs: list[dict[str, Any]]) -> Any:
        if "do_postprocess" in inspect.signature(model.inference).parameters:
            return model.inference(inputs, do_postprocess=False)
        return model(inputs)

    return TracingAdapter(model, [{"image": image}], forward, allow_non_tensor=True)


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
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        torch.manual_seed(options.seed)
        with errors_of_config("the model"):
            model = build_model(cfg)
        counts = count(model, faint_image(cfg, height, width), options.task)
        print(f"{options.config_file}, image of {height} x {width}")
        print(table(counts, options.depth))
        if options.json:
            content = {"config": options.config_file, "size": [height, width], "counts": counts}
            write_atomically(options.json, json.dumps(content, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
