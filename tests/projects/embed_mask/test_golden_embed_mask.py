"""Against recorded outputs of the original releases: v0 (arXiv) and v2 (IJCAI), two images, narrow ResNet-50-FPN."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.ops import embedding_masks
from convmask.projects.embed_mask import EmbedMask
from convmask.projects.embed_mask.checkpoint import convert_original
from convmask.projects.embed_mask.fcos_head import FCOSOutputs
from convmask.projects.embed_mask.fcos_inference import detect
from convmask.projects.embed_mask.fcos_targets import FCOSTargets, make_targets
from convmask.projects.embed_mask.heads import EmbeddingOutputs, enlarge
from convmask.projects.embed_mask.inference import mask_cells
from convmask.projects.embed_mask.losses import margins_in_use, mask_losses, object_proposals
from convmask.projects.embed_mask.targets import mask_targets

Record = dict[str, np.ndarray]
LEVELS = ("p3", "p4", "p5", "p6", "p7")
GENERATIONS = {"v0": "embedmask_v0", "v2": "embedmask"}
# Official names of the losses.
LOSSES = {
    "loss_cls": "loss_cls",
    "loss_reg": "loss_reg",
    "loss_centerness": "loss_centerness",
    "loss_mask": "mask_loss",
    "loss_smooth": "smooth_loss",
}
# The official names of overrides, and ours.
KEYS = {
    "MODEL.RESNETS.BACKBONE_OUT_CHANNELS": "MODEL.FPN.OUT_CHANNELS",
    "MODEL.EMBED_MASK.PRE_NMS_TOP_N": "MODEL.EMBED_MASK.INFERENCE.PRE_NMS_TOPK",
    "MODEL.EMBED_MASK.EMBED_DIM": "MODEL.EMBED_MASK.EMBED_DIM",
    "TEST.DETECTIONS_PER_IMG": "TEST.DETECTIONS_PER_IMAGE",
}
# Pixels of one mask whose value is the threshold up to rounding.
BORDER_PIXELS = 1


@dataclass
class Case:
    """A record, the model with its weights, and what it predicts for the recorded batch."""

    generation: str
    record: Record
    model: EmbedMask
    inputs: list[dict[str, Any]]
    outputs: FCOSOutputs
    embeddings: EmbeddingOutputs
    targets: FCOSTargets
    sizes: list[tuple[int, int]]

    @property
    def instances(self) -> list[Instances]:
        return [x["instances"] for x in self.inputs]


def narrow_config(record: Record, repository: Path, generation: str) -> CfgNode:
    """The release's config with the record's overrides by our keys."""
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "EmbedMask" / f"embed_mask_{generation}_R_50_1x.yaml"))
    overrides = json.loads(str(record["cfg_overrides"]))
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        if key == "MODEL.EMBED_MASK.NUM_CLASSES":
            # the original counts the background
            cfg.MODEL.EMBED_MASK.NUM_CLASSES = value - 1
        elif key not in ("MODEL.DEVICE", "MODEL.WEIGHT"):
            cfg.merge_from_list([KEYS.get(key, key), value])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    return cfg


def released_weights(record: Record) -> dict[str, torch.Tensor]:
    return {key[2:]: torch.from_numpy(value) for key, value in record.items() if key.startswith("w/")}


def unpacked(masks: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(masks, axis=-1, count=width).astype(bool))


def batch(record: Record) -> list[dict[str, Any]]:
    inputs = []
    for prefix in ("in/0", "in/1"):
        image = torch.from_numpy(record[f"{prefix}/image"])
        masks = BitMasks(unpacked(record[f"{prefix}/masks_packed"], image.shape[2]))
        instances = Instances(tuple(image.shape[1:]), gt_masks=masks)
        instances.gt_boxes = Boxes(torch.from_numpy(record[f"{prefix}/boxes"]) + torch.tensor([0.0, 0.0, 1.0, 1.0]))
        assert torch.equal(instances.gt_boxes.tensor, masks.get_bounding_boxes().tensor)
        instances.gt_classes = torch.from_numpy(record[f"{prefix}/classes"])
        height, width = record[f"{prefix}/ori_shape"].tolist()
        inputs.append({"image": image.flip(0), "instances": instances, "height": height, "width": width})
    return inputs


@pytest.fixture(scope="module", params=list(GENERATIONS))
def case(request: pytest.FixtureRequest, golden: Any, repository: Path, tmp_path_factory: Any) -> Case:
    record = golden(GENERATIONS[request.param])
    model = build_model(narrow_config(record, repository, request.param))
    path = tmp_path_factory.mktemp("released") / "original.pth"
    torch.save({"model": released_weights(record)}, path)
    Checkpointer(model, policy="strict").load(str(path))
    inputs = batch(record)
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        outputs, embeddings = model.predict(images.tensor)
        targets = make_targets([x["instances"] for x in inputs], model.locations(outputs), model.target_options)
    return Case(request.param, record, model, inputs, outputs, embeddings, targets, images.image_sizes)


def close(found: torch.Tensor, wanted: np.ndarray, *, atol: float = 1e-4, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found.detach(), torch.from_numpy(wanted), atol=atol, rtol=rtol)


def test_golden_embed_mask_features(case: Case) -> None:
    with torch.no_grad():
        features = case.model.backbone(case.model.preprocess_image(case.inputs).tensor)
    close(features["p3"][..., ::2, ::2], case.record["eval/fpn/p3_every2"], rtol=1e-5)
    for name in LEVELS[1:]:
        close(features[name], case.record[f"eval/fpn/{name}"], rtol=1e-5)


def test_golden_embed_mask_heads(case: Case) -> None:
    kinds = {
        "cls_logits": case.outputs.logits,
        "box_reg": [x * unit for x, unit in zip(case.outputs.distances, case.outputs.units, strict=True)],
        "centerness": case.outputs.centerness,
        "proposal_embed": case.embeddings.proposals,
        "proposal_margin": case.embeddings.margins,
    }
    for kind, levels in kinds.items():
        for name, found in zip(LEVELS, levels, strict=True):
            close(found, case.record[f"eval/head/{kind}/{name}"])
    close(case.embeddings.pixels, case.record["eval/head/pixel_embed"])


def test_golden_embed_mask_locations(case: Case) -> None:
    np.testing.assert_array_equal(case.targets.classes.numpy(), case.record["train/location_class"])
    np.testing.assert_array_equal(case.targets.objects.numpy(), case.record["train/location_gt"])
    close(case.targets.distances, case.record["train/location_ltrb"], atol=0)


def test_golden_embed_mask_positives(case: Case) -> None:
    positives = case.model.positives(case.outputs, case.targets, case.model.locations(case.outputs))
    for index, found in enumerate(positives):
        if case.generation == "v0":
            rows = torch.stack([found.objects, found.locations], dim=1)
            np.testing.assert_array_equal(rows.numpy(), case.record[f"train/positives/{index}"])
            chosen = object_proposals(
                case.embeddings.flat_proposals()[index], case.embeddings.flat_margins()[index], found
            )
            wanted = case.record[f"train/embed_mean/{index}"]
            present = ~np.isnan(wanted[:, 0])
            np.testing.assert_array_equal(chosen.objects.numpy(), present.nonzero()[0])
            close(chosen.embeddings, wanted[present])
            close(chosen.margins, case.record[f"train/margin_mean/{index}"][present])
        else:
            best = case.record[f"train/best_location/{index}"]
            np.testing.assert_array_equal(found.objects.numpy(), (best >= 0).nonzero()[0])
            np.testing.assert_array_equal(found.locations.numpy(), best[best >= 0])


def test_golden_embed_mask_loss_of_each_object(case: Case) -> None:
    pixels = enlarge(case.embeddings.pixels, 2)
    size = pixels.shape[2], pixels.shape[3]
    positives = case.model.positives(case.outputs, case.targets, case.model.locations(case.outputs))
    for index, instances in enumerate(case.instances):
        targets = mask_targets(instances.gt_masks.tensor, size, case.model.mask_stride)
        wanted = unpacked(case.record[f"train/mask_targets_packed/{index}"], size[1])
        assert torch.equal(targets, wanted)
        chosen = object_proposals(
            case.embeddings.flat_proposals()[index], case.embeddings.flat_margins()[index], positives[index]
        )
        boxes = case.targets.boxes[index]
        losses = mask_losses(pixels[index], chosen, instances, boxes, 4, case.model.mask_loss_options)
        recorded = case.record[f"train/mask_loss_per_gt/{index}"]
        close(losses, recorded[~np.isnan(recorded)], atol=1e-5, rtol=1e-4)
        if case.generation == "v0":
            smooth = case.record[f"train/smooth_per_gt/{index}"]
            assert chosen.deviations.item() == pytest.approx(np.nansum(smooth), rel=1e-4)


def test_golden_embed_mask_losses_and_gradients(case: Case) -> None:
    case.model.train()
    try:
        losses = case.model(case.inputs)
        sum(losses.values()).backward()
    finally:
        case.model.eval()
    recorded = {key.removeprefix("loss/") for key in case.record if key.startswith("loss/")}
    assert {LOSSES[name] for name in losses} == recorded
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(float(case.record[f"loss/{LOSSES[name]}"]), rel=1e-4), name
    norms = converted_norms(json.loads(str(case.record["grad_norms"])))
    found = {name: p.grad.norm().item() for name, p in case.model.named_parameters() if p.requires_grad}
    case.model.zero_grad()
    assert found.keys() == norms.keys()
    for name, norm in norms.items():
        assert found[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def converted_norms(norms: dict[str, float]) -> dict[str, float]:
    """Norms by our names; those of two convolutions that are one here are added as squares."""
    joined: dict[str, float] = {}
    for name, norm in norms.items():
        for part in ("spatial_", "other_"):
            name = name.replace(f"_{part}embed_pred", "_embed_pred")
        joined[name] = (joined.get(name, 0.0) ** 2 + norm**2) ** 0.5
    # the converter recognises a file by its weights; these stand for it
    return {
        name: value.item() for name, value in convert_original({k: torch.tensor(v) for k, v in joined.items()}).items()
    }


def test_golden_embed_mask_detections(case: Case) -> None:
    found = detect(case.outputs, case.model.locations(case.outputs), case.sizes, case.model.fcos_inference_options)
    for index, detections in enumerate(found):
        np.testing.assert_array_equal(detections.classes.numpy(), case.record[f"eval/classes/{index}"])
        close(detections.scores, case.record[f"eval/scores/{index}"], atol=1e-5)
        close(detections.boxes, case.record[f"eval/boxes/{index}"], atol=1e-3)


def test_golden_embed_mask_probabilities(case: Case) -> None:
    pixels = enlarge(case.embeddings.pixels, 2)
    found = detect(case.outputs, case.model.locations(case.outputs), case.sizes, case.model.fcos_inference_options)
    for index, detections in enumerate(found):
        proposals = case.embeddings.flat_proposals()[index, detections.locations]
        margins = margins_in_use(case.embeddings.flat_margins()[index, detections.locations], None)
        cells = mask_cells(detections.boxes, 4, case.model.mask_options.cells)
        if case.generation == "v0":
            values = embedding_masks(pixels[index], proposals, margins, cells, fill=-float("inf")).exp()
            close(values, case.record[f"eval/mask_prob/{index}"], atol=2e-5)
        else:
            values = embedding_masks(pixels[index], proposals, margins, cells)
            wanted = case.record[f"eval/mask_logprob/{index}"]
            close(values, wanted, atol=1e-4, rtol=1e-4)
            np.testing.assert_array_equal(values.numpy() == -10, wanted == -10)


def test_golden_embed_mask_results(case: Case) -> None:
    for index, result in enumerate(case.model(case.inputs)):
        instances = result["instances"]
        height, width = case.record[f"in/{index}/ori_shape"].tolist()
        assert instances.image_size == (height, width)
        np.testing.assert_array_equal(instances.pred_classes.numpy(), case.record[f"eval/classes/{index}"])
        close(instances.scores, case.record[f"eval/scores/{index}"], atol=1e-5)
        xywh = instances.pred_boxes.tensor.clone()
        xywh[:, 2:] -= xywh[:, :2]
        wanted = torch.from_numpy(case.record[f"eval/boxes_xywh_original/{index}"])
        # boxes end at the border of the image here; the original's may end less than a pixel beyond it
        wanted[:, 2:] = torch.minimum(wanted[:, :2] + wanted[:, 2:], torch.tensor([width, height])) - wanted[:, :2]
        torch.testing.assert_close(xywh, wanted, atol=2e-3, rtol=0)
        masks = unpacked(case.record[f"eval/masks_packed/{index}"], width)
        assert (instances.pred_masks != masks).flatten(1).sum(dim=1).max() <= BORDER_PIXELS
