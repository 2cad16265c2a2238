"""What the viewer and ``figure.py`` show of K-Net: the masks of its kernels, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from convmask.demo.methods import Threshold
from convmask.visualization.colors import Color, class_color, object_color
from convmask.visualization.draw import draw_segments
from convmask.visualization.maps import enlarged, heat, input_picture, painted, principal_colors, shown_size, tiles
from convmask.visualization.segments import semantic_segments

from .inference import Frame, full_size, merge_scores
from .meta_arch import KNet

Size = tuple[int, int]

_LONGEST = 480
# Kernels in the table of rounds, and the longer side of its pictures.
_ROWS, _CELL = 6, 150
_CAPTION, _GAP = 18, 6
# How bright the pixels outside of a mask are.
_OUTSIDE = 0.25
# Kernels below this score are not painted.
_LEAST_SCORE = 0.3


def thresholds(cfg: CfgNode) -> list[Threshold]:
    """Those of masks and panoptic map; a semantic model has none."""
    node = "MODEL.KNET"
    if cfg.MODEL.KNET.TASK == "semantic":
        return []
    mask = Threshold("Mask probability", f"{node}.INFERENCE.MASK_THRESH", "inference_options.mask_threshold")
    if cfg.MODEL.KNET.TASK == "instance":
        return [mask]
    score, overlap = f"{node}.COMBINE.INSTANCES_CONFIDENCE_THRESH", f"{node}.COMBINE.OVERLAP_THRESH"
    return [
        mask,
        Threshold("Panoptic map: least score of an object", score, "inference_options.things_threshold"),
        Threshold("Panoptic map: least share that is kept", overlap, "inference_options.overlap_threshold"),
    ]


class Rounds(NamedTuple):
    """The best kernels of an instance or panoptic model, in descending order of the last round's score.

    Attributes:
        titles: of the stages: "first kernels", "round 1" and so on.
        masks: of each stage, (n, H, W) probabilities.
        scores: (n,) of the last round.
        labels: (n,) thing classes, then stuff classes.
        image: (H, W, 3), RGB.
        features: (C, h, w) that kernels are applied to, of the padded image.
        frame: the sizes that a mask goes through.
    """

    titles: list[str]
    masks: list[torch.Tensor]
    scores: torch.Tensor
    labels: torch.Tensor
    image: np.ndarray
    features: torch.Tensor
    frame: Frame


@torch.no_grad()
def run(model: KNet, inputs: Mapping[str, Any], count: int, size: Size, least_score: float = 0.0) -> Rounds:
    """Runs an instance or panoptic model on one image.

    Args:
        model: in evaluation mode.
        inputs: Detectron2's dict of the image.
        count: kernels that are taken, the best ones.
        size: that their masks are scaled to.
        least_score: of those after the first.
    """
    assert model.kernel_head is not None
    images = model.preprocess_image([dict(inputs)])
    outputs, rounds = model.predict(images.tensor)
    height, width = (int(x) for x in images.image_sizes[0])
    frame = Frame((images.tensor.shape[2], images.tensor.shape[3]), (height, width), size)
    last = rounds[-1].class_logits
    assert last is not None
    scores, labels = merge_scores(last[0].sigmoid().cpu(), model.kernel_head.num_thing_classes)
    best = scores.argsort(descending=True)[:count]
    best = best[: max(1, int((scores[best] >= least_score).sum()))]
    masks = []
    for stage in (outputs.start, *rounds):
        chunks = full_size(stage.mask_logits[0].cpu()[best], 1, frame, 2**24)
        masks.append(torch.cat([x for _, x in chunks]))
    titles = ["first kernels", *(f"round {number}" for number in range(1, len(rounds) + 1))]
    image = input_picture(inputs, model.input_format, size)
    return Rounds(titles, masks, scores[best], labels[best], image, outputs.features[0].cpu(), frame)


def class_names(metadata: Metadata) -> list[str]:
    """Names of thing classes, then of stuff classes."""
    # stuff class 0 is "things"
    return [*(metadata.get("thing_classes", None) or []), *(metadata.get("stuff_classes", None) or ["things"])[1:]]


def rounds_table(rounds: Rounds, names: Sequence[str], rows: int) -> np.ndarray:
    """A row for each of the best kernels, a column for the image and each stage.

    A cell is the image where the kernel's mask has a probability of one half and more, dark elsewhere: the pixels that
    it gathers features from in the next round.
    """
    table = []
    for row, (score, label) in enumerate(zip(rounds.scores[:rows].tolist(), rounds.labels.tolist(), strict=False)):
        cells = [_captioned(rounds.image, "image" if row == 0 else "")]
        name = names[label] if label < len(names) else f"class {label}"
        for title, masks in zip(rounds.titles, rounds.masks, strict=True):
            text = title if row == 0 else ""
            if title == rounds.titles[-1]:
                text = f"{name} {score:.2f}" if row else f"{title}: {name}"
            cells.append(_captioned(_attended(rounds.image, masks[row]), text))
        table.append(cells)
    return tiles(table, gap=_GAP)


def _attended(image: np.ndarray, probability: torch.Tensor) -> np.ndarray:
    """The image (H, W, 3), dark where the probability (H, W) is below one half."""
    inside = (probability.numpy() >= 0.5)[..., None]
    return np.where(inside, image, (image * _OUTSIDE)).astype(np.uint8)


def _captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text above it."""
    strip = np.full((_CAPTION, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (1, _CAPTION - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])


def inner_pictures(model: KNet, inputs: Mapping[str, Any], metadata: Metadata, chosen: int) -> dict[str, np.ndarray]:
    """The features, all kernels of a fair score round by round, and the best ones one by one."""
    height, width = inputs["image"].shape[-2:]
    size = shown_size(height, width, _LONGEST)
    if model.sem_seg_head is not None:
        return _semantic_pictures(model, inputs, metadata, size)
    # the last round's score decides, so that a kernel can be followed
    rounds = run(model, inputs, 100, size, _LEAST_SCORE)
    features = principal_colors(rounds.features).permute(2, 0, 1)
    components = enlarged(features, rounds.frame.padded, rounds.frame.image, size)
    pictures = {"features: three principal components": (255 * components).permute(1, 2, 0).byte().numpy()}
    assert model.kernel_head is not None
    colors = _colors(rounds, model.kernel_head.num_thing_classes, metadata)
    for title, masks in zip(rounds.titles, rounds.masks, strict=True):
        pictures[f"{title}: masks of {len(colors)} kernels"] = painted(rounds.image, masks, colors)
    small = run(model, inputs, _ROWS, shown_size(height, width, _CELL))
    pictures["the best kernels, one a row: pixels that they attend to"] = rounds_table(
        small, class_names(metadata), _ROWS
    )
    return pictures


def _colors(rounds: Rounds, num_things: int, metadata: Metadata) -> list[Color]:
    """Colours of the kernels, as those of the segments that they become."""
    one_class = num_things == 1
    height, width = rounds.image.shape[:2]
    colors = []
    for probability, label in zip(rounds.masks[-1], rounds.labels.tolist(), strict=True):
        if label >= num_things:
            colors.append(class_color(metadata, label - num_things + 1, False))
            continue
        weights = probability / probability.sum().clamp(min=1e-6)
        y = float((weights.sum(dim=1) * torch.arange(height)).sum()) / height
        x = float((weights.sum(dim=0) * torch.arange(width)).sum()) / width
        colors.append(object_color(class_color(metadata, label, True), (x, y), one_class))
    return colors


def _semantic_pictures(model: KNet, inputs: Mapping[str, Any], metadata: Metadata, size: Size) -> dict[str, np.ndarray]:
    """Labels and confidence of each round of a semantic model."""
    assert model.sem_seg_head is not None
    images = model.preprocess_image([dict(inputs)])
    padded = images.tensor.shape[2], images.tensor.shape[3]
    frame = int(images.image_sizes[0][0]), int(images.image_sizes[0][1])
    _, rounds = model.sem_seg_head.predict(model.backbone(images.tensor))
    image = input_picture(inputs, model.input_format, size)
    pictures = {}
    for number, stage in enumerate(rounds):
        title = f"round {number}" if number else "first kernels"
        probabilities = enlarged(stage.mask_logits[0].softmax(dim=0), padded, frame, size)
        segments = semantic_segments(probabilities, metadata)
        pictures[f"{title}: labels"] = draw_segments(image, segments, scores=False)
        pictures[f"{title}: confidence"] = heat(probabilities.amax(dim=0))
    return pictures
