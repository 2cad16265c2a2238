"""From what the user says about a model to a config that predicts, and a picture of what it predicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata

import convmask.data  # noqa: F401  registers the built-in data sets
from convmask.data.config_datasets import register_datasets_of
from convmask.data.errors import DatasetError
from convmask.engine.config_files import load_config, merge_options
from convmask.engine.defaults import prepare
from convmask.engine.errors import ConfigError
from convmask.visualization import draw_prediction

logger = logging.getLogger(__name__)

# Where the methods keep the least score of an object.
_THRESHOLD_KEYS = (
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
)

# Where the weights lie that a training begins with: those of a backbone alone.
_BACKBONES = (
    "://ImageNetPretrained/",
    "/detectron2/ImageNetPretrained/",
    "download.openmmlab.com/pretrain/",
    "SwinTransformer/storage/",
)


def has_weights(cfg: CfgNode) -> bool:
    """Whether ``MODEL.WEIGHTS`` names those of a whole model: a config for training names a backbone's."""
    return bool(cfg.MODEL.WEIGHTS) and not any(place in cfg.MODEL.WEIGHTS for place in _BACKBONES)


def demo_config(
    config_file: str, weights: str = "", confidence_threshold: float | None = 0.5, opts: Sequence[str] = ()
) -> CfgNode:
    """The config of a model that predicts.

    Args:
        config_file: a file, a path below ``configs``, or a name of Detectron2's model zoo.
        weights: a checkpoint. By default the zoo's own for a name of the zoo, else the config's ``MODEL.WEIGHTS``.
        confidence_threshold: least score of an object, 0 to 1; None leaves those of the config.
        opts: ``KEY VALUE ...``, merged last.

    Returns:
        The complete config, frozen.

    Raises:
        ConfigError: a wrong config, or no weights.
    """
    if confidence_threshold is not None and not 0 <= confidence_threshold <= 1:
        raise ConfigError(f"the confidence threshold is {confidence_threshold}, not between 0 and 1")
    cfg = load_config(config_file)
    cfg.MODEL.WEIGHTS = weights or _zoo_weights(config_file) or cfg.MODEL.WEIGHTS
    if confidence_threshold is not None:
        cfg.merge_from_list([item for key in _THRESHOLD_KEYS for item in (key, float(confidence_threshold))])
    merge_options(cfg, opts)
    if not has_weights(cfg):
        raise ConfigError(f"the config {config_file} names no weights of a whole model: give --weights FILE")
    register_datasets_of(cfg)
    # A file of one's own trains on sets that this process need not know; the names of the classes are then not known.
    for key in ("TRAIN", "TEST"):
        cfg.DATASETS[key] = tuple(name for name in cfg.DATASETS[key] if name in DatasetCatalog.list())
    cfg.SOLVER.AMP.ENABLED = False
    try:
        prepare(cfg)
    except DatasetError as error:
        logger.warning("class counts are those of the config: %s", error)
    cfg.freeze()
    return cfg


def _zoo_weights(config_file: str) -> str:
    try:
        # Needs pkg_resources, which recent versions of setuptools lack.
        from detectron2 import model_zoo

        return str(model_zoo.get_checkpoint_url(config_file))
    except (ImportError, RuntimeError):  # RuntimeError: no name of the zoo
        return ""


def draw(
    image: np.ndarray,
    prediction: Mapping[str, Any],
    metadata: Metadata,
    threshold: float = 0.0,
    scale: int | None = None,
) -> np.ndarray:
    """Draws a prediction on its BGR image (H, W, 3) uint8; the picture is RGB, small images are enlarged."""
    return draw_prediction(image[:, :, ::-1], prediction, metadata, threshold=threshold, scale=scale)
