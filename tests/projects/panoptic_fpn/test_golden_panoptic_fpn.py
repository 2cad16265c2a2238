"""Against recorded outputs of Detectron2 (two images, one batch, narrow ResNet-50-FPN)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from convmask.config import get_cfg
from convmask.ops import panoptic_merge

Record = dict[str, np.ndarray]
# A box coordinate that differs by 2e-4 pixels between processors may move a mask pixel over the threshold.
BORDER_PIXELS = 3


@pytest.fixture(scope="module")
def record(golden: Any) -> Record:
    return golden("panoptic_fpn")


@pytest.fixture(scope="module")
def model(record: Record, repository: Path) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "PanopticFPN" / "panoptic_fpn_R_50_1x.yaml"))
    cfg.merge_from_list(json.loads(str(record["cfg_overrides"])))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg)
    weights = {key[2:]: torch.from_numpy(value) for key, value in record.items() if key.startswith("w/")}
    model.load_state_dict(weights, strict=True)
    return model


def unpacked(masks: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(masks, axis=-1, count=width).astype(bool))


def batch(record: Record) -> list[dict[str, Any]]:
    inputs = []
    for prefix in ("in/0", "in/1"):
        image = torch.from_numpy(record[f"{prefix}/image"])
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(torch.from_numpy(record[f"{prefix}/boxes"]))
        instances.gt_classes = torch.from_numpy(record[f"{prefix}/classes"])
        instances.gt_masks = BitMasks(unpacked(record[f"{prefix}/masks"], image.shape[2]))
        sem_seg = torch.from_numpy(record[f"{prefix}/sem_seg"].astype(np.int64))
        height, width = record[f"{prefix}/output_hw"].tolist()
        inputs.append({"image": image, "instances": instances, "sem_seg": sem_seg, "height": height, "width": width})
    return inputs


@pytest.fixture(scope="module")
def predictions(record: Record, model: nn.Module) -> list[dict[str, Any]]:
    with torch.no_grad():
        return model.eval()(batch(record))


def test_golden_panoptic_fpn_semantic_logits(
    record: Record, model: nn.Module, predictions: list[dict[str, Any]]
) -> None:
    with torch.no_grad():
        images = model.preprocess_image(batch(record))
        logits = model.sem_seg_head.layers(model.backbone(images.tensor))
    np.testing.assert_allclose(logits.numpy(), record["eval/sem_logits"], atol=1e-4, rtol=0)
    for i, prediction in enumerate(predictions):
        sem_seg = prediction["sem_seg"]
        np.testing.assert_allclose(
            sem_seg[:, ::7, ::7].numpy(), record[f"eval/{i}/sem_logits_every7"], atol=1e-4, rtol=0
        )
        assert (sem_seg.argmax(0).numpy() != record[f"eval/{i}/sem_seg"]).sum() <= BORDER_PIXELS


def test_golden_panoptic_fpn_instances(record: Record, predictions: list[dict[str, Any]]) -> None:
    for i, prediction in enumerate(predictions):
        instances = prediction["instances"]
        width = int(record[f"in/{i}/output_hw"][1])
        np.testing.assert_array_equal(instances.pred_classes.numpy(), record[f"eval/{i}/inst_classes"])
        np.testing.assert_allclose(instances.scores.numpy(), record[f"eval/{i}/inst_scores"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(
            instances.pred_boxes.tensor.numpy(), record[f"eval/{i}/inst_boxes"], atol=1e-3, rtol=0
        )
        masks = unpacked(record[f"eval/{i}/inst_masks"], width)
        assert (instances.pred_masks != masks).sum() <= BORDER_PIXELS


def test_golden_panoptic_fpn_panoptic_ids(record: Record, predictions: list[dict[str, Any]]) -> None:
    for i, prediction in enumerate(predictions):
        ids, segments = prediction["panoptic_seg"]
        expected = json.loads(str(record[f"eval/{i}/panoptic_info"]))
        assert (ids.numpy() != record[f"eval/{i}/panoptic_seg"]).sum() <= BORDER_PIXELS
        assert len(segments) == len(expected)
        for found, wanted in zip(segments, expected, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                tolerance = {"score": 1e-4, "area": BORDER_PIXELS}.get(key, 0)
                assert found[key] == pytest.approx(value, abs=tolerance), (key, found, wanted)


def test_golden_panoptic_fpn_losses_and_gradients(record: Record, model: nn.Module) -> None:
    model.train()
    model.zero_grad()
    torch.manual_seed(json.loads(str(record["meta"]))["torch_seed_training"])
    with EventStorage():
        losses = model(batch(record))
    expected = {key.removeprefix("loss/"): value for key, value in record.items() if key.startswith("loss/")}
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-4), name
    sum(losses.values()).backward()
    norms = json.loads(str(record["grad_norms"]))
    found = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == norms.keys()
    for name, norm in norms.items():
        assert found[name] == pytest.approx(norm, rel=1e-3), name


def test_golden_panoptic_fpn_combine_cases(record: Record) -> None:
    cases = sorted({key.split("/")[1] for key in record if key.startswith("combine/")})
    assert len(cases) == 12
    for case in cases:
        read = {key.rsplit("/", 1)[1]: value for key, value in record.items() if key.startswith(f"combine/{case}/")}
        params = json.loads(str(read["params"]))
        ids, segments = panoptic_merge(
            unpacked(read["masks"], params["width"]),
            torch.from_numpy(read["scores"]),
            torch.from_numpy(read["classes"]),
            torch.from_numpy(read["sem_seg"].astype(np.int64)),
            overlap_threshold=params["overlap_threshold"],
            stuff_area_limit=params["stuff_area_thresh"],
            score_threshold=params["instances_score_thresh"],
        )
        np.testing.assert_array_equal(ids.numpy(), read["panoptic_seg"], err_msg=case)
        assert segments == json.loads(str(read["panoptic_info"])), case
