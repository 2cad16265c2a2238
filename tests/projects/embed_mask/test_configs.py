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
FULL = [f"{v}_{name}" for v in ("v0", "v1", "v2") for name in ("R_50_1x", "R_101_1x", "R_101_ms_3x")]
NODE = "MODEL.EMBED_MASK"


def read(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def parameters(cfg: CfgNode) -> int:
    """Those that are trained."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters() if p.requires_grad)


def test_no_config_is_forgotten() -> None:
    found = {path.stem for path in (CONFIGS / "EmbedMask").glob("embed_mask*.yaml")}
    assert found == {f"embed_mask_{name}" for name in FULL}


@pytest.mark.parametrize("name", FULL)
def test_full_configs_load(name: str) -> None:
    cfg = read(CONFIGS / "EmbedMask" / f"embed_mask_{name}.yaml")
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    assert f"output/embed_mask_{name}" == cfg.OUTPUT_DIR
    assert (101 if "101" in name else 50) == cfg.MODEL.RESNETS.DEPTH
    assert str(cfg.MODEL.RESNETS.DEPTH) in cfg.MODEL.WEIGHTS
    assert (270000 if "3x" in name else 90000) == cfg.SOLVER.MAX_ITER
    dims = {"v0": 32, "v1": 8, "v2": 16}[name[:2]]
    assert dims == cfg.MODEL.EMBED_MASK.EMBED_DIM


@pytest.mark.parametrize(("name", "millions"), [("v0_R_50_1x", 34.532), ("v0_R_101_1x", 53.472), ("v2_R_50_1x", 34.49)])
def test_models_have_the_released_size(name: str, millions: float) -> None:
    cfg = read(CONFIGS / "EmbedMask" / f"embed_mask_{name}.yaml")
    assert parameters(cfg) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", ["embed_mask_synthetic", "embed_mask_nuclei"])
def test_quick_configs_load(name: str) -> None:
    cfg = read(CONFIGS / "quick" / f"{name}.yaml")
    cfg.MODEL.EMBED_MASK.NUM_CLASSES = 1
    assert parameters(cfg) < 8e6


@pytest.mark.parametrize("architecture", ["EmbedMask", "ConvMaskFCOS"])
def test_the_class_count_follows_from_the_dataset(small_cfg: Callable[..., CfgNode], architecture: str) -> None:
    cfg = small_cfg("MODEL.META_ARCHITECTURE", architecture, f"{NODE}.NUM_CLASSES", 80)
    cfg.DATASETS.TRAIN = ("convmask_cityscapes_train_panoptic",)
    set_class_counts(cfg)
    assert cfg.MODEL.EMBED_MASK.NUM_CLASSES == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{NODE}.IN_FEATURES", ["p3", "p9"]), "p3, p9, but build_narrow_resnet_fpn_backbone gives p2, p3"),
        ((f"{NODE}.FCOS.SIZES_OF_INTEREST", (16, 32)), "has 2 sizes for the 4 levels"),
        ((f"{NODE}.FCOS.SIZES_OF_INTEREST", (16, 64, 32)), "does not ascend"),
        ((f"{NODE}.FCOS.BOX_LOSS", "l1"), "BOX_LOSS 'l1' is not one of giou, linear_iou, iou"),
        ((f"{NODE}.PIXELS.IN_FEATURE", "p9"), "PIXELS.IN_FEATURE is p9"),
        ((f"{NODE}.PIXELS.SCALE_FACTOR", 3), "SCALE_FACTOR is 3: the stride 4 of p2"),
        ((f"{NODE}.MARGIN.SOURCE", "masks"), "MARGIN.SOURCE 'masks' is not one of boxes, features"),
        ((f"{NODE}.MARGIN.PRIOR", 0.0), "MARGIN.PRIOR is 0.0"),
        ((f"{NODE}.TRAINING.PROPOSALS", "all"), "PROPOSALS 'all' is not one of mean, best"),
        ((f"{NODE}.TRAINING.MASK_LOSS", "dice"), "MASK_LOSS 'dice' is not one of lovasz, bce"),
        ((f"{NODE}.INFERENCE.MASK_VALUES", "log"), "MASK_VALUES 'log' is not one of probability, logarithm"),
        ((f"{NODE}.INFERENCE.MASK_THRESH", 1.0), "MASK_THRESH is 1.0"),
        (
            (f"{NODE}.INFERENCE.MASK_VALUES", "logarithm", f"{NODE}.INFERENCE.MASK_THRESH", 1e-5),
            "between 4.5e-05 and 1",
        ),
        ((f"{NODE}.TRAINING.PROBABILITY_FLOOR", 0.5), r"PROBABILITY_FLOOR is 0\.5"),
        ((f"{NODE}.MARGIN.BOX_SCALE", 0.0), "BOX_SCALE is 0"),
        ((f"{NODE}.FCOS.PRIOR_PROB", 0.0), r"PRIOR_PROB is 0\.0"),
        ((f"{NODE}.EMBED_DIM", 2, f"{NODE}.POSITION_CHANNELS", True), "with POSITION_CHANNELS 3 or more"),
        (("INPUT.TARGETS", ("sem_seg",)), "EmbedMask needs 'instances' in INPUT.TARGETS"),
    ],
)
def test_contradictions_are_named(small_cfg: Callable[..., CfgNode], overrides: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg(*overrides))


def test_every_key_is_explained_in_the_line_above(repository: Path) -> None:
    lines = (repository / "projects" / "EmbedMask" / "embed_mask" / "config.py").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"    [\w.]+\.[A-Z_]+ = (?!CfgNode)", line)]
    assert len(keys) > 35
    assert all(lines[index - 1].startswith("    # ") for index in keys)


def test_every_key_is_read(repository: Path) -> None:
    folder = repository / "projects" / "EmbedMask" / "embed_mask"
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "config.py")
    keys = re.findall(r"\.([A-Z_]+) = (?!CfgNode)", (folder / "config.py").read_text())
    assert not [key for key in keys if f".{key}" not in code and f'.{key}"' not in code]
