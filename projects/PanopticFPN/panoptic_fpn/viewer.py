"""What the viewer shows of Panoptic FPN: labels and confidence of the semantic branch, proposals, one object's mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.structures import Instances

from convmask.demo.methods import Threshold
from convmask.visualization.draw import draw_segments
from convmask.visualization.maps import enlarged, heat, input_picture, outlined, scaled, shown_size
from convmask.visualization.segments import semantic_segments

from .meta_arch import ConvMaskPanopticFPN

Size = tuple[int, int]

_LONGEST = 480
# Proposals that are drawn.
_PROPOSALS = 50


def thresholds(cfg: CfgNode) -> list[Threshold]:
    """Those of the merge, and of the boxes."""
    node, found = "MODEL.PANOPTIC_FPN.COMBINE", []
    if cfg.MODEL.PANOPTIC_FPN.TASK == "panoptic" and cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED:
        found += [
            Threshold(
                "Panoptic map: least score of an object",
                f"{node}.INSTANCES_CONFIDENCE_THRESH",
                "combine_options.score_threshold",
            ),
            Threshold("Panoptic map: greatest overlap", f"{node}.OVERLAP_THRESH", "combine_options.overlap_threshold"),
        ]
    if cfg.MODEL.PANOPTIC_FPN.TASK != "semantic" and cfg.MODEL.ROI_HEADS.NAME == "StandardROIHeads":
        path = "roi_heads.box_predictor.test_nms_thresh"
        found.append(Threshold("NMS: IoU of boxes", "MODEL.ROI_HEADS.NMS_THRESH_TEST", path))
    return found


def inner_pictures(
    model: ConvMaskPanopticFPN, inputs: Mapping[str, Any], metadata: Metadata, chosen: int
) -> dict[str, np.ndarray]:
    """Of the semantic branch labels and confidence; of the instance branch proposals and a detection's mask."""
    images = model.preprocess_image([dict(inputs)])
    padded = images.tensor.shape[2], images.tensor.shape[3]
    frame = int(images.image_sizes[0][0]), int(images.image_sizes[0][1])
    size = shown_size(*frame, _LONGEST)
    image = input_picture(inputs, model.input_format, size)
    instance_features, semantic_features = model._branch_features(model.backbone(images.tensor))
    pictures: dict[str, np.ndarray] = {}
    logits = model._semantic_maps(semantic_features)
    if logits is not None:
        probabilities = enlarged(next(logits).softmax(dim=0), padded, frame, size)
        pictures["semantic branch: labels"] = draw_segments(image, semantic_segments(probabilities, metadata))
        pictures["semantic branch: confidence"] = heat(probabilities.amax(dim=0))
    if model.roi_heads is not None and model.proposal_generator is not None:
        proposals, _ = model.proposal_generator(images, instance_features, None)
        caption = f"the best {min(_PROPOSALS, len(proposals[0]))} of {len(proposals[0])} proposals, bright: more likely"
        pictures[caption] = _proposals(image, proposals[0])
        instances = model.roi_heads(images, instance_features, proposals, None)[0][0]
        if len(instances):
            pictures.update(_detection(image, instances, chosen, metadata))
    return pictures


def _proposals(image: np.ndarray, proposals: Instances) -> np.ndarray:
    """Boxes by their objectness, the best on top."""
    picture = (0.5 * image).astype(np.uint8)
    scale = image.shape[1] / proposals.image_size[1]
    best = proposals[:_PROPOSALS]
    colors = heat(best.objectness_logits.sigmoid().cpu()[None])[0].tolist()
    for box, color in reversed(list(zip((best.proposal_boxes.tensor * scale).tolist(), colors, strict=True))):
        picture = outlined(picture, box, (color[0], color[1], color[2]), 1)
    return picture


def _detection(image: np.ndarray, instances: Instances, chosen: int, metadata: Metadata) -> dict[str, np.ndarray]:
    """The box of a detection, and the probabilities that the mask head gives for it."""
    index = int(instances.scores.argsort(descending=True)[min(chosen, len(instances) - 1)])
    scale = image.shape[1] / instances.image_size[1]
    box = (instances.pred_boxes.tensor[index] * scale).tolist()
    names = metadata.get("thing_classes", None) or []
    category = int(instances.pred_classes[index])
    name = names[category] if category < len(names) else f"class {category}"
    pictures = {f"detection: {name}, {float(instances.scores[index]):.2f}": outlined(image, box)}
    if instances.has("pred_masks"):
        mask = heat(instances.pred_masks[index, 0])
        height, width = max(1.0, box[3] - box[1]), max(1.0, box[2] - box[0])
        pictures[f"its mask, {mask.shape[0]} x {mask.shape[1]} cells in the box"] = scaled(
            mask, shown_size(round(height), round(width), 240), smooth=False
        )
    return pictures
