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
FULL = sorted(path.stem for path in (CONFIGS / "PanopticFCN").glob("panoptic_fcn*.yaml"))
NODE = "MODEL.PANOPTIC_FCN"


def read(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def parameters(cfg: CfgNode) -> int:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


def test_all_released_variants_are_there() -> None:
    released = [f"panoptic_fcn_R_50_{name}" for name in ("1x", "400_3x", "512_3x", "600_3x", "3x")]
    released.append("panoptic_fcn_star_R_50_3x")
    assert {*released, *(f"{name}_fast" for name in released)} < set(FULL)


@pytest.mark.parametrize("name", FULL)
def test_full_configs_load(name: str) -> None:
    cfg = read(CONFIGS / "PanopticFCN" / f"{name}.yaml")
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    if "mapillary" not in name:
        # the classes of Mapillary Vistas are in its files alone
        set_class_counts(cfg)
    assert f"output/{name}" == cfg.OUTPUT_DIR
    fast = name.endswith("_fast")
    if "cityscapes" not in name and "mapillary" not in name:
        thresholds = cfg.MODEL.PANOPTIC_FCN.INFERENCE.THING_THRESH, cfg.MODEL.PANOPTIC_FCN.INFERENCE.STUFF_THRESH
        assert thresholds == ((0.2, 0.1) if fast else (0.05, 0.05))


@pytest.mark.parametrize(("name", "millions"), [("R_50_3x", 37.00), ("star_R_50_3x", 38.84)])
def test_models_have_the_released_size(name: str, millions: float) -> None:
    """Parameters; the frozen batch normalisation's are buffers."""
    count = parameters(read(CONFIGS / "PanopticFCN" / f"panoptic_fcn_{name}.yaml")) / 1e6
    assert count == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", ["R_50_cityscapes", "star_R_50_mapillary"])
def test_models_of_other_datasets_can_be_built(name: str) -> None:
    assert parameters(read(CONFIGS / "PanopticFCN" / f"panoptic_fcn_{name}.yaml")) > 30e6


@pytest.mark.parametrize("name", ["panoptic_fcn_synthetic", "panoptic_fcn_nuclei"])
def test_quick_configs_load(name: str) -> None:
    cfg = read(CONFIGS / "quick" / f"{name}.yaml")
    cfg.MODEL.PANOPTIC_FCN.NUM_CLASSES = 1
    assert parameters(cfg) < 8e6


@pytest.mark.parametrize(
    ("layout", "with_things", "expected"),
    [("separated", True, (8, 12)), ("separated", False, (8, 11)), ("all", True, (8, 19))],
)
def test_class_counts_follow_from_the_dataset(
    small_cfg: Callable[..., CfgNode], layout: str, with_things: bool, expected: tuple[int, int]
) -> None:
    cfg = small_cfg("INPUT.SEMANTIC_LAYOUT", layout, f"{NODE}.STUFF.WITH_THINGS", with_things)
    cfg.DATASETS.TRAIN = ("convmask_cityscapes_train_panoptic",)
    node = cfg.MODEL.PANOPTIC_FCN
    node.NUM_CLASSES, node.STUFF.NUM_CLASSES = 80, 54
    set_class_counts(cfg)
    assert expected == (node.NUM_CLASSES, node.STUFF.NUM_CLASSES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{NODE}.TARGETS.CENTER", "median"), "TARGETS.CENTER 'median' is not one of mass, box"),
        ((f"{NODE}.STUFF.KERNEL_AVERAGE", "max"), "KERNEL_AVERAGE 'max' is not one of map, region"),
        ((f"{NODE}.IN_FEATURES", ["p3", "p4"]), "5 ranges for the 2 levels"),
        (("MODEL.BACKBONE.NAME", "build_narrow_resnet_fpn_backbone"), "build_resnet_fpn_p7_backbone for p6 and p7"),
        ((f"{NODE}.STUFF.WITH_THINGS", False, "INPUT.SEMANTIC_LAYOUT", "all"), "set it to 'separated'"),
        ((f"{NODE}.INFERENCE.TRUE_CLASSES", True), "need INPUT.TARGETS_IN_TEST"),
        (("INPUT.TARGETS", ("instances",)), "needs 'sem_seg' in INPUT.TARGETS"),
        ((f"{NODE}.NUM_KERNELS", 0), "NUM_KERNELS must be 1 or more"),
    ],
)
def test_contradictions_are_named(small_cfg: Callable[..., CfgNode], overrides: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg(*overrides))


def test_every_key_is_explained_in_the_line_above(repository: Path) -> None:
    lines = (repository / "projects" / "PanopticFCN" / "panoptic_fcn" / "config.py").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"    [\w.]+\.[A-Z_]+ = (?!CfgNode)", line)]
    assert len(keys) > 30
    assert all(lines[index - 1].startswith("    # ") for index in keys)
