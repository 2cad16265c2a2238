"""``get_config_file``, ``get_config``, ``get_checkpoint_url`` and ``get``, meaning what they mean in Detectron2."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from torch import nn

from convmask.checkpoint import Checkpointer
from convmask.data.errors import DatasetError
from convmask.engine import ConfigError, load_config, prepare
from convmask.engine.config_files import configs_folder
from convmask.engine.errors import errors_of_config
from convmask.model_zoo.names import config_files, full_name, results_of

logger = logging.getLogger(__name__)


def get_config_file(name: str) -> str:
    """The path of a config.

    Args:
        name: below ``configs`` (``"PanopticFCN/panoptic_fcn_R_50_1x.yaml"``) or short (``"panoptic_fcn_R_50_1x"``).
            With the ending ``.py`` it is a LazyConfig, which some YAML files have beside them.

    Raises:
        ConfigError: there is none of that name; the message lists the most similar ones.
    """
    if name.endswith(".py"):
        path = configs_folder() / name.removeprefix("configs/")
        if not path.is_file():
            known = ", ".join(
                sorted(p.relative_to(configs_folder()).as_posix() for p in configs_folder().glob("*/*.py"))
            )
            raise ConfigError(f"no config {name!r} in ConvMask's model zoo; the LazyConfigs are {known}")
        return str(path)
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


def get_config(name: str, trained: bool = False) -> Any:
    """The config of a name, not frozen, before :func:`convmask.engine.prepare`; of a LazyConfig a DictConfig.

    Args:
        name: as of :func:`get_config_file`.
        trained: set ``MODEL.WEIGHTS`` to the published weights. Otherwise it is what the config begins training with.

    Raises:
        ConfigError: no such config; with ``trained``, no weights of it are known, or it is a LazyConfig.
    """
    path = get_config_file(name)
    if path.endswith(".py"):
        if trained:
            raise ConfigError(f"{name} is a LazyConfig of a model alone, without a place for trained weights")
        return _lazy_config(path)
    url = get_checkpoint_url(name) if trained else ""
    cfg = load_config(path)
    if trained:
        cfg.MODEL.WEIGHTS = url
    return cfg


def _lazy_config(path: str) -> Any:
    try:
        from detectron2.config import LazyConfig
    except ImportError as error:
        raise ConfigError(f"{path}: LazyConfigs need omegaconf and hydra-core ({error})") from error
    return LazyConfig.load(path)


def get(name: str, trained: bool = False, device: str | None = None, *, weights: str | None = None) -> nn.Module:
    """A model.

    Args:
        name: as of :func:`get_config_file`.
        trained: load the published weights. Otherwise, as in Detectron2, those that the config begins training with
            (a LazyConfig names none: random weights).
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
    if not isinstance(cfg, CfgNode):
        return _get_lazy(cfg, device, weights)
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


def _get_lazy(cfg: Any, device: str | None, weights: str | None) -> nn.Module:
    model: nn.Module = instantiate(cfg.model)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    Checkpointer(model, policy="strict").load(weights or "", checkpointables=[])
    return model
