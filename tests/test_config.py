"""All configs in configs/ and all keys of ours, whichever methods are present."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ALL = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


def read(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


@pytest.mark.parametrize("name", ALL)
def test_every_config_loads(name: str) -> None:
    cfg = read(name)
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    assert all(step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS) or "Cosine" in cfg.SOLVER.LR_SCHEDULER_NAME


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("quick/") and "Base" not in name])
def test_every_quick_model_runs(name: str) -> None:
    cfg = read(name)
    set_class_counts(cfg)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    with torch.no_grad():
        result = model([{"image": torch.randint(0, 256, (3, 96, 100), dtype=torch.uint8)}])[0]
    assert result.keys() & {"instances", "sem_seg", "panoptic_seg"}


def keys(node: CfgNode, prefix: str = "") -> set[str]:
    """Dotted keys of all values."""
    found = set()
    for name, value in node.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {f"{prefix}{name}"}
    return found


def test_every_key_of_ours_is_read(repository: Path) -> None:
    added = keys(get_cfg()) - keys(get_detectron2_cfg())
    assert added
    sources = [*repository.glob("convmask/**/*.py"), *repository.glob("projects/*/*/*.py"), repository / "train_net.py"]
    code = "\n".join(path.read_text() for path in sources if path.name != "config.py")
    unread = [key for key in added if not re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", code)]
    assert not unread
