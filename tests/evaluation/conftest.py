from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from convmask.data.panoptic import register_panoptic

from .oracle import CATEGORIES, draw_segments, write_panoptic_set

PanopticImages = list[tuple[np.ndarray, list[dict[str, Any]]]]


@pytest.fixture
def registered() -> Iterator[Callable[[str], str]]:
    """``registered(name)`` removes the dataset from Detectron2's catalogs after the test; returns the name."""
    names: list[str] = []

    def remember(name: str) -> str:
        names.append(name)
        return name

    yield remember
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


@pytest.fixture
def small_set(tmp_path: Path, registered: Callable[[str], str]) -> tuple[str, Path, PanopticImages]:
    """A registered panoptic set of five random images, the second without any segment: name, root, images."""
    rng = np.random.default_rng(3)
    images = [draw_segments(rng, (40 + 3 * i, 50 - 2 * i), 6, 2**24 - 1, crowds=True) for i in range(5)]
    images[1] = (np.zeros_like(images[1][0]), [])
    write_panoptic_set(tmp_path / "set", images, CATEGORIES)
    name = registered("small_panoptic_set")
    root = tmp_path / "set"
    register_panoptic(name, root / "images", root / "panoptic.json", root / "panoptic")
    return name, root, images
