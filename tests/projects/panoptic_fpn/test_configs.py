"""The configs of this method, and its keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import convmask.data  # noqa: F401
from convmask.config import add_convmask_config, get_cfg
from convmask.data.class_counts import set_class_counts

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FULL = sorted(path.name for path in (CONFIGS / "PanopticFPN").glob("*.yaml"))


def read(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


@pytest.mark.parametrize("name", FULL)
def test_full_configs_load(name: str) -> None:
    cfg = read(CONFIGS / "PanopticFPN" / name)
    assert cfg.MODEL.META_ARCHITECTURE == "ConvMaskPanopticFPN"
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    assert cfg.SOLVER.STEPS[-1] < cfg.SOLVER.MAX_ITER
    set_class_counts(cfg)
    # the targets are those of the branches
    expected = {"panoptic": ("instances", "sem_seg"), "instance": ("instances",), "semantic": ("sem_seg",)}
    assert tuple(cfg.INPUT.TARGETS) == expected[cfg.MODEL.PANOPTIC_FPN.TASK]


@pytest.mark.parametrize("name", [name for name in FULL if "Base" not in name and "dconv" not in name])
def test_full_models_can_be_built(name: str) -> None:
    cfg = read(CONFIGS / "PanopticFPN" / name)
    set_class_counts(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert (model.roi_heads is None) == name.startswith("semantic")
    assert (model.sem_seg_head is None) == name.startswith("instance")


@pytest.mark.parametrize("name", ["panoptic_fpn_R_50_1x.yaml", "panoptic_fpn_X_101_32x8d_3x.yaml"])
def test_parameters_are_detectron2s(name: str) -> None:
    """Names and shapes of a model-zoo file."""
    cfg = read(CONFIGS / "PanopticFPN" / name)
    cfg.MODEL.DEVICE = "meta"
    shapes = []
    for architecture, head in (("PanopticFPN", "SemSegFPNHead"), ("ConvMaskPanopticFPN", "PanopticFPNSemSegHead")):
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = architecture, head
        with torch.device("meta"):
            shapes.append({key: tuple(value.shape) for key, value in build_model(cfg).state_dict().items()})
    assert shapes[0] == shapes[1]
    assert shapes[1]["sem_seg_head.predictor.weight"] == (54, 128, 1, 1)


def test_deformable_model_can_be_built() -> None:
    cfg = read(CONFIGS / "PanopticFPN" / "panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml")
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except ImportError as error:
        pytest.skip(f"its layers are Detectron2's: {error}")
    deformable = [m for m in model.modules() if type(m).__name__ == "DeformConv"]
    assert len(deformable) == 4 + 23 + 3
    assert len(model.roi_heads.box_predictor) == 3


@pytest.mark.parametrize("leaf", ["panoptic_fpn_R_50_1x", "panoptic_fpn_R_50_3x", "panoptic_fpn_R_101_3x"])
def test_same_values_as_the_zoos_config(leaf: str) -> None:
    try:
        path = model_zoo.get_config_file(f"COCO-PanopticSegmentation/{leaf}.yaml")
    except RuntimeError:
        pytest.skip("this installation of Detectron2 has no model-zoo configs")
    zoo, ours = read(Path(path)), read(CONFIGS / "PanopticFPN" / f"{leaf}.yaml")
    assert zoo.MODEL.META_ARCHITECTURE == "PanopticFPN"
    for cfg in (zoo, ours):
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.SEM_SEG_HEAD.NAME = ""
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    assert ours.dump() == zoo.dump()


def test_every_key_is_explained_in_the_line_above(repository: Path) -> None:
    lines = (repository / "projects" / "PanopticFPN" / "panoptic_fpn" / "config.py").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"    node\.[A-Z_]+ = ", line)]
    assert keys
    assert all(lines[index - 1].startswith("    # ") for index in keys)


def test_our_keys_extend_detectron2s_node(small_cfg: Callable[..., CfgNode]) -> None:
    from detectron2.config import get_cfg as get_detectron2_cfg

    cfg = get_detectron2_cfg()
    before = dict(cfg.MODEL.PANOPTIC_FPN)
    add_convmask_config(cfg)
    from convmask.projects.panoptic_fpn import add_panoptic_fpn_config

    add_panoptic_fpn_config(cfg)
    assert before.items() <= dict(cfg.MODEL.PANOPTIC_FPN).items()
    assert {"TASK", "TRAINING", "AGGREGATION"} <= set(cfg.MODEL.PANOPTIC_FPN)
