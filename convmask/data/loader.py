"""Data loaders: Detectron2's, with the mapper that reads what ConvMask's datasets hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from torch.utils.data import DataLoader

from convmask.data.errors import DatasetError
from convmask.data.mapper import PanopticDatasetMapper

Mapper = Callable[[dict[str, Any]], Any]


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> Any:
    """An endless stream of shuffled batches of ``DATASETS.TRAIN``.

    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` leaves out images without instances only where ``INPUT.TARGETS`` asks for
    instances.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH (of all processes).
        mapper: in the place of ``PanopticDatasetMapper(cfg, True)``.

    Returns:
        An iterable of lists of dicts, as :class:`PanopticDatasetMapper` returns them.

    Raises:
        KeyError, DatasetError: a dataset is not registered, cannot be read, or has no image left.
    """
    mapper = mapper or PanopticDatasetMapper(cfg, True)
    if "instances" not in cfg.INPUT.TARGETS:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    try:
        return build_detection_train_loader(cfg, mapper=mapper)
    except AssertionError as error:
        if "No valid data" not in str(error):
            raise
        raise DatasetError(
            f"datasets {', '.join(cfg.DATASETS.TRAIN)}: no image has an instance, and "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out those without"
        ) from error


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None) -> DataLoader[Any]:
    """All images of a dataset once, in order, one in a batch.

    Args:
        cfg: DATALOADER, INPUT.
        dataset_name: a registered dataset.
        mapper: in the place of ``PanopticDatasetMapper(cfg, False)``.

    Returns:
        A loader of lists of one dict, as :class:`PanopticDatasetMapper` returns them.

    Raises:
        KeyError, DatasetError: the dataset is not registered, or cannot be read.
    """
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper or PanopticDatasetMapper(cfg, False))
