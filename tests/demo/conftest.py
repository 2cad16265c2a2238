"""The scripts of ``demo/`` and a model for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from convmask.engine import Trainer, load_config, prepare


@pytest.fixture(scope="session")
def script(load_script: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """``script("demo")`` imports ``demo/demo.py``."""
    return lambda name: load_script(f"demo/{name}.py")


@pytest.fixture
def model_folder(tiny_options: list[str], tmp_path: Path) -> Path:
    """A folder as a training leaves it: ``config.yaml`` and ``model_final.pth``, the weights still random."""
    cfg = load_config("quick/panoptic_fpn_synthetic.yaml", [*tiny_options, "OUTPUT_DIR", str(tmp_path / "model")])
    prepare(cfg)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    trainer = Trainer(cfg)
    trainer.checkpointer.save("model_final")
    return folder
