"""Detectron2's DefaultTrainer with ConvMask's data, evaluators, checkpoints and training step."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

from convmask.checkpoint import Checkpointer
from convmask.data.loader import build_test_loader, build_train_loader
from convmask.engine.ema import AverageHook, ModelAverage
from convmask.engine.errors import ConfigError, errors_of_config, user_errors, without_logged_tracebacks
from convmask.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter, PreciseBN, RandomStates
from convmask.engine.lr_factors import apply_lr_factors
from convmask.engine.lr_schedule import build_lr_scheduler
from convmask.engine.model_options import distribute, prepare_model, training_precision
from convmask.engine.optimizer import build_optimizer, scale_learning_rate
from convmask.engine.progress import ProgressBar, on_terminal
from convmask.engine.step import TrainStep
from convmask.evaluation import build_evaluator
from convmask.inference import with_test_time_augmentation

logger = logging.getLogger(__name__)


def check_schedule(cfg: CfgNode) -> None:
    """Makes sure that there are iterations, and that their images can be shared out evenly.

    Raises:
        ConfigError: names the key and its value.
    """
    solver, processes = cfg.SOLVER, comm.get_world_size()
    for key in ("MAX_ITER", "ACCUMULATION_STEPS", "CHECKPOINT_PERIOD"):
        if solver[key] < 1:
            raise ConfigError(f"SOLVER.{key} is {solver[key]}; it has to be at least 1")
    if solver.CHECKPOINTS_TO_KEEP < 0:
        raise ConfigError(f"SOLVER.CHECKPOINTS_TO_KEEP is {solver.CHECKPOINTS_TO_KEEP}; it has to be 0 (all) or more")
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % (processes * solver.ACCUMULATION_STEPS):
        passes = f" times SOLVER.ACCUMULATION_STEPS ({solver.ACCUMULATION_STEPS})" * (solver.ACCUMULATION_STEPS > 1)
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, no multiple of the number of processes "
            f"({processes}){passes}"
        )


def scale_with_processes(cfg: CfgNode) -> CfgNode:
    """Scales batch, learning rate and schedule with the processes, if ``SOLVER.REFERENCE_WORLD_SIZE`` asks for it.

    Returns:
        ``cfg`` if nothing is to be scaled, else a copy: see Detectron2's ``DefaultTrainer.auto_scale_workers``.

    Raises:
        ConfigError: the config's batch cannot be shared out among so many, or both references are set.
    """
    solver = cfg.SOLVER
    reference = solver.REFERENCE_WORLD_SIZE
    if reference and solver.REFERENCE_IMS_PER_BATCH:
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} and SOLVER.REFERENCE_IMS_PER_BATCH "
            f"{solver.REFERENCE_IMS_PER_BATCH} both scale the learning rate: set one of them"
        )
    if reference < 0 or (reference and solver.IMS_PER_BATCH % reference):
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}; it has to be 0 or a number of processes that share "
            f"SOLVER.IMS_PER_BATCH ({solver.IMS_PER_BATCH}) evenly"
        )
    return DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())


class Trainer(DefaultTrainer):
    """Trains and evaluates any method from a config, on CUDA or on the CPU, with either version of Detectron2.

    A run that was interrupted and is resumed goes on as if nothing had happened: see docs/training.md.

    Attributes:
        checkpointer: writes model, average, optimizer, schedule, random states and iteration into ``cfg.OUTPUT_DIR``.
        average: the moving average of the model, or None without ``SOLVER.EMA``.
        model, optimizer, scheduler, cfg, start_iter, max_iter: as in Detectron2.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Builds everything that training needs; nothing is loaded yet.

        Args:
            cfg: complete, see :func:`convmask.engine.setup`.

        Raises:
            ConfigError: a value from which nothing can be built; the message names it.
        """
        # DefaultTrainer.__init__ would build Detectron2's step and checkpointer, and its DDP fails on the CPU.
        TrainerBase.__init__(self)
        cfg = scale_with_processes(cfg)
        check_schedule(cfg)
        with errors_of_config("the training"):
            self.cfg = cfg = scale_learning_rate(cfg)
            model = self.build_model(cfg)
            prepare_model(cfg, model)
            optimizer = self.build_optimizer(cfg, model)
            data_loader = self.build_train_loader(cfg)
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
            self.average = ModelAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
            precision = training_precision(cfg)
        unused = cfg.SOLVER.FIND_UNUSED_PARAMETERS
        self._trainer = TrainStep(
            distribute(model, find_unused_parameters=unused),
            data_loader,
            optimizer,
            precision=precision,
            passes=cfg.SOLVER.ACCUMULATION_STEPS,
            every_parameter=comm.get_world_size() > 1 and not unused,
        )
        self._random_states = RandomStates()
        state: dict[str, Any] = {"trainer": weakref.proxy(self), "random_states": self._random_states}
        if self.average is not None:
            state["ema_model"] = self.average
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, policy="finetune", **state)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes the run in ``OUTPUT_DIR`` if asked to and it has a checkpoint; otherwise begins one.

        All processes read the checkpoint that the first one names. A run that begins, in a folder with checkpoints of
        an earlier one, makes ``last_checkpoint`` its own.

        Raises:
            CheckpointError: the checkpoint, or ``MODEL.WEIGHTS``, cannot be read or does not fit.
        """
        last = self.checkpointer.get_checkpoint_file() if resume and self.checkpointer.has_checkpoint() else ""
        last = comm.all_gather(last)[0]
        if last:
            self.checkpointer.load(last, policy="strict")
            # The stored iteration is one that is done.
            self.start_iter = self.iter + 1
            return
        self.checkpointer.forget_last_checkpoint()
        self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])

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

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Detectron2's, of the model's views together where ``TEST.AUG.ENABLED`` asks for them."""
        return super().test(cfg, with_test_time_augmentation(cfg, model), evaluators)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks in its order, with ours in place of some, and the live bar on a terminal."""
        cfg = self.cfg
        states = self._random_states
        result: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if comm.is_main_process() and on_terminal():
            # After the timer and the schedule, whose numbers it shows; before the evaluation, which takes long.
            result.append(ProgressBar())
        result.append(self._precise_bn())
        if self.average is not None:
            result.append(AverageHook(self.average))
        # Detectron2 saves before it evaluates, so that what an evaluation fails on is not lost.
        result.append(
            PeriodicCheckpointer(
                self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, states, keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP
            )
        )
        result.append(
            EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate_and_keep, self.checkpointer, states, cfg.TEST.BEST_METRIC)
        )
        if comm.is_main_process():
            result.append(PeriodicWriter(self.build_writers(), cfg.OUTPUT_DIR, period=20))
        result.append(states)
        return result

    def _precise_bn(self) -> HookBase | None:
        options = self.cfg.TEST.PRECISE_BN
        if not options.ENABLED or not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # it would have to start workers at every evaluation
        return PreciseBN(self.cfg.TEST.EVAL_PERIOD, self.model, self.build_train_loader(cfg), options.NUM_ITER)

    def _evaluate_and_keep(self) -> Any:
        self._last_eval_results = self.evaluate()
        return self._last_eval_results

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated: the average with ``SOLVER.EMA``, else its own.

        Running statistics are those of the first process, in every process, as a checkpoint holds them.
        """
        if comm.get_world_size() > 1:
            with torch.no_grad():
                for buffer in self.checkpointer.model.buffers():
                    torch.distributed.broadcast(buffer, src=0)
        if self.average is None:
            yield
            return
        logger.info("The moving average of the weights is evaluated (SOLVER.EMA)")
        with self.average.applied():
            yield

    def evaluate(self) -> Any:
        """Evaluates the model as it is now on ``DATASETS.TEST``; returns the results in the main process."""
        with self.evaluated_weights():
            return self.test(self.cfg, self.model)

    def train(self) -> Any:
        """Runs all iterations from ``start_iter`` on; returns the last evaluation's results, if there was one."""
        with without_logged_tracebacks():
            try:
                return super().train()
            except user_errors():
                last = self.checkpointer.get_checkpoint_file()
                if last and comm.is_main_process():
                    logger.info("%s is complete: --resume goes on from there", last)
                raise

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
