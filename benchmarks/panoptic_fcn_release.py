"""What follows the heads of Panoptic FCN as its release computes it: the same steps in the same order, at full size.

A plain implementation to compare with: `bench_panoptic_fcn_postprocessing.py` measures it, the tests take it for the
truth. Every mask is scaled up by the common stride on the whole canvas, cut, and scaled once more to the output; the
panoptic map is painted object by object. The switches that the release does not have are not here.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks
from torch import Tensor
from torch.nn import functional

from convmask.projects.panoptic_fcn.heads import HeadOutputs
from convmask.projects.panoptic_fcn.meta_arch import PanopticFCN

# Least score of an instance after rescoring, and windows of the levels: constants of the release.
SCORE_THRESHOLD = 0.05
WINDOWS = (3, 3, 3, 5, 5)

Size = tuple[int, int]
Found = tuple[Tensor, Tensor, Tensor]


def release_postprocessing(
    model: PanopticFCN, outputs: HeadOutputs, stride: int, image: Size, output: Size
) -> dict[str, Any]:
    """The result for one image, by the options and embeddings of ``model``.

    Args:
        model: only its options and embeddings are used.
        outputs: of the heads, without the batch dimension.
        stride: the common stride.
        image: height and width that the network saw, without padding.
        output: height and width of the result.

    Returns:
        ``scores``, ``classes``, ``masks`` (n, H, W) bool and ``boxes`` of the instances; ``sem_seg`` (labels, H, W);
        ``panoptic`` (H, W) and ``segments``.
    """
    things, stuff = release_kernels(model, outputs)
    instances = thing_masks(model, things, outputs.encoded, stride, image, output)
    sem_seg = stuff_map(model, stuff, outputs.encoded, stride, image, output)
    panoptic, segments = combine(model, instances, sem_seg)
    names = ("scores", "classes", "masks", "boxes")
    return {**dict(zip(names, instances, strict=True)), "sem_seg": sem_seg, "panoptic": panoptic, "segments": segments}


def release_kernels(model: PanopticFCN, outputs: HeadOutputs) -> tuple[Found, tuple[Tensor, Tensor]]:
    """Fused kernels: of things with scores and classes, of stuff with labels."""
    options = model.inference_options
    found = [
        centers_of_level(*maps, window, options.thing_threshold, options.top_num // 2)
        for *maps, window in zip(outputs.centers, outputs.kernels, WINDOWS, strict=False)
    ]
    vectors, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.argsort(scores, descending=True)
    vectors, scores, classes = vectors[order], scores[order], classes[order]
    vectors = model.thing_embedding(vectors)
    things = fuse(vectors, scores, classes, options.similar_threshold, options.class_specific)

    regions = [
        regions_of_level(*maps, options.stuff_threshold) for maps in zip(outputs.regions, outputs.kernels, strict=True)
    ]
    vectors, labels = (torch.cat(parts) for parts in zip(*regions, strict=True))
    vectors = model.stuff_embedding(vectors)
    if not model.target_options.with_things:
        labels = labels + 1
    present = labels.unique()
    means = [vectors[labels == label].mean(dim=0) for label in present]
    return things, (torch.stack(means) if means else vectors, present)


def centers_of_level(logits: Tensor, kernels: Tensor, window: int, threshold: float, limit: int) -> Found:
    """Vectors of the kernel map at the peaks, with scores and classes."""
    scores = logits.sigmoid()[None]
    average = functional.avg_pool2d(scores, window, stride=1, padding=(window - 1) // 2)
    scores = (scores + average) / 2
    highest = functional.max_pool2d(scores, 3, stride=1, padding=1)
    scores = scores * (highest == scores).float()
    limit = min(limit, scores.shape[2] * scores.shape[3])
    best, cells = torch.topk(scores.view(scores.shape[1], -1), limit)
    values, chosen = torch.topk(best.view(-1), limit)
    classes, cells = chosen // limit, cells.view(-1)[chosen]
    keep = values > threshold
    vectors = kernels.view(kernels.shape[0], -1)[:, cells[keep]].T
    return vectors, values[keep], classes[keep]


def regions_of_level(logits: Tensor, kernels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Averages of the kernel map over the regions, and the regions' classes."""
    scores = logits.sigmoid()
    winner = scores.argmax(dim=0)
    masks, classes = [], []
    for label in winner.unique():
        mask = (winner == label).float()
        if (scores[label] * mask).sum() / mask.sum() > threshold:
            masks.append(mask)
            classes.append(label)
    if not masks:
        return kernels.new_zeros(0, len(kernels)), winner.new_zeros(0)
    product = kernels[None] * torch.stack(masks)[:, None]
    return functional.adaptive_avg_pool2d(product, 1).flatten(1), torch.stack(classes)


def fuse(vectors: Tensor, scores: Tensor, classes: Tensor, threshold: float, class_specific: bool) -> Found:
    """Similar kernels, in descending order of score, to their means."""
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-8)
    similar = (unit @ unit.T).triu(diagonal=0) >= threshold
    if class_specific:
        similar = similar & (classes[:, None] == classes[None])
    is_first = torch.cumsum(similar.float(), dim=0) < 2
    keep = is_first.diagonal()
    members = (similar[keep] & is_first[keep]).float()
    return members @ vectors / members.sum(dim=1, keepdim=True), scores[keep], classes[keep]


def thing_masks(
    model: PanopticFCN, things: Found, encoded: Tensor, stride: int, image: Size, output: Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, classes, masks and boxes."""
    options = model.inference_options
    vectors, scores, classes = things
    logits = torch.mm(vectors, encoded.view(encoded.shape[0], -1)).view(-1, *encoded.shape[1:])
    probabilities = logits.sigmoid()
    inside = probabilities > options.mask_threshold
    total = (probabilities * inside.float()).sum(dim=(1, 2))
    scores = scores * total / (inside.sum(dim=(1, 2)).float() + 1e-6)
    order = torch.argsort(scores, descending=True)
    order = order[scores[order] >= SCORE_THRESHOLD][: options.top_num]
    masks = to_output(probabilities[order], stride, image, output) > options.mask_threshold
    return scores[order], classes[order], masks, BitMasks(masks).get_bounding_boxes().tensor


def stuff_map(
    model: PanopticFCN, stuff: tuple[Tensor, Tensor], encoded: Tensor, stride: int, image: Size, output: Size
) -> Tensor:
    """Probabilities (labels, H, W), 0 for labels that were not found."""
    vectors, labels = stuff
    logits = torch.mm(vectors, encoded.view(encoded.shape[0], -1)).view(-1, *encoded.shape[1:])
    count = model.target_options.num_regions + (not model.target_options.with_things)
    sem_seg = encoded.new_zeros(count, *output)
    sem_seg[labels] = to_output(logits.sigmoid(), stride, image, output)
    return sem_seg


def to_output(maps: Tensor, stride: int, image: Size, output: Size) -> Tensor:
    """(n, h, w) maps scaled up by the stride, cut to the image, scaled to the output."""
    if len(maps) == 0:
        return maps.new_zeros(0, *output)
    maps = functional.interpolate(maps[None], scale_factor=stride, mode="bilinear", align_corners=False)
    maps = maps[:, :, : image[0], : image[1]]
    return functional.interpolate(maps, size=output, mode="bilinear", align_corners=False)[0]


def combine(
    model: PanopticFCN, instances: tuple[Tensor, Tensor, Tensor, Tensor], sem_seg: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The panoptic map (H, W) int32 and its segments: things by score, then stuff where nothing is."""
    options = model.combine_options
    scores, classes, masks, _ = instances
    panoptic = torch.zeros(sem_seg.shape[1:], dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    confident = scores >= options["score_threshold"]
    scores, classes, masks = scores[confident], classes[confident], masks[confident]
    for index in torch.argsort(scores, descending=True).tolist():
        mask = masks[index]
        area = mask.sum().item()
        if area == 0:
            continue
        taken = (mask & (panoptic > 0)).sum().item()
        if taken / area > options["overlap_threshold"]:
            continue
        panoptic[mask & (panoptic == 0)] = len(segments) + 1
        segments.append(
            {
                "id": len(segments) + 1,
                "isthing": True,
                "score": scores[index].item(),
                "category_id": classes[index].item(),
                "instance_id": index,
            }
        )
    labels = sem_seg.argmax(dim=0)
    for label in labels.unique().tolist():
        if label == 0:
            continue
        mask = (labels == label) & (panoptic == 0)
        area = mask.sum().item()
        if area < options["stuff_area_limit"]:
            continue
        panoptic[mask] = len(segments) + 1
        segments.append({"id": len(segments) + 1, "isthing": False, "category_id": label, "area": area})
    return panoptic, segments
