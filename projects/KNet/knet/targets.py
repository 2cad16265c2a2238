"""What the kernels are trained on: soft masks of things and stuff, at the stride of supervision.

Shapes: T things and U stuff classes in an image, h x w cells at the stride of supervision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.structures import BitMasks, PolygonMasks
from torch.nn import functional as F

Size = tuple[int, int]


class ImageTargets(NamedTuple):
    """Of one image.

    Attributes:
        masks: (T, h, w) share of each cell that the thing covers.
        classes: (T,) thing classes.
        stuff_masks: (U, h, w), of the stuff classes that are in the image.
        stuff_classes: (U,) from 0, ascending.
    """

    masks: torch.Tensor
    classes: torch.Tensor
    stuff_masks: torch.Tensor
    stuff_classes: torch.Tensor


def reduce_masks(masks: torch.Tensor, padded: Size, stride: int) -> torch.Tensor:
    """Shares (N, H / stride, W / stride) float32 of bool masks (N, height, width), padded to (H, W).

    What bilinear interpolation gives: the mean of the four pixels in the middle of a cell. Only these are read.
    """
    height, width = masks.shape[1:]
    rows, columns = -height % stride, -width % stride
    if rows or columns:
        masks = F.pad(masks, (0, columns, 0, rows))
    if stride == 1:
        shares = masks.float()
    else:
        lower, upper = stride // 2 - 1, stride // 2
        corners = [masks[:, y::stride, x::stride].to(torch.uint8) for y in (lower, upper) for x in (lower, upper)]
        shares = torch.stack(corners).sum(dim=0, dtype=torch.uint8).float() / 4
    missing = padded[0] // stride - shares.shape[1], padded[1] // stride - shares.shape[2]
    return F.pad(shares, (0, missing[1], 0, missing[0]))


def make_targets(
    batched_inputs: Sequence[dict[str, Any]],
    padded: Size,
    stride: int,
    device: torch.device,
    *,
    num_thing_classes: int,
    num_stuff_classes: int,
) -> list[ImageTargets]:
    """The targets of a batch.

    Args:
        batched_inputs: with ``instances`` (``gt_classes``, and ``gt_masks`` where there is any) and, with stuff
            classes, ``sem_seg`` (H, W): 0 things, 1 to S stuff, 255 nothing.
        padded: height and width of the padded batch.
        stride: of supervision, a power of two.
        device: of the results.
        num_thing_classes: of the model.
        num_stuff_classes: of the model; 0: ``sem_seg`` is not needed.

    Raises:
        ValueError: targets are missing, or hold a class that the model lacks; names the image.
    """
    result = []
    for inputs in batched_inputs:
        name = inputs.get("file_name", "")
        for key in ("instances", "sem_seg") if num_stuff_classes else ("instances",):
            if key not in inputs:
                raise ValueError(
                    f"K-Net: no {key!r} for image {name!r}: check MODEL.KNET.TASK against INPUT.TARGETS and the dataset"
                )
        instances = inputs["instances"]
        classes = instances.gt_classes.to(device)
        _check_classes(classes, num_thing_classes, f"gt_classes of image {name!r}", "MODEL.KNET.NUM_THING_CLASSES")
        masks = reduce_masks(_bool_masks(instances, inputs["image"].shape[1:], device), padded, stride)
        present = classes.new_zeros(0)
        stuff = torch.zeros(0, *inputs["image"].shape[1:], dtype=torch.bool, device=device)
        if num_stuff_classes:
            sem_seg = inputs["sem_seg"].to(device)
            labels = sem_seg.unique()
            present = labels[(labels > 0) & (labels != 255)] - 1
            _check_classes(present, num_stuff_classes, f"sem_seg of image {name!r}", "MODEL.KNET.NUM_STUFF_CLASSES")
            stuff = sem_seg == (present + 1)[:, None, None]
        result.append(ImageTargets(masks, classes, reduce_masks(stuff, padded, stride), present))
    return result


def _bool_masks(instances: Any, size: torch.Size, device: torch.device) -> torch.Tensor:
    if not instances.has("gt_masks"):
        if len(instances):
            raise ValueError("K-Net needs masks: the dataset has instances with boxes alone")
        return torch.zeros(0, *size, dtype=torch.bool, device=device)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, int(size[0]), int(size[1]))
    tensor = masks.tensor if isinstance(masks, BitMasks) else torch.as_tensor(masks)
    return tensor.to(device=device, dtype=torch.bool)


def _check_classes(classes: torch.Tensor, count: int, what: str, key: str) -> None:
    if len(classes) and (int(classes.min()) < 0 or int(classes.max()) >= count):
        raise ValueError(f"{what} has class {int(classes.max())}, but {key} is {count}")
