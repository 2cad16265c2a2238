"""What the viewer and ``figure.py`` show of EmbedMask: scores, centre-ness, pixel embeddings, one proposal's mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from convmask.demo.methods import Threshold
from convmask.ops import embedding_masks
from convmask.visualization.maps import (
    enlarged,
    heat,
    input_picture,
    outlined,
    principal_colors,
    scaled,
    shown_size,
)

from .fcos import ConvMaskFCOS
from .fcos_head import FCOSOutputs
from .fcos_inference import Detections, detect
from .heads import EmbeddingOutputs, enlarge
from .losses import margins_in_use
from .meta_arch import EmbedMask

Size = tuple[int, int]

_LONGEST = 480


def thresholds(cfg: CfgNode) -> list[Threshold]:
    """Those of boxes and, where there are any, of masks."""
    node = "MODEL.EMBED_MASK.INFERENCE"
    found = [
        Threshold("Least class probability", f"{node}.SCORE_THRESH", "fcos_inference_options.score_threshold"),
        Threshold("NMS: IoU of boxes", f"{node}.NMS_THRESH", "fcos_inference_options.nms_threshold"),
    ]
    if cfg.MODEL.META_ARCHITECTURE == "EmbedMask":
        # the logarithm of the threshold is compared, and masks have a probability of 1 nowhere
        mask = Threshold("Mask probability", f"{node}.MASK_THRESH", "mask_options.threshold", low=0.01, high=0.99)
        found.insert(0, mask)
    return found


def embedding_picture(pixels: torch.Tensor, padded: Size, image: Size, size: Size) -> np.ndarray:
    """(H, W, 3): the first three principal components of a (D, h, w) pixel embedding as red, green and blue.

    Args:
        pixels: of the padded image.
        padded: (height, width) that the network saw.
        image: the part of it that is the image; its pixels alone make the components.
        size: of the picture.
    """
    rows, columns = (-(-image[i] * pixels.shape[1 + i] // padded[i]) for i in (0, 1))
    colors = principal_colors(pixels[:, :rows, :columns]).permute(2, 0, 1)
    seen = rows * padded[0] // pixels.shape[1], columns * padded[1] // pixels.shape[2]
    return (255 * enlarged(colors, seen, image, size)).permute(1, 2, 0).round().byte().numpy()


def inner_pictures(
    model: ConvMaskFCOS, inputs: Mapping[str, Any], metadata: Metadata, chosen: int
) -> dict[str, np.ndarray]:
    """Scores and centre-ness of the locations; of EmbedMask also embeddings, and the mask of a detection."""
    images = model.preprocess_image([dict(inputs)])
    image = int(images.image_sizes[0][0]), int(images.image_sizes[0][1])
    padded = images.tensor.shape[2], images.tensor.shape[3]
    size = shown_size(*image, _LONGEST)
    embeddings = None
    if isinstance(model, EmbedMask):
        outputs, embeddings = model.predict(images.tensor)
    else:
        features = model.backbone(images.tensor)
        outputs = model.fcos_head([features[name] for name in model.in_features]).float()
    locations = model.locations(outputs)
    pictures = _score_pictures(outputs, model.fcos_head.strides, padded, image, size)
    if embeddings is None or not isinstance(model, EmbedMask):
        return pictures
    pixels = enlarge(embeddings.pixels, model.scale_factor)[0]
    pictures["pixel embedding: three principal components"] = embedding_picture(pixels, padded, image, size)
    found = detect(outputs, locations, [image], model.fcos_inference_options)[0]
    if not len(found.scores):
        return pictures
    picture = input_picture(inputs, model.input_format, size)
    return {
        **pictures,
        **_proposal_pictures(model, pixels, embeddings, found, chosen, metadata, picture, padded, image),
    }


def _score_pictures(
    outputs: FCOSOutputs, strides: Sequence[int], padded: Size, image: Size, size: Size
) -> dict[str, np.ndarray]:
    """Class probability times centre-ness, the best of all levels, and the centre-ness of each level."""
    scores, pictures = [], {}
    for logits, centerness, stride in zip(outputs.logits, outputs.centerness, strides, strict=True):
        centers = centerness[0].sigmoid()
        scores.append(enlarged(logits[0].sigmoid().amax(dim=0, keepdim=True) * centers, padded, image, size)[0])
        whole = scaled(heat(centers[0]), padded, smooth=False)[: image[0], : image[1]]
        pictures[f"centre-ness, stride {stride}"] = scaled(whole, size, smooth=False)
    best = torch.stack(scores).amax(dim=0)
    return {f"class score x centre-ness, bright: {float(best.max()):.2f}": heat(best, 0, float(best.max())), **pictures}


def _proposal_pictures(
    model: EmbedMask,
    pixels: torch.Tensor,
    embeddings: EmbeddingOutputs,
    found: Detections,
    chosen: int,
    metadata: Metadata,
    picture: np.ndarray,
    padded: Size,
    image: Size,
) -> dict[str, np.ndarray]:
    """Of one detection its box, the distance of every pixel to its proposal, and the probability."""
    size = picture.shape[0], picture.shape[1]
    index = int(found.scores.argsort(descending=True)[min(chosen, len(found.scores) - 1)])
    location = found.locations[index]
    proposal = embeddings.flat_proposals()[0, location][None]
    margins = margins_in_use(embeddings.flat_margins()[0, location][None], model.mask_options.fixed_margin)
    logarithms = embedding_masks(pixels, proposal, margins)
    distance = (pixels - proposal[0, :, None, None]).square().sum(dim=0, keepdim=True).sqrt()
    far = float(distance.quantile(0.9)) if distance.numel() < 2**24 else float(distance.max())
    box = (found.boxes[index] * (size[1] / image[1])).tolist()
    names = metadata.get("thing_classes", None) or []
    category = int(found.classes[index])
    name = names[category] if category < len(names) else f"class {category}"
    near = 1 - enlarged(distance / max(far, 1e-12), padded, image, size)[0]
    probability = enlarged(logarithms.exp(), padded, image, size)[0]
    return {
        f"detection: {name}, {float(found.scores[index]):.2f}": outlined(picture, box),
        "distance to its proposal, bright: near": outlined(heat(near), box),
        "probability of its mask; only inside the box counts": outlined(heat(probability), box),
    }
