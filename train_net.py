#!/usr/bin/env python
"""Trains or evaluates any method from a config, with Detectron2's command line.

    python train_net.py --config-file configs/quick/panoptic_fpn_synthetic.yaml OUTPUT_DIR output/quick
    python train_net.py --config-file ... --resume
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/quick/model_final.pth

Exit code: 0, 1 after an error that standard error names in one line (``--debug`` shows where), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from convmask.checkpoint import Checkpointer
from convmask.data.validation import check_before_training
from convmask.engine import ConfigError, Trainer, argument_parser, launch, one_line_errors, setup

logger = logging.getLogger("convmask.train_net")


def evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluates ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint in ``OUTPUT_DIR``, on ``DATASETS.TEST``."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("--eval-only: DATASETS.TEST is empty")
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, policy="strict", average=cfg.SOLVER.EMA.ENABLED)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        logger.warning("no MODEL.WEIGHTS: a model with random weights is evaluated")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(cfg: CfgNode, resume: bool) -> Any:
    """Checks the data sets, then trains and evaluates."""
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty")
    check_before_training(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer.train()


def main(args: argparse.Namespace) -> Any:
    """What every process of the job runs."""
    cfg = setup(args)
    return evaluate(cfg, args.resume) if args.eval_only else train(cfg, args.resume)


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    with one_line_errors(arguments.debug):
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
            timeout=timedelta(seconds=arguments.dist_timeout),
        )
