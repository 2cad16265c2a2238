"""What every command does before it starts: read the config, choose the device, set class counts, set up logging."""

from __future__ import annotations

import argparse
import difflib
import logging
from itertools import zip_longest

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import convmask.data  # noqa: F401  registers the built-in data sets
from convmask.data.categories import SemanticCategories
from convmask.data.class_counts import categories_of, set_class_counts
from convmask.data.config_datasets import register_datasets_of
from convmask.data.images import FORMATS
from convmask.data.user_modules import import_user_module
from convmask.engine.config_files import load_config
from convmask.engine.errors import ConfigError
from convmask.engine.model_options import training_precision
from convmask.engine.output_folder import claim_output_folder
from convmask.inference.augmentation import check_augmentation

logger = logging.getLogger(__name__)


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's command line, and ours.

    ``--debug`` gives tracebacks of errors that are otherwise said in one line, ``--import`` names a module that
    registers data sets, ``--dist-timeout`` is how long processes wait for each other.
    """
    parser = default_argument_parser(epilog)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module or file that registers data sets or parts of models; may be repeated",
    )
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="a process that has waited so long for the others ends the job (default: 1800)",
    )
    return parser


def choose_device(cfg: CfgNode) -> None:
    """Lets ``MODEL.DEVICE`` fall back to the CPU, in place, where there is no CUDA device, and says so in the log.

    Raises:
        ConfigError: there is no such device, or none for the precision that ``SOLVER.AMP`` asks for.
    """
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is no device: cpu, cuda or cuda:1") from error
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: this machine has {torch.cuda.device_count()} CUDA devices")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no CUDA device here: MODEL.DEVICE %s -> cpu", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    try:
        training_precision(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_dataset_names(cfg: CfgNode) -> None:
    """Makes sure that the data sets of the config are registered.

    Raises:
        ConfigError: one is not; the message names the most similar ones.
    """
    known = DatasetCatalog.list()
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
                raise ConfigError(f"DATASETS.{key}: no data set named {name!r} is registered{hint}")


def check_values(cfg: CfgNode) -> None:
    """Finds values that would be noticed late, or never.

    Raises:
        ConfigError: names the key and its value.
    """
    if cfg.INPUT.FORMAT not in FORMATS:
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, not one of {', '.join(FORMATS)}")
    try:
        check_augmentation(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_test_classes(cfg: CfgNode) -> None:
    """Makes sure that a model with the classes of ``DATASETS.TRAIN`` can be evaluated on ``DATASETS.TEST``.

    A set without things, or without stuff, is evaluated on what it has.

    Raises:
        ConfigError: a test set has other classes; the message names the first that differs.
        DatasetError: a data set is unreadable.
    """
    if not cfg.DATASETS.TRAIN:
        return
    trained = categories_of(cfg.DATASETS.TRAIN[0])
    for name in cfg.DATASETS.TEST:
        tested = categories_of(name)
        # The labels of semantic-only sets may be things and stuff together: they are stuff of another kind.
        same_kind = isinstance(trained, SemanticCategories) == isinstance(tested, SemanticCategories)
        for kind in ("things", "stuff") if same_kind else ("things",):
            ours, theirs = ([category.name for category in getattr(c, kind)] for c in (trained, tested))
            if ours and theirs and ours != theirs:
                differing = next((a, b) for a, b in zip_longest(ours, theirs) if a != b)
                raise ConfigError(
                    f"DATASETS.TEST: {name!r} has {len(theirs)} {kind} classes, {cfg.DATASETS.TRAIN[0]!r} of "
                    f"DATASETS.TRAIN has {len(ours)}; the first that differ are {differing[1]!r} and {differing[0]!r}"
                )


def prepare(cfg: CfgNode) -> None:
    """Completes a config in place: the device, and the class counts that follow from the data set.

    Raises:
        ConfigError: see :func:`choose_device`, :func:`check_dataset_names`, :func:`check_values` and
            :func:`check_test_classes`.
        DatasetError: class counts that contradict the data set, or a wrong ``DATASETS.REGISTER``.
    """
    register_datasets_of(cfg)
    choose_device(cfg)
    check_dataset_names(cfg)
    check_values(cfg)
    if cfg.MODEL.NUM_CLASSES_FROM_DATASET:
        set_class_counts(cfg)
        check_test_classes(cfg)


def setup(args: argparse.Namespace) -> CfgNode:
    """Makes the config of a command and sets up logging, seeds and the output folder as Detectron2 does.

    Args:
        args: of :func:`argument_parser`.

    Returns:
        The complete config, frozen.

    Raises:
        ConfigError, DatasetError: see :func:`prepare`, :func:`~convmask.engine.config_files.load_config`,
            :func:`~convmask.engine.output_folder.claim_output_folder` and ``import_user_module``; also for an empty
            ``OUTPUT_DIR``.
    """
    for module in getattr(args, "modules", []):
        import_user_module(module)
    cfg = load_config(args.config_file, args.opts or [])
    if not cfg.OUTPUT_DIR:
        raise ConfigError("OUTPUT_DIR is empty: name a folder")
    # Before anything is written there: another run's config and log are not to be touched.
    claim_output_folder(cfg.OUTPUT_DIR)
    # A full disk is told once, by what cannot be written and matters, not by each line of the log.
    logging.raiseExceptions = False
    args.config_file = ""  # Detectron2 would log the file without its bases; the full config follows anyway
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="convmask")
    prepare(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg
