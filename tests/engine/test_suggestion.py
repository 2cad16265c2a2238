"""Suggested configs: from which numbers which choice follows, and that every one of them builds a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.data.summary import DataSummary
from convmask.engine import ConfigError
from convmask.engine.suggestion import _CONFIGS, METHODS, suggest

PANOPTIC = DataSummary(
    images=200,
    short_side=240,
    long_side=320,
    object_sizes=(16.0, 40.0, 90.0),
    most_objects=8,
    objects=900,
    empty_images=3,
    things=3,
    stuff=2,
)
INSTANCES = replace(PANOPTIC, stuff=0)


def value(cfg: CfgNode, key: str) -> object:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", [PANOPTIC, INSTANCES], ids=["panoptic", "instances"])
def test_every_suggestion_is_a_config_and_has_reasons(data: DataSummary, method: str, device: str) -> None:
    if (method, data.kind) == ("panoptic_fcn", "instance"):
        with pytest.raises(ConfigError, match="needs stuff classes"):
            suggest(data, method=method)
        return
    suggestion = suggest(data, method=method, device=device)
    cfg = suggestion.apply()
    assert device == cfg.MODEL.DEVICE and (suggestion.config.startswith("quick/") == (device == "cpu"))
    assert all(reason for _, _, reason in suggestion.choices)
    assert len({key for key, _, _ in suggestion.choices}) == len(suggestion.choices)
    for key, wanted, _ in suggestion.choices:
        found = value(cfg, key)
        assert (list(found) if isinstance(found, tuple | list) else found) == (
            list(wanted) if isinstance(wanted, tuple | list) else wanted
        ), key


@pytest.mark.parametrize(("method", "kind"), sorted(_CONFIGS))
def test_a_small_suggestion_builds_a_model(method: str, kind: str) -> None:
    data = PANOPTIC if kind == "panoptic" else replace(INSTANCES, object_sizes=(6.0, 9.0, 20.0), most_objects=90)
    cfg = suggest(data, method=method).apply()
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    assert sum(x.numel() for x in build_model(cfg).parameters()) > 1000


def test_the_learning_rate_follows_the_batch() -> None:
    few = suggest(replace(PANOPTIC, images=4), method="panoptic_fpn").apply()
    many = suggest(PANOPTIC, method="panoptic_fpn").apply()
    assert (many.SOLVER.IMS_PER_BATCH, few.SOLVER.IMS_PER_BATCH) == (4, 2)
    assert pytest.approx(many.SOLVER.BASE_LR / 2) == few.SOLVER.BASE_LR
    gpu = suggest(PANOPTIC, method="panoptic_fpn", device="cuda", gpu_memory=24.0).apply()
    assert (8, pytest.approx(0.01)) == (gpu.SOLVER.IMS_PER_BATCH, gpu.SOLVER.BASE_LR)
    assert 0 < gpu.SOLVER.STEPS[0] < gpu.SOLVER.STEPS[1] < gpu.SOLVER.MAX_ITER


def test_iterations_follow_the_number_of_images() -> None:
    iterations = [suggest(replace(PANOPTIC, images=n), method="fcis").apply().SOLVER.MAX_ITER for n in (10, 160, 10000)]
    assert iterations == [600, 1200, 2000]


def test_small_objects_enlarge_the_input_and_shrink_the_anchors() -> None:
    small = suggest(replace(PANOPTIC, object_sizes=(8.0, 14.0, 30.0)), method="panoptic_fpn").apply()
    usual = suggest(replace(PANOPTIC, object_sizes=(30.0, 60.0, 90.0)), method="panoptic_fpn").apply()
    assert small.INPUT.MIN_SIZE_TEST > usual.INPUT.MIN_SIZE_TEST == 240
    assert small.MODEL.ANCHOR_GENERATOR.SIZES[0] < usual.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32]
    huge = suggest(replace(PANOPTIC, short_side=3000, long_side=4000, object_sizes=(20.0, 90.0, 400.0)))
    reasons = {key: reason for key, _, reason in huge.choices}
    assert "affordable" in reasons["INPUT.MIN_SIZE_TRAIN"] and "tiles" in reasons["INPUT.MIN_SIZE_TRAIN"]
    assert huge.apply().INPUT.MIN_SIZE_TEST == 384


def test_many_objects_raise_every_limit() -> None:
    many = replace(PANOPTIC, most_objects=200)
    cfg = suggest(many, method="panoptic_fpn").apply()
    assert cfg.TEST.DETECTIONS_PER_IMAGE == cfg.TEST.AP_MAX_DETECTIONS == 300
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 900
    cfg = suggest(many, method="knet").apply()
    assert cfg.MODEL.KNET.NUM_KERNELS == cfg.TEST.DETECTIONS_PER_IMAGE == 300


def test_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match="'yolo' is not one of panoptic_fpn"):
        suggest(PANOPTIC, method="yolo")
