"""Thresholds and inner pictures of each method: its quick configs, on an image of 64 x 80 pixels."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import nn

from convmask import projects
from convmask.demo.methods import Threshold, inner_pictures_of, thresholds_of
from convmask.engine import ConfigError, load_config, prepare

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = sorted(path.stem for path in (REPOSITORY / "configs" / "quick").glob("[a-z]*_synthetic.yaml"))
# The variants of a method take their time.
_VARIANTS = ("fcis_fpn", "knet_instance", "knet_semantic")
ONE_A_METHOD = [
    pytest.param(quick, marks=pytest.mark.slow) if quick.startswith(_VARIANTS) else quick for quick in QUICK
]
# Words of captions that there have to be.
CAPTIONS = {
    "PanopticFCN": ("centres", "regions", "masks of thing", "masks of stuff", "kernel map, stride 8", "weights of"),
    "FCIS": ("RoI: ", "outside maps", "inside maps", "assembled"),
    "EmbedMask": ("class score x", "centre-ness, stride", "pixel embedding", "detection", "distance", "probability"),
    "KNet": ("first kernels", "round 1"),
    "ConvMaskPanopticFPN": ("labels", "confidence", "proposals", "detection", "its mask"),
}


def small(quick: str, few_images: str, *opts: Any) -> CfgNode:
    sets = ["DATASETS.TRAIN", f"('{few_images}',)", "DATASETS.TEST", f"('{few_images}',)"]
    cfg = load_config(f"quick/{quick}.yaml", [*sets, "MODEL.DEVICE", "cpu", "MODEL.NARROW_RESNET.WIDTH", "8", *opts])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.EMBED_MASK.INFERENCE.SCORE_THRESH = 0.0
    prepare(cfg)
    return cfg


def value_at(model: nn.Module, path: str) -> Any:
    return reduce(lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name), path.split("."), model)


@pytest.mark.parametrize("quick", ONE_A_METHOD)
def test_pictures_and_thresholds(quick: str, few_images: str) -> None:
    cfg = small(quick, few_images)
    thresholds = thresholds_of(cfg)
    # the model that the config builds has each value where the threshold says that it is
    moved = cfg.clone()
    for number, threshold in enumerate(thresholds):
        moved.merge_from_list([threshold.key, 0.05 * (number + 3)])
    torch.manual_seed(0)
    model = build_model(moved).eval()
    for threshold in thresholds:
        assert value_at(model, threshold.path) == threshold.read(moved) != threshold.read(cfg)
        threshold.write(model, threshold.read(cfg))
        assert value_at(model, threshold.path) == threshold.read(cfg)

    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 80), dtype=np.uint8)
    inputs = {"image": torch.from_numpy(pixels), "height": 128, "width": 160}
    pictures = inner_pictures_of(model, inputs, MetadataCatalog.get(few_images), chosen=10_000)
    for words in CAPTIONS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        assert any(words in caption for caption in pictures), words
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert min(picture.shape[:2]) > 8


@pytest.mark.slow
def test_another_detection_gives_other_pictures(few_images: str) -> None:
    quick = next((name for name in QUICK if name.startswith(("embed_mask", "fcis", "panoptic_fpn"))), None)
    if quick is None:
        pytest.skip("no method here shows a single detection")
    torch.manual_seed(0)
    cfg = small(quick, few_images)
    model = build_model(cfg).eval()
    inputs = {"image": torch.randint(0, 256, (3, 64, 80), generator=torch.Generator().manual_seed(0)).byte()}
    first, other = (inner_pictures_of(model, inputs, MetadataCatalog.get(few_images), chosen) for chosen in (0, 7))
    assert any(caption not in other or not np.array_equal(other[caption], first[caption]) for caption in first)


@pytest.mark.slow
@pytest.mark.parametrize("quick", QUICK)
def test_an_image_without_detections_has_pictures(quick: str, few_images: str) -> None:
    cfg = small(quick, few_images)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0
    for threshold in thresholds_of(cfg):
        if "score" in threshold.label or "probability" in threshold.label:
            cfg.merge_from_list([threshold.key, threshold.high])
    model = build_model(cfg).eval()
    inner_pictures_of(model, {"image": torch.zeros(3, 64, 96)}, MetadataCatalog.get("unknown_set"))


def test_a_model_of_no_method_has_none(few_images: str) -> None:
    assert projects.part_of(GeneralizedRCNN, "viewer") is None
    assert inner_pictures_of(nn.Identity(), {}, MetadataCatalog.get(few_images)) == {}
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    assert thresholds_of(cfg) == []
    cfg.MODEL.META_ARCHITECTURE = "Unknown"
    with pytest.raises(ConfigError, match="Unknown"):
        thresholds_of(cfg)


def test_a_value_out_of_range_is_refused() -> None:
    model = nn.Identity()
    model.options = {"threshold": 0.5}
    threshold = Threshold("mask", "MODEL.X", "options.threshold", low=0.1)
    threshold.write(model, 0.2)
    assert model.options == {"threshold": 0.2}
    with pytest.raises(ValueError, match=r"mask is 0\.0, not between 0\.1 and 1"):
        threshold.write(model, 0.0)
    assert model.options == {"threshold": 0.2}
