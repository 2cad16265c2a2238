"""The configs of this method, and its keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FULL = sorted(path.stem for path in (CONFIGS / "FCIS").glob("fcis*.yaml"))
NODE = "MODEL.FCIS"


def read(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def parameters(cfg: CfgNode) -> int:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


@pytest.mark.parametrize("name", FULL)
def test_full_configs_load(name: str) -> None:
    cfg = read(CONFIGS / "FCIS" / f"{name}.yaml")
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    assert f"output/{name}" == cfg.OUTPUT_DIR
    assert ("voc" in name) == (cfg.MODEL.ROI_HEADS.NUM_CLASSES == 20)
    assert ("chainercv" in name) == (cfg.MODEL.FCIS.CONVENTION == "chainercv")
    if "voc" in name:
        set_class_counts(cfg)


@pytest.mark.parametrize("name", ["fcis_R_50_coco_ohem", "fcis_R_152_coco_ohem", "fcis_R_50_FPN_coco"])
def test_models_can_be_built(name: str) -> None:
    assert parameters(read(CONFIGS / "FCIS" / f"{name}.yaml")) > 29e6


def test_the_voc_model_has_the_released_size() -> None:
    """51.9 million with the half of the box maps that is never trained, and with batch normalisation's weights."""
    cfg = read(CONFIGS / "FCIS" / "fcis_R_101_voc.yaml")
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    assert parameters(cfg) + 4 * 49 * 1025 == pytest.approx(51.9e6, rel=2e-3)


@pytest.mark.parametrize("name", ["fcis_synthetic", "fcis_nuclei", "fcis_fpn_synthetic"])
def test_quick_configs_load(name: str) -> None:
    assert parameters(read(CONFIGS / "quick" / f"{name}.yaml")) < 8e6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{NODE}.CONVENTION", "caffe"), "CONVENTION 'caffe' is not one of mxnet, chainercv"),
        ((f"{NODE}.OUTPUT_STRIDE", 7), "OUTPUT_STRIDE is 7"),
        ((f"{NODE}.GROUP_SIZE", 30), "GROUP_SIZE is 30, not from 1 to MASK_SIZE"),
        ((f"{NODE}.ROUNDS", 3), "ROUNDS 3 is not one of 1, 2"),
        ((f"{NODE}.PASTE", "cv2"), "PASTE 'cv2' is not one of release, detectron2"),
        ((f"{NODE}.VOTING.PROCEDURE", "tpu"), "VOTING.PROCEDURE 'tpu' is not one of gpu, cpu"),
        (("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), "FCIS needs 'FCISROIHeads'"),
        (("MODEL.ROI_HEADS.IN_FEATURES", ["p3"]), r"IN_FEATURES is \['p3'\], but build_fcis_narrow"),
        (("INPUT.TARGETS", ("sem_seg",)), "FCIS needs 'instances'"),
        (
            ("MODEL.BACKBONE.NAME", "build_fcis_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
            "DEPTH is 18, not one of",
        ),
    ],
)
def test_contradictions_are_named(small_cfg: Callable[..., CfgNode], overrides: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg(*overrides))


def test_every_key_is_explained_in_the_line_above(repository: Path) -> None:
    lines = (repository / "projects" / "FCIS" / "fcis" / "config.py").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"    [\w.]+\.[A-Z_]+ = (?!CfgNode)", line)]
    assert len(keys) > 20
    assert all(lines[index - 1].startswith("    # ") for index in keys)


def test_every_key_is_read(repository: Path) -> None:
    folder = repository / "projects" / "FCIS" / "fcis"
    keys = re.findall(r"^    \w+\.([A-Z_]+) = (?!CfgNode)", (folder / "config.py").read_text(), re.MULTILINE)
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "config.py")
    assert not [key for key in keys if f".{key}" not in code]
