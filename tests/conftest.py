"""What tests of every part use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CONVMASK_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden("panoptic_fpn")`` reads outputs of the original implementation; skips the test where they are not at hand."""

    def read(name: str) -> dict[str, np.ndarray]:
        path = SHARED / "golden" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no golden file {path.name}: set CONVMASK_SHARED to the folder that holds golden/")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def dataset_root() -> Callable[[str], Path]:
    """``dataset_root("nuclei")`` is the folder of real data; skips the test where it is not at hand."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("DETECTRON2_DATASETS", SHARED / "datasets")) / name
        if not path.is_dir():
            pytest.skip(f"no dataset {name}: set DETECTRON2_DATASETS to the folder that holds it")
        return path

    return find
