"""The training of one method within the budget, and its evaluation."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng

from convmask.comparison.records import MethodFolder, Settings
from convmask.data.validation import check_before_training
from convmask.engine.budget import CLOCKS, iterations_within, with_iterations
from convmask.engine.trainer import Trainer
from convmask.utils.json_values import without_nan

logger = logging.getLogger(__name__)


class _TrainingOnly(Trainer):
    """A trainer that does not evaluate: the budget is of training."""

    def build_hooks(self) -> list[HookBase | None]:
        return [hook for hook in super().build_hooks() if not isinstance(hook, hooks.EvalHook)]


def train_within(cfg: CfgNode, settings: Settings, folder: MethodFolder) -> dict[str, Any]:
    """Trains for the budget, evaluates, and keeps the record of both.

    Args:
        cfg: complete, see :func:`convmask.engine.prepare`; its schedule is stretched to the budget.
        settings: of the comparison.
        folder: of the method, to which ``OUTPUT_DIR`` leads.

    Returns:
        The record: ``settings``, ``threads``, ``iterations``, ``images_per_iteration``, ``seconds`` of the training by
        both clocks, ``evaluation_seconds``, and ``results`` as Detectron2's evaluators give them, in percent.
    """
    check_before_training(cfg)
    iterations = iterations_within(cfg, settings.budget, settings.clock)
    logger.info("%d iterations fit into %.0f s (%s)", iterations, settings.budget, settings.clock)
    cfg = with_iterations(cfg, iterations)
    (folder.path / "config.yaml").write_text(cfg.dump())
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else 0)
    # Detectron2 appends to it: what a training left that was killed would be a part of the curve.
    (folder.path / "metrics.json").unlink(missing_ok=True)
    began = {name: clock() for name, clock in CLOCKS.items()}
    trainer = _TrainingOnly(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    seconds = {name: round(clock() - began[name], 1) for name, clock in CLOCKS.items()}
    began_evaluation = time.perf_counter()
    with trainer.evaluated_weights():
        results = Trainer.test(cfg, trainer.model)
    record = {
        "settings": settings.as_json(),
        "threads": torch.get_num_threads(),
        "iterations": iterations,
        "images_per_iteration": cfg.SOLVER.IMS_PER_BATCH,
        "seconds": seconds,
        "evaluation_seconds": round(time.perf_counter() - began_evaluation, 1),
        "torch": torch.__version__,
        "results": without_nan(results),
    }
    folder.write("training", record)
    return record
