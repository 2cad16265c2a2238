"""How far a program's outputs are from what the model itself predicts, after its ordinary post-processing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Arrays = Mapping[str, np.ndarray]

# Instances are the same where scores differ by less.
SCORE_TOLERANCE = 1e-4
# Of the pixels of masks and maps: those whose probability is at a threshold, or that two labels share.
PIXEL_TOLERANCE = 1e-3
# Of boxes, in pixels, and of logits or probabilities of the semantic map, relative to the largest where above 1.
BOX_TOLERANCE, MAP_TOLERANCE = 0.05, 1e-3


@dataclass(frozen=True)
class Difference:
    """What differs on one image; fields are None for what the model does not predict.

    Attributes:
        instances: the model predicts.
        missing: of them, those that the program does not have, and those that it alone has.
        scores: greatest difference of scores of the same instance.
        boxes: of coordinates, in pixels.
        masks: pixels of masks that differ, divided by the pixels of the model's masks.
        sem_seg: greatest difference in the semantic map, divided by its largest value where above 1.
        panoptic: share of pixels whose segment, or its category, differs.
    """

    instances: int | None = None
    missing: int | None = None
    scores: float | None = None
    boxes: float | None = None
    masks: float | None = None
    sem_seg: float | None = None
    panoptic: float | None = None

    @property
    def within_tolerance(self) -> bool:
        """Whether everything is as near as single precision can be expected to come."""
        limits = (
            (self.missing, 0),
            (self.scores, SCORE_TOLERANCE),
            (self.boxes, BOX_TOLERANCE),
            (self.masks, PIXEL_TOLERANCE),
            (self.sem_seg, MAP_TOLERANCE),
            (self.panoptic, PIXEL_TOLERANCE),
        )
        return all(value is None or value <= limit for value, limit in limits)


@torch.no_grad()
def predicted(model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Detectron2's result of an image (3, H, W), at its size."""
    height, width = image.shape[-2:]
    return model.eval()([{"image": image, "height": height, "width": width}])[0]


def difference(expected: Mapping[str, Any], outputs: Arrays) -> Difference:
    """Compares a result of Detectron2's form with the outputs of a program.

    Args:
        expected: see :func:`predicted`.
        outputs: by name, see ``convmask.export.wrapper``.
    """
    found: dict[str, Any] = {}
    if "instances" in expected:
        found.update(_instances(expected["instances"], outputs))
    if "sem_seg" in expected:
        true = expected["sem_seg"].numpy()
        found["sem_seg"] = float(np.abs(true - outputs["sem_seg"]).max() / max(1.0, np.abs(true).max()))
    if "panoptic_seg" in expected:
        ids, segments = expected["panoptic_seg"]
        found["panoptic"] = _panoptic(ids, segments, outputs)
    return Difference(**found)


def _instances(expected: Any, outputs: Arrays) -> dict[str, Any]:
    scores, classes = expected.scores.numpy(), expected.pred_classes.numpy()
    boxes = expected.pred_boxes.tensor.numpy()
    masks = expected.pred_masks.numpy() if expected.has("pred_masks") and "masks" in outputs else None
    free = outputs["valid"].astype(bool).copy()
    result = {"instances": len(scores), "missing": 0, "scores": 0.0, "boxes": 0.0}
    wrong = 0
    for index in range(len(scores)):
        near = np.abs(outputs["scores"] - scores[index]) <= SCORE_TOLERANCE
        candidates = np.flatnonzero(free & near & (outputs["classes"] == classes[index]))
        if not len(candidates):
            result["missing"] += 1
            continue
        # several have this score: the one whose box is the nearest
        away = np.abs(outputs["boxes"][candidates] - boxes[index]).max(axis=1)
        mine = candidates[away.argmin()]
        free[mine] = False
        result["scores"] = max(result["scores"], float(abs(outputs["scores"][mine] - scores[index])))
        result["boxes"] = max(result["boxes"], float(away.min()))
        if masks is not None:
            wrong += int((masks[index] != outputs["masks"][mine]).sum())
    result["missing"] += int(free.sum())
    if masks is not None:
        result["masks"] = wrong / max(1, int(masks.sum()))
    return result


def _panoptic(ids: torch.Tensor, segments: list[dict[str, Any]], outputs: Arrays) -> float:
    """The share of pixels that are not in a pair of segments, one of either map, of the same category."""
    true, mine = ids.numpy(), outputs["panoptic_seg"]
    category_of = {int(x["id"]): (bool(x["isthing"]), int(x["category_id"])) for x in segments}
    thing_classes = outputs.get("thing_classes", outputs.get("classes"))
    assert thing_classes is not None
    mine_of = {int(id_): (True, int(c)) for id_, c in zip(outputs["thing_ids"], thing_classes, strict=True) if id_}
    mine_of.update({int(id_): (False, category) for category, id_ in enumerate(outputs["stuff_ids"]) if id_})
    pairs, counts = np.unique(np.stack([true.ravel(), mine.ravel()]), axis=1, return_counts=True)
    agreed, taken_true, taken_mine = 0, set(), set()
    for index in np.argsort(-counts, kind="stable"):
        a, b = int(pairs[0, index]), int(pairs[1, index])
        same = category_of.get(a) == mine_of.get(b) and (a == 0) == (b == 0)
        if same and a not in taken_true and b not in taken_mine:
            taken_true.add(a)
            taken_mine.add(b)
            agreed += int(counts[index])
    return 1 - agreed / true.size
