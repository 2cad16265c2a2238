"""Against recorded outputs of the authors' release: a narrow ResNet-101, whole, in test and training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.projects.fcis import MXNET
from convmask.projects.fcis.boxes import from_detectron
from convmask.projects.fcis.checkpoint import by_position
from convmask.projects.fcis.inference import detect, drop_small, paste, rescale
from convmask.projects.fcis.losses import fcis_losses
from convmask.projects.fcis.targets import RoiTargets, roi_targets

from .mxnet_files import write_params

Record = dict[str, np.ndarray]
TOLERANCE = 1e-4
# pixels of one pasted mask whose value is the threshold up to rounding
BORDER_PIXELS = 2


@pytest.fixture(scope="module")
def record(golden: Callable[[str], Record]) -> Record:
    return golden("fcis_model")


def narrow_config(repository: Path, mode: str = "ohem") -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "FCIS" / "fcis_R_101_coco_ohem.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8, 32
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FCIS.RPN_CHANNELS, cfg.MODEL.FCIS.REDUCTION = 64, 128
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 80
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 128
    cfg.MODEL.FCIS.OHEM.NUM_ROIS = 32
    if mode == "random":
        cfg.MODEL.FCIS.OHEM.ENABLED = False
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 40
        cfg.MODEL.FCIS.SAMPLING.BACKGROUND_LOW = 0.1
    return cfg


def load(record: Record, cfg: CfgNode, folder: Path) -> nn.Module:
    """A model with the release's weights, through a file in the release's format."""
    model = build_model(cfg)
    weights = {key[2:]: value for key, value in record.items() if key.startswith("w/")}
    path = folder / "fcis-0000.params"
    write_params(path, {f"{'aux' if 'moving' in name else 'arg'}:{name}": w for name, w in weights.items()})
    Checkpointer(model, policy="strict").load(str(path))
    return model


@pytest.fixture(scope="module")
def model(record: Record, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load(record, narrow_config(repository), tmp_path_factory.mktemp("released"))


def inputs_of(record: Record) -> dict[str, Any]:
    image = torch.from_numpy(record["in/resized_bgr"].transpose(2, 0, 1).copy())
    height, width = record["in/image_bgr"].shape[:2]
    return {"image": image, "height": height, "width": width}


class Run:
    """One pass of the model in test mode, with everything in between."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        model.eval()
        with torch.no_grad():
            self.images: ImageList = model.preprocess_image([inputs_of(record)])
            self.features = model.backbone(self.images.tensor)
            self.scores, self.deltas = model.proposal_generator.rpn_head([self.features["res4"]])
            self.proposals, _ = model.proposal_generator(self.images, self.features, None)
            self.maps = model.roi_heads.head(self.features["res5"])
            self.predictions = model.roi_heads.predict([self.maps], self.proposals)[0]


@pytest.fixture(scope="module")
def run(model: nn.Module, record: Record) -> Run:
    return Run(model, record)


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Within the tolerance, relative to the largest value where that is above 1."""
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual.detach().numpy(), expected, atol=tolerance * scale, rtol=0)


def test_backbone_and_rpn(run: Run, record: Record) -> None:
    close(run.features["res4"], record["eval/conv4"])
    close(run.features["res5"], record["eval/conv5"])
    close(run.scores[0], record["eval/rpn_cls_score"])
    close(run.deltas[0], record["eval/rpn_bbox_pred"])


def test_maps(run: Run, record: Record) -> None:
    expected = by_position(torch.from_numpy(record["eval/score_maps"][0]))
    close(run.maps.scores.flatten(1, 4)[0], expected.numpy())
    close(run.maps.boxes[0], record["eval/bbox_maps"][0, 4 * 49 :])


def test_proposals(run: Run, record: Record) -> None:
    found = from_detectron(run.proposals[0].proposal_boxes.tensor, MXNET)
    np.testing.assert_allclose(found, record["eval/rois1"][:, 1:], atol=2e-3)


def test_both_rounds(run: Run, record: Record) -> None:
    rois = np.concatenate([record["eval/rois1"], record["eval/rois2"]])
    np.testing.assert_allclose(run.predictions.boxes, rois[:, 1:], atol=5e-3)
    close(run.predictions.probabilities, record["eval/cls_prob"])
    close(run.predictions.masks, record["eval/mask_prob"])


def test_deltas(model: nn.Module, run: Run, record: Record) -> None:
    with torch.no_grad():
        for rois, rows in (("rois1", slice(0, 80)), ("rois2", slice(80, 160))):
            boxes = torch.from_numpy(record[f"eval/{rois}"][:, 1:])
            outputs = model.roi_heads.read([run.maps], [boxes], None)
            close(outputs.scores, record["eval/cls_score"][rows])
            close(outputs.deltas, record["eval/bbox_pred"][rows, 4:])


@pytest.mark.parametrize("procedure", ["cpu", "gpu"])
def test_detections(model: nn.Module, run: Run, record: Record, procedure: str) -> None:
    from dataclasses import replace

    options = replace(model.roi_heads.inference_options, procedure=procedure)
    size = record["in/image_bgr"].shape[:2]
    kept = drop_small(run.predictions, options.min_size, MXNET)
    assert len(kept.boxes) == len(record["eval/kept"])
    scaled = rescale(kept, record["in/resized_bgr"].shape[:2], size, MXNET)
    np.testing.assert_allclose(scaled.boxes, record["eval/boxes"], atol=5e-3)
    found = detect(scaled, size, options)
    prefix = "eval/gpu_det" if procedure == "gpu" else "eval/det"
    np.testing.assert_array_equal(from_detectron(found.pred_boxes.tensor, MXNET), record[prefix][:, :4])
    close(found.scores, record[prefix][:, 4])
    assert (found.pred_classes + 1).tolist() == record[f"{prefix}_class"].tolist()
    close(found.pred_masks[:, 0], record[f"{prefix}_mask"], 1e-3)
    if procedure == "cpu":
        pasted = np.unpackbits(record["eval/det_pasted"], axis=-1, count=size[1])
        masks = paste(found, options).pred_masks
        assert int((masks.numpy() != pasted).sum(axis=(1, 2)).max()) <= BORDER_PIXELS


def test_whole_inference(model: nn.Module, record: Record) -> None:
    found = model.eval()([inputs_of(record)])[0]["instances"]
    expected = record["eval/gpu_det"]
    assert len(found) == len(expected)
    close(found.scores, expected[:, 4])
    np.testing.assert_array_equal(from_detectron(found.pred_boxes.tensor, MXNET), expected[:, :4])


def truth_of(record: Record) -> tuple[Instances, torch.Tensor]:
    boxes = torch.from_numpy(record["in/gt_boxes"])
    truth = Instances(record["in/resized_bgr"].shape[:2])
    truth.gt_boxes = Boxes(boxes[:, :4] + torch.tensor([0.0, 0, 1, 1]))
    truth.gt_classes = boxes[:, 4].long() - 1
    return truth, torch.from_numpy(record["in/gt_masks"])


@pytest.mark.parametrize("mode", ["ohem", "random"])
def test_losses_and_gradients(record: Record, repository: Path, tmp_path: Path, mode: str) -> None:
    """With the recorded samples: every loss, and the norm of the gradient of every parameter."""
    model = load(record, narrow_config(repository, mode), tmp_path).train()
    of = {key.removeprefix(f"train/{mode}/"): value for key, value in record.items() if f"train/{mode}/" in key}
    truth, masks = truth_of(record)
    images = model.preprocess_image([inputs_of(record)])
    features = model.backbone(images.tensor)
    rpn, heads = model.proposal_generator, model.roi_heads

    scores, deltas = rpn.rpn_head([features["res4"]])
    anchors = rpn.anchor_generator([features["res4"]])[0].tensor
    with EventStorage(), torch.no_grad():
        labels, targets = rpn.sample_anchors(anchors, [truth])
    recorded = torch.from_numpy(of["rpn_label"]).view(12, -1).T.flatten()  # anchors inside
    assert (labels[0] == 1).sum() == (recorded == 1).sum()
    expected = torch.from_numpy(of["rpn_bbox_target"]).unflatten(1, (12, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    positive = recorded == 1
    close(targets[0, positive], expected[0, positive].numpy(), 1e-5)
    by_anchor = [x.unflatten(1, shape) for x, shape in ((scores[0], (2, 12)), (deltas[0], (12, 4)))]
    losses = rpn.two_class_losses(
        by_anchor[0].permute(0, 3, 4, 2, 1).flatten(1, 3),
        by_anchor[1].permute(0, 3, 4, 1, 2).flatten(1, 3),
        recorded[None],
        targets,
    )

    rois, label = torch.from_numpy(of["rois"][:, 1:]), torch.from_numpy(of["label"])
    boxes = from_detectron(truth.gt_boxes.tensor, MXNET)
    overlaps_best = heads_matching(rois, boxes)
    made = roi_targets(rois, label, overlaps_best, boxes, masks, heads.sampling_options)
    close(made.deltas, of["bbox_target"][:, 4:] * of["bbox_weight"][:, 4:], 1e-5)
    assert (made.masks.numpy() != of["mask_target"]).mean() < 1e-4
    made = RoiTargets(made.rois, made.labels, made.deltas, torch.from_numpy(of["mask_target"]).long())
    outputs = heads.read([heads.head(features["res5"])], [rois], label)
    close(outputs.scores, of["cls_score"])
    close(outputs.masks, of["mask_score"])
    losses |= fcis_losses([outputs], [made], heads.loss_options)

    names = {
        "rpn_cls": "loss_rpn_cls",
        "rpn_bbox": "loss_rpn_loc",
        "cls": "loss_cls",
        "bbox": "loss_box_reg",
        "mask": "loss_mask",
    }
    for original, name in names.items():
        assert float(losses[name]) == pytest.approx(float(record[f"loss/{mode}/{original}"]), rel=TOLERANCE), name
    sum(losses.values()).backward()
    check_gradients(model, record, mode)


def heads_matching(rois: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    from convmask.projects.fcis.boxes import pairwise_iou

    return pairwise_iou(rois, boxes, MXNET).argmax(dim=1)


def check_gradients(model: nn.Module, record: Record, mode: str) -> None:
    """Norms of gradients by the release's names. Of the box maps half has none."""
    norms = json.loads(str(record[f"grad_norms/{mode}"]))
    heads, rpn = "roi_heads.head", "proposal_generator.rpn_head"
    pairs = {f"{rpn}.conv": "rpn_conv_3x3", f"{rpn}.scores": "rpn_cls_score", f"{rpn}.deltas": "rpn_bbox_pred"}
    pairs |= {
        f"{heads}.reduction": "conv_new_1",
        f"{heads}.score_maps": "fcis_cls_seg",
        f"{heads}.box_maps": "fcis_bbox",
    }
    for number, letter in enumerate("abc"):
        pairs[f"backbone.res5.{number}.conv2"] = f"res5{letter}_branch2b"
    pairs |= {"backbone.stem.conv1": "conv1", "backbone.res3.0.shortcut": "res3a_branch1"}
    parameters = dict(model.named_parameters())
    for name, original in pairs.items():
        for value in ("weight", "bias"):
            parameter = parameters.get(f"{name}.{value}")
            if parameter is None:
                continue
            assert parameter.grad is not None
            assert float(parameter.grad.norm()) == pytest.approx(norms[f"{original}_{value}"], rel=2e-3), name
    for value, original in (("weight", "gamma"), ("bias", "beta")):
        norm = parameters[f"backbone.res5.2.conv3.norm.{value}"].grad
        assert float(norm.norm()) == pytest.approx(norms[f"bn5c_branch2c_{original}"], rel=2e-3)
    expected = by_position(torch.from_numpy(record[f"grad/{mode}/fcis_cls_seg_bias"]))
    close(parameters[f"{heads}.score_maps.bias"].grad, expected.numpy())
