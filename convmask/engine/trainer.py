"""Detectron2's DefaultTrainer with ConvMask's data, evaluators, checkpoints and training step."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.engine.hooks import EvalHook as DetectronEvalHook
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.utils.data import DataLoader

from convmask.checkpoint import Checkpointer
from convmask.data.loader import build_test_loader, build_train_loader
from convmask.engine.errors import ConfigError, errors_of_config, without_logged_tracebacks
from convmask.engine.hooks import EvalHook
from convmask.engine.lr_factors import apply_lr_factors
from convmask.engine.lr_schedule import build_lr_scheduler
from convmask.engine.optimizer import build_optimizer
from convmask.engine.progress import ProgressBar, on_terminal
from convmask.engine.step import TrainStep
from convmask.evaluation import build_evaluator


def distribute(model: nn.Module) -> nn.Module:
    """Wraps ``model`` for training in several processes; returns it as it is where there is one."""
    if next(model.parameters()).device.type == "cpu":
        # DistributedDataParallel refuses device ids, Detectron2's default, for a model on the CPU.
        return create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    return create_ddp_model(model, broadcast_buffers=False)


def check_schedule(cfg: CfgNode) -> None:
    """Makes sure that there are iterations, and that their images can be shared out evenly.

    Raises:
        ConfigError: names the key and its value.
    """
    processes = comm.get_world_size()
    if cfg.SOLVER.MAX_ITER < 1:
        raise ConfigError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: there is nothing to train")
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, no multiple of the number of processes, {processes}"
        )


class Trainer(DefaultTrainer):
    """Trains and evaluates any method from a config, on CUDA or on the CPU, with either version of Detectron2.

    Attributes:
        checkpointer: writes model, optimizer, schedule and iteration into ``cfg.OUTPUT_DIR``.
        model, optimizer, scheduler, cfg, start_iter, max_iter: as in Detectron2.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Builds everything that training needs; nothing is loaded yet.

        Args:
            cfg: complete, see :func:`convmask.engine.setup`.

        Raises:
            ConfigError: a value from which nothing can be built; the message names it.
        """
        check_schedule(cfg)
        # DefaultTrainer.__init__ would build Detectron2's step and checkpointer, and its DDP fails on the CPU.
        TrainerBase.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        with errors_of_config("the training"):
            model = self.build_model(cfg)
            optimizer = self.build_optimizer(cfg, model)
            data_loader = self.build_train_loader(cfg)
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._trainer = TrainStep(distribute(model), data_loader, optimizer, amp=cfg.SOLVER.AMP.ENABLED)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, policy="finetune", trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device, described in the log.

        Raises:
            ConfigError: no model can be built from this config; the message says why.
        """
        with errors_of_config("the model"):
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`convmask.engine.optimizer.build_optimizer`, and ``lr_factors`` for rates of single parameters."""
        optimizer = build_optimizer(cfg, model)
        apply_lr_factors(optimizer)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """See :func:`convmask.engine.lr_schedule.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """See :func:`convmask.data.loader.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader[Any]:
        """See :func:`convmask.data.loader.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluators:
        """The evaluators that fit the data set, writing into ``<OUTPUT_DIR>/inference`` by default."""
        return build_evaluator(cfg, dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, and the live bar if standard output is a terminal."""
        hooks: list[HookBase | None] = [
            EvalHook(hook._period, hook._func) if isinstance(hook, DetectronEvalHook) else hook
            for hook in super().build_hooks()
        ]
        if comm.is_main_process() and on_terminal():
            # After the timer and the schedule, whose numbers it shows; before the evaluation, which takes long.
            hooks.insert(2, ProgressBar())
        return hooks

    def train(self) -> Any:
        """Runs all iterations from ``start_iter`` on; returns the last evaluation's results, if there was one."""
        with without_logged_tracebacks():
            return super().train()

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's: metric lines in the log, ``metrics.json``, TensorBoard files, all in ``OUTPUT_DIR``."""
        PathManager.mkdirs(self.cfg.OUTPUT_DIR)
        return super().build_writers()

    def state_dict(self) -> dict[str, Any]:
        """The iteration, the state of the hooks and, which Detectron2 0.5 leaves out, of the optimizer."""
        state = super().state_dict()
        state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` holds."""
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
