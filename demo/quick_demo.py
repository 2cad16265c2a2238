#!/usr/bin/env python
"""What ``make demo`` runs: trains a small panoptic model on the CPU, evaluates it and shows what it predicts.

    python demo/quick_demo.py
    python demo/quick_demo.py --image photo.jpg [--weights model.pth] [--config config.yaml]

With ``--image`` a model predicts on an image of one's own: by default Panoptic FPN R50 of Detectron2's model zoo.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from rich.console import Console

from convmask.checkpoint import CheckpointError
from convmask.data.images import read_image
from convmask.demo import demo_config, draw
from convmask.demo.examples import draw_examples, results_table
from convmask.engine import ConfigError, Predictor, Trainer, load_config, one_line_errors, prepare
from convmask.visualization import save_image

QUICK_CONFIG = "quick/panoptic_fpn_synthetic.yaml"
OUTPUT = Path("output/demo")
# An empty file in a folder that a demo may delete.
MARK = ".quick_demo"
ZOO_CONFIG = "PanopticFPN/panoptic_fpn_R_50_3x.yaml"
ZOO_WEIGHTS = "detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x/139514569/model_final_c10459.pkl"
# Seconds without an answer after which the model zoo counts as out of reach.
_PATIENCE = 10.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train, evaluate and look at a small panoptic model.")
    add = result.add_argument
    add("--image", metavar="FILE", help="predict on this image instead")
    add("--weights", default="", metavar="FILE", help="with --image: a checkpoint")
    add("--config", default="", metavar="CONFIG", help="with --image: its config; default: config.yaml beside it")
    add("--output", type=Path, default=None, metavar="DIR", help=f"default: {OUTPUT}, output/predictions with --image")
    add("--max-iter", type=int, default=None, metavar="N", help="train N iterations instead of the config's number")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config options")
    return result


class DemoTrainer(Trainer):
    """A trainer that leaves the evaluation to the demo, which shows its result as a table."""

    def build_hooks(self) -> list[HookBase | None]:
        """All hooks but the evaluation."""
        return [hook for hook in super().build_hooks() if not isinstance(hook, hooks.EvalHook)]


def training_config(args: argparse.Namespace) -> CfgNode:
    """The quick config, ready for training into a clean output folder."""
    output = args.output or OUTPUT
    cfg = load_config(QUICK_CONFIG, args.opts)
    cfg.OUTPUT_DIR = str(output)
    if args.max_iter is not None:
        cfg.SOLVER.MAX_ITER = args.max_iter
        cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < args.max_iter)
    prepare(cfg)
    if output.exists():
        # The folder of another training has a config and a model too: the file says that it is a demo's.
        if args.output is not None and any(output.iterdir()) and not (output / MARK).is_file():
            raise ConfigError(f"{output} holds something else than an earlier demo: choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARK).touch()
    log_to(output)
    (output / "config.yaml").write_text(cfg.dump())
    cfg.freeze()
    return cfg


def log_to(folder: Path) -> None:
    """Sends everything to ``log.txt`` and, of that, metric lines and warnings to the terminal."""
    for name in ("fvcore", "detectron2", "convmask"):
        for handler in setup_logger(str(folder), name=name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.addFilter(lambda record: record.levelno >= logging.WARNING or "utils.events" in record.name)


def train(cfg: CfgNode) -> tuple[Trainer, float]:
    """Trains; returns the trainer and the seconds that it took."""
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else 0)
    start = time.perf_counter()
    trainer = DemoTrainer(cfg)
    trainer.train()
    return trainer, time.perf_counter() - start


def run_training(args: argparse.Namespace, console: Console) -> None:
    """Trains, evaluates, draws, and prints what came out."""
    cfg = training_config(args)
    device = "CPU" if cfg.MODEL.DEVICE == "cpu" else cfg.MODEL.DEVICE
    threads = f" with {torch.get_num_threads()} threads" if device == "CPU" else ""
    print(f"Training on {cfg.DATASETS.TRAIN[0]}: {cfg.SOLVER.MAX_ITER} iterations, {device}{threads}", flush=True)
    trainer, seconds = train(cfg)
    print(f"Evaluating on {cfg.DATASETS.TEST[0]}", flush=True)
    results: dict[str, Any] = Trainer.test(cfg, trainer.model)
    pictures = draw_examples(cfg, trainer.model, Path(cfg.OUTPUT_DIR) / "pictures")
    console.print(results_table(results))
    print(f"training time  {seconds // 60:.0f} min {seconds % 60:02.0f} s")
    print(f"pictures       {pictures[0]} and {len(pictures) - 1} single ones beside it")
    print(f"model          {Path(cfg.OUTPUT_DIR) / 'model_final.pth'}")
    print(f"PQ {results['panoptic_seg']['PQ']:.1f}")


def image_config(args: argparse.Namespace) -> CfgNode:
    """The model for an image of one's own: as asked for, or the zoo's."""
    config = args.config
    if not config and args.weights:
        beside = Path(args.weights).parent / "config.yaml"
        config = str(beside) if beside.is_file() else ZOO_CONFIG
    weights = args.weights if args.weights or config else ZOO_WEIGHTS
    return demo_config(config or ZOO_CONFIG, weights, opts=args.opts)


def run_image(args: argparse.Namespace) -> None:
    """Predicts on one image and writes the picture."""
    image = read_image(args.image, "BGR")
    path = (args.output or Path("output/predictions")) / f"{Path(args.image).stem}.png"
    if path.resolve() == Path(args.image).resolve():
        raise ConfigError(f"the prediction would overwrite the image {args.image}: choose another --output")
    cfg = image_config(args)
    try:
        socket.setdefaulttimeout(_PATIENCE)
        predictor = Predictor(cfg)
    except (OSError, CheckpointError) as error:
        if args.weights or "://" not in cfg.MODEL.WEIGHTS:
            raise
        raise ConfigError(_no_download(args.image, cfg.MODEL.WEIGHTS, error)) from error
    finally:
        socket.setdefaulttimeout(None)
    prediction = predictor(image)
    picture = draw(image, prediction, predictor.metadata)
    print(f"prediction     {save_image(path, picture)}")


def _no_download(image: str, weights: str, error: Exception) -> str:
    reason = str(error.__cause__ or error).strip().splitlines()[-1]
    message = (
        f"cannot download {weights} ({reason}). With weights of your own: "
        f"make demo IMAGE={image} WEIGHTS=model.pth CONFIG=config.yaml"
    )
    own = OUTPUT / "model_final.pth"
    if own.is_file():
        message += f"; with the model that `make demo` trained: make demo IMAGE={image} WEIGHTS={own}"
    return message


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    with one_line_errors(args.debug):
        if args.image:
            for name in ("detectron2", "fvcore", "convmask"):
                setup_logger(name=name).setLevel(logging.WARNING)
            run_image(args)
        elif args.weights or args.config:
            raise ConfigError("--weights and --config go with --image")
        else:
            run_training(args, Console())


if __name__ == "__main__":
    main()
