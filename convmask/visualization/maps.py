"""Pictures of what a network holds inside: scores, signed maps, vectors, probabilities.

Shapes: H x W pixels of the picture, h x w cells of a map. Pictures are uint8, RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from convmask.visualization.colors import Color

Size = tuple[int, int]
# Standard deviations of a component that the range of a colour spans, on either side of the mean.
_SPREAD = 2.0
# Brightness of the image below maps of probabilities.
_BELOW = 0.35


def shown_size(height: int, width: int, longest: int) -> Size:
    """(H, W) of a picture of an image whose longer side becomes ``longest``."""
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled(picture: np.ndarray, size: Size, smooth: bool = True) -> np.ndarray:
    """A picture (h, w, 3) brought to ``size``; without ``smooth`` its cells stay squares."""
    if picture.shape[:2] == size:
        return np.ascontiguousarray(picture)
    larger = size[0] > picture.shape[0]
    interpolation = (cv2.INTER_CUBIC if larger else cv2.INTER_AREA) if smooth else cv2.INTER_NEAREST
    return cv2.resize(np.ascontiguousarray(picture), size[::-1], interpolation=interpolation)


def input_picture(inputs: Mapping[str, Any], channels: str, size: Size | None = None) -> np.ndarray:
    """The image that a model is given, as a picture.

    Args:
        inputs: Detectron2's dict of one image, with ``image`` (3, h, w).
        channels: their order, "BGR" or "RGB": ``INPUT.FORMAT``.
        size: of the picture; by default the image's.
    """
    image = inputs["image"].permute(1, 2, 0).cpu().numpy()
    image = np.ascontiguousarray(image[..., ::-1] if channels == "BGR" else image)
    return scaled(image, size or (image.shape[0], image.shape[1])).astype(np.uint8)


def enlarged(maps: torch.Tensor, padded: Size, image: Size, size: Size) -> torch.Tensor:
    """(n, h, w) maps of a padded image to (n, H, W), bilinear, the padding cut off.

    Args:
        maps: of all of the padded image, the last cells perhaps reaching beyond it.
        padded: (height, width) that the network saw.
        image: the part of it that is the image.
        size: (H, W).
    """
    if len(maps) == 0:
        return maps.new_zeros(0, *size)
    whole = F.interpolate(maps[None].float(), padded, mode="bilinear", align_corners=False)
    return F.interpolate(whole[..., : image[0], : image[1]], size, mode="bilinear", align_corners=False)[0]


def heat(values: torch.Tensor | np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """(H, W) values as colours, dark at ``low`` and bright at ``high``; what is not finite is dark."""
    return _colored(values, low, high, "inferno")


def signed(values: torch.Tensor | np.ndarray, limit: float) -> np.ndarray:
    """(H, W) values as colours: blue at ``-limit``, white at 0, red at ``limit``."""
    return _colored(values, -limit, limit, "RdBu_r")


def _colored(values: torch.Tensor | np.ndarray, low: float, high: float, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    share = (np.nan_to_num(array.astype(np.float64), nan=low) - low) / max(high - low, 1e-12)
    colors = matplotlib.colormaps[name](np.clip(share, 0, 1))[..., :3]
    return (255 * colors).round().astype(np.uint8)


def principal_colors(vectors: torch.Tensor) -> torch.Tensor:
    """(h, w, 3) from 0 to 1: the first three principal components of a (D, h, w) map; 1/2 is the mean.

    Components are there as far as D and the number of cells go; the others are 1/2 everywhere.
    """
    flat = vectors.detach().cpu().flatten(1).T.double()
    flat = flat - flat.mean(0)
    components = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    # the sign is arbitrary: the largest entry is positive
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    projected = flat @ (components * largest.sign()).T
    deviation = projected.square().mean(0).sqrt()
    colors = 0.5 + projected / (2 * _SPREAD * deviation.clamp(min=1e-12))
    colors = F.pad(colors, (0, 3 - colors.shape[1]), value=0.5)
    return colors.clamp(0, 1).float().view(*vectors.shape[1:], 3)


def painted(image: np.ndarray, maps: torch.Tensor, colors: Sequence[Color]) -> np.ndarray:
    """Each of (n, H, W) probabilities in its colour, added to the darkened image (H, W, 3)."""
    maps = maps.detach().float().cpu()
    light = torch.einsum("nhw,nc->hwc", maps, torch.tensor(colors, dtype=torch.float32).view(-1, 3))
    total = maps.sum(dim=0)[..., None]
    below = torch.from_numpy(image.astype(np.float32)) * _BELOW
    picture = below * (1 - 0.7 * total.clamp(max=1)) + light / total.clamp(min=1)
    return picture.clamp(0, 255).byte().numpy()


def outlined(picture: np.ndarray, box: Sequence[float], color: Color = (255, 60, 60), thickness: int = 2) -> np.ndarray:
    """A copy with the frame of a box (x1, y1, x2, y2), in pixels of the picture."""
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    return cv2.rectangle(np.ascontiguousarray(picture).copy(), (x1, y1), (x2, y2), color, thickness)


def tiles(rows: Sequence[Sequence[np.ndarray]], gap: int = 2, background: int = 255) -> np.ndarray:
    """Pictures of one size in rows and columns, with gaps between them; a short row ends in background."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3
    sheet = np.full(shape, background, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * (height + gap) :, x * (width + gap) :][:height, :width] = picture
    return sheet
