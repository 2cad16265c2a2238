"""What tests of every part use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CONVMASK_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """``load_script("tools/compare.py")`` imports a program that is in no package."""

    def load(path: str) -> ModuleType:
        name = "convmask_script_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden("panoptic_fpn")`` reads outputs of the original implementation; skips the test without them."""

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


@pytest.fixture(scope="session")
def few_images() -> str:
    """The name of a registered panoptic set of four synthetic images."""

    from detectron2.data import DatasetCatalog

    from convmask.data.panoptic import register_panoptic_records
    from convmask.data.synthetic import CATEGORIES, load_records

    name = "few_synthetic_images"
    if name not in DatasetCatalog.list():
        register_panoptic_records(name, CATEGORIES, lambda: load_records("panoptic_val")[:4])
    return name


@pytest.fixture
def tiny_options(few_images: str, tmp_path: Path) -> list[str]:
    """Options that shrink ``configs/quick/panoptic_fpn_synthetic.yaml`` to seconds, on ``few_images``."""
    return [
        *("DATASETS.TRAIN", f"('{few_images}',)", "DATASETS.TEST", f"('{few_images}',)"),
        *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SEED", "1"),
        *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A headless Chromium of Playwright; skips the test where no browser is installed.

    For one test only: while Playwright runs, its event loop is that of the thread, and nothing else can start one.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
