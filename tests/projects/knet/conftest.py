"""Recorded outputs of the original release, and small models with random input."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch import nn

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg

Record = dict[str, np.ndarray]


def released_weights(record: Record) -> dict[str, torch.Tensor]:
    """The state dictionary of the release."""
    return {key[2:]: torch.from_numpy(value) for key, value in record.items() if key.startswith("w/")}


def narrow_config(record: Record, repository: Path, name: str) -> CfgNode:
    """The config ``name`` with the widths and class counts of the record."""
    meta = json.loads(str(record["meta"]))
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "KNet" / f"{name}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", 2])
    resnet, node = cfg.MODEL.RESNETS, cfg.MODEL.KNET
    resnet.STEM_OUT_CHANNELS, resnet.WIDTH_PER_GROUP, resnet.RES2_OUT_CHANNELS = 8, 8, 32
    node.FFN_CHANNELS = 128
    if meta["variant"] == "semantic":
        resnet.NORM = cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = meta["things"] + meta["stuff"]
        cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = meta["channels"]
        node.UPDATOR_CHANNELS = meta["channels"] // 2
        node.SEMANTIC.DROPOUT, node.SEMANTIC.AUX_CHANNELS = 0.0, meta["channels"] // 2
        return cfg
    cfg.MODEL.FPN.OUT_CHANNELS = node.CHANNELS = meta["channels"]
    node.NUM_KERNELS = cfg.TEST.DETECTIONS_PER_IMAGE = meta["proposals"]
    node.NUM_THING_CLASSES, node.NUM_STUFF_CLASSES = meta["things"], meta["stuff"]
    return cfg


@pytest.fixture(scope="session")
def released_model(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Record, str], nn.Module]:
    """``released_model(record, "knet_panoptic_R_50_1x")``: the narrow model with the record's weights, loaded from a
    file of the release."""

    def make(record: Record, name: str) -> nn.Module:
        model = build_model(narrow_config(record, repository, name))
        path = tmp_path_factory.mktemp("released") / "original.pth"
        torch.save({"meta": {"CLASSES": ["a"]}, "state_dict": released_weights(record)}, path)
        Checkpointer(model, policy="strict").load(str(path))
        return model

    return make


@pytest.fixture(scope="session")
def recorded_batch() -> Callable[[Record], list[dict[str, Any]]]:
    """``recorded_batch(record)``: the record's two images with their annotations."""

    def make(record: Record) -> list[dict[str, Any]]:
        meta = json.loads(str(record["meta"]))
        batch = []
        for prefix in ("in/0", "in/1"):
            image = torch.from_numpy(record[f"{prefix}/image"])
            size = image.shape[1], image.shape[2]
            height, width = record[f"{prefix}/ori_shape"].tolist()
            inputs = {"image": image, "height": height, "width": width}
            if f"{prefix}/sem_seg" in record:
                sem_seg = torch.from_numpy(record[f"{prefix}/sem_seg"].astype(np.int64))
                if meta["variant"] == "panoptic":
                    # things have the label 0 here, stuff the labels from 1 on
                    separated = (sem_seg - meta["things"] + 1).clamp(min=0)
                    sem_seg = torch.where(sem_seg == 255, 255, separated)
                inputs["sem_seg"] = sem_seg
            if f"{prefix}/classes" in record:
                masks = np.unpackbits(record[f"{prefix}/masks_packed"], axis=-1, count=size[1]).astype(bool)
                inputs["instances"] = Instances(size, gt_masks=BitMasks(torch.from_numpy(masks)))
                inputs["instances"].gt_classes = torch.from_numpy(record[f"{prefix}/classes"])
            batch.append(inputs)
        return batch

    return make


@pytest.fixture
def small_cfg(repository: Path) -> Callable[..., CfgNode]:
    """``small_cfg("panoptic", "MODEL.KNET.NUM_KERNELS", 5)``: the quick config of a task, tiny, 5 thing and 4 stuff
    classes (9 labels)."""

    def make(task: str, *overrides: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_file(str(repository / "configs" / "quick" / f"knet_{task}_synthetic.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.NARROW_RESNET.WIDTH = 8
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        node = cfg.MODEL.KNET
        node.NUM_THING_CLASSES, node.NUM_STUFF_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5, 4, 9
        node.CHANNELS, node.NUM_KERNELS, node.FFN_CHANNELS, node.NUM_HEADS = 32, 10, 64, 4
        # group normalisation refuses single values: two channels a group on a grid of one cell
        cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = node.SEMANTIC.AUX_CHANNELS = 64
        cfg.TEST.DETECTIONS_PER_IMAGE = 12
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture
def random_inputs(draw_inputs: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """``random_inputs(objects=(2, 0))``: training input of one image for each number of objects."""
    return partial(draw_inputs, boxes=False, semantic_classes=5)
