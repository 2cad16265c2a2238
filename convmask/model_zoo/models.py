"""``get_config_file``, ``get_config``, ``get_checkpoint_url`` and ``get``, meaning what they mean in Detectron2."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from convmask.checkpoint import Checkpointer
from convmask.data.errors import DatasetError
from convmask.engine import ConfigError, load_config, prepare
from convmask.engine.errors import errors_of_config
from convmask.model_zoo.names import config_files, full_name, results_of

logger = logging.getLogger(__name__)


def get_config_file(name: str) -> str:
    """The path of a config.

    Args:
        name: below ``configs`` (``"PanopticFCN/panoptic_fcn_R_50_1x.yaml"``) or short (``"panoptic_fcn_R_50_1x"``).

    Raises:
        ConfigError: there is none of that name; the message lists the most similar ones.
    """
    return str(config_files()[full_name(name)])


def get_checkpoint_url(name: str) -> str:
    """Where the trained weights of a config are.

    Raises:
        ConfigError: no such config, or no weights of it are published in a place that is known here.
    """
    known = full_name(name)
    url = results_of(known).get("weights")
    if not url:
        raise ConfigError(
            f"no trained weights of {known} are known: ConvMask publishes none of its own, and those of the method's "
            "authors have to be downloaded by hand; give the path of a checkpoint (weights=...)"
        )
    return str(url)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of a name, not frozen, before :func:`convmask.engine.prepare`.

    Args:
        name: as of :func:`get_config_file`.
        trained: set ``MODEL.WEIGHTS`` to the published weights. Otherwise it is what the config begins training with.

    Raises:
        ConfigError: no such config; with ``trained``, no weights of it are known.
    """
    path = get_config_file(name)
    url = get_checkpoint_url(name) if trained else ""
    cfg = load_config(path)
    if trained:
        cfg.MODEL.WEIGHTS = url
    return cfg


def get(name: str, trained: bool = False, device: str | None = None, *, weights: str | None = None) -> nn.Module:
    """A model.

    Args:
        name: as of :func:`get_config_file`.
        trained: load the published weights. Otherwise, as in Detectron2, those that the config begins training with.
        device: ``MODEL.DEVICE``; by default the config's, the CPU where there is no CUDA device.
        weights: a checkpoint of the whole model instead, which has to fit; "" for random initial weights.

    Returns:
        The model in training mode, as in Detectron2. It takes Detectron2's list of dicts.

    Raises:
        ConfigError: no such config or device; ``trained`` and no weights known; ``trained`` together with ``weights``.
        CheckpointError: the weights cannot be read, or do not fit.
    """
    if trained and weights is not None:
        raise ConfigError(f"{name}: trained=True and weights={weights!r} exclude each other")
    cfg = get_config(name, trained)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    try:
        prepare(cfg)
    except DatasetError as error:
        logger.warning("class counts are those of the config: %s", error)
    with errors_of_config("the model"):
        model = build_model(cfg)
    whole = trained or weights is not None
    Checkpointer(model, policy="strict" if whole else "finetune", average=cfg.SOLVER.EMA.ENABLED).load(
        cfg.MODEL.WEIGHTS, checkpointables=[]
    )
    return model
