"""Mask voting against the reference's CPU procedure in numpy and OpenCV, on the same random input in the same run.

    python benchmarks/bench_mask_voting.py [--rois 600 --classes 81 --height 600 --width 1000 --repeats 5]

The alternative is that procedure written anew: NMS in numpy, class after class; then for each result every candidate's
mask resized by OpenCV, binarised and added to a canvas of the image's size; extent and final resizing. RoIs are
clustered around objects, as those of the RPN are, and as in two rounds half of them are refined copies. Prints medians
in milliseconds, for each number of threads of ours (OpenCV uses one).
"""

from __future__ import annotations

import argparse
from typing import Any

import cv2
import numpy as np
import torch

from convmask.benchmark import median_times, processor
from convmask.ops import extension_status, mask_voting

NMS, MERGE, BINARY, LEAST, LIMIT = 0.3, 0.5, 0.4, 1e-3, 100


def draw(rois: int, classes: int, height: int, width: int, objects: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks (R, 21, 21), boxes (R, 4) and scores (R, C), float32."""
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(np.log(40), np.log(400), (objects, 2)))
    centre = random.uniform(0, 1, (objects, 2)) * [width, height]
    which = random.integers(objects, size=rois)
    noise = random.normal(0, 0.08, (rois, 4)) * np.tile(sides[which], 2)
    boxes = np.concatenate([centre[which] - sides[which] / 2, centre[which] + sides[which] / 2], axis=1) + noise
    boxes = np.clip(boxes, 0, [width - 1, height - 1, width - 1, height - 1])
    y, x = np.mgrid[-1:1:21j, -1:1:21j]
    shape = 4 * (1.1 - x**2 - y**2)
    masks = 1 / (1 + np.exp(-shape - random.normal(0, 0.5, (rois, 21, 21))))
    logits = random.normal(0, 1, (rois, classes))
    logits[np.arange(rois), 1 + which % (classes - 1)] += random.uniform(2, 9, rois)
    logits[:, 0] += random.uniform(0, 7, rois)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return masks.astype(np.float32), boxes.astype(np.float32), scores.astype(np.float32)


def areas_of(boxes: np.ndarray) -> np.ndarray:
    """Areas, both ends included."""
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def overlaps_with(box: np.ndarray, boxes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """IoU, both ends included, with boxes of given areas."""
    w = np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0]) + 1
    h = np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1]) + 1
    both = np.maximum(w, 0) * np.maximum(h, 0)
    return both / ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) + areas - both)


def suppress(boxes: np.ndarray, areas: np.ndarray, scores: np.ndarray) -> list[int]:
    """NMS of one class."""
    order, kept = np.argsort(-scores, kind="stable"), []
    while len(order):
        kept.append(int(order[0]))
        first, order = order[0], order[1:]
        order = order[overlaps_with(boxes[first], boxes[order], areas[order]) <= NMS]
    return kept[:LIMIT]


def vote(masks: np.ndarray, boxes: np.ndarray, scores: np.ndarray, height: int, width: int) -> list[Any]:
    """(box, score, class, mask) of each result, as the release's CPU procedure."""
    areas = areas_of(boxes)
    found = [(roi, c) for c in range(1, scores.shape[1]) for roi in suppress(boxes, areas, scores[:, c])]
    values = np.sort([scores[pair] for pair in found])[::-1]
    least = max(values[min(LIMIT, len(values)) - 1], LEAST)
    results = []
    for roi, category in found:
        if scores[roi, category] < least:
            continue
        candidates = np.flatnonzero(overlaps_with(boxes[roi], boxes, areas) >= MERGE)
        weights = scores[candidates, category] / scores[candidates, category].sum()
        canvas = np.zeros((height, width), np.float32)
        for candidate, weight in zip(candidates, weights, strict=True):
            x1, y1, x2, y2 = np.round(boxes[candidate]).astype(int)
            resized = cv2.resize(masks[candidate], (x2 - x1 + 1, y2 - y1 + 1))
            canvas[y1 : y2 + 1, x1 : x2 + 1] += weight * (resized >= BINARY)
        rows, columns = np.flatnonzero((canvas >= BINARY).any(axis=1)), np.flatnonzero((canvas >= BINARY).any(axis=0))
        if not len(rows):
            continue
        box = columns[0], rows[0], columns[-1], rows[-1]
        part = np.ascontiguousarray(canvas[box[1] : box[3] + 1, box[0] : box[2] + 1])
        results.append((box, scores[roi, category], category, cv2.resize(part, (21, 21))))
    return results


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rois", type=int, default=600)
    parser.add_argument("--classes", type=int, default=81)
    parser.add_argument("--objects", type=int, default=20)
    parser.add_argument("--height", type=int, default=600)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    cv2.setNumThreads(1)
    masks, boxes, scores = draw(args.rois, args.classes, args.height, args.width, args.objects)
    tensors = [torch.from_numpy(array) for array in (masks, boxes, scores)]
    size = args.height, args.width
    expected = vote(masks, boxes, scores, *size)
    found = mask_voting(*tensors, size, procedure="cpu")
    assert [tuple(box) for box in found[0].int().tolist()] == [tuple(map(int, box)) for box, *_ in expected]
    np.testing.assert_allclose(found[3], [mask for *_, mask in expected], atol=1e-4)

    print(
        f"{args.rois} RoIs around {args.objects} objects, {args.classes} classes, {args.height} x {args.width} pixels,"
    )
    print(f"{len(expected)} results; medians of {args.repeats} in milliseconds")
    print(f"{processor()}; torch {torch.__version__}; {extension_status()[1]}\n")
    print("| threads | numpy and OpenCV | mask_voting | ratio |")
    print("|---------|------------------|-------------|-------|")
    functions = {
        "alternative": lambda: vote(masks, boxes, scores, *size),
        "ours": lambda: mask_voting(*tensors, size, procedure="cpu"),
    }
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        times = median_times(functions, args.repeats)
        ratio = times["alternative"] / times["ours"]
        print(f"| {threads:7} | {1000 * times['alternative']:16.1f} | {1000 * times['ours']:11.2f} | {ratio:5.0f} |")


if __name__ == "__main__":
    main()
