"""The score from which on a method's detections are believed, so that pictures of all methods can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from convmask.evaluation.coco import evaluate_detections


def best_threshold(truth: COCO, detections: Sequence[Mapping[str, Any]], limit: int) -> tuple[float, float]:
    """The threshold on the scores at which the F1 of masks, matched at an IoU of 0.5, is highest.

    F1 = 2 P R / (P + R) on COCO's 101 recalls, the mean over the classes that have objects. COCO's precision at a
    recall is the best at that recall or above, so this is an upper bound, as AP is.

    Args:
        truth: ground truth.
        detections: in COCO's results format, with masks.
        limit: of detections an image.

    Returns:
        the threshold, the lowest of the classes', and F1, both in [0, 1]; 1 and 0 without any match.
    """
    evaluation = evaluate_detections(truth, detections, "segm", limit)
    half = int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, 0.5))[0])
    precision, scores = (evaluation.eval[name][half, :, :, 0, -1] for name in ("precision", "scores"))
    recall = evaluation.params.recThrs[:, None]
    with_objects = (precision > -1).any(axis=0)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = f1.argmax(axis=0)
    columns = np.flatnonzero(with_objects & (f1.max(axis=0) > 0))
    if not len(columns):
        return 1.0, 0.0
    return float(scores[best[columns], columns].min()), float(f1.max(axis=0)[with_objects].mean())
