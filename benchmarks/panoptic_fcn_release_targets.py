"""Targets of Panoptic FCN made plainly, by the rules and in the manner of the original release.

One image after the other: the one-hot semantic map and every mask are resized at full size, instances are taken one by
one, Gaussians are drawn with numpy, and each level has its own copies of the masks, padded to 100 with 255. The oracle
of the tests and the other side of the benchmark of ``convmask.projects.panoptic_fcn.targets``.

Two rules of the release are kept here that the library does not follow: a mask that vanishes when it is reduced has its
centre at (0, 0), and a centre may be one cell beyond its level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int]

# rows that the release has for the instances of a level, and what it fills those without an instance with
ROWS, FILL = 100, 255.0
STRIDE = 4


@dataclass
class LevelTargets:
    """One level of one image.

    Attributes:
        centers: (C, H_l, W_l).
        masks: (100, h, w) shares, 255 in rows without an instance.
        valid: (100,) bool, rows that have an instance.
        classes: (100,) int64.
        regions: (S, H_l, W_l) shares of at least 1/2, 0 elsewhere.
        region_masks: (S, H_l, W_l), 1 where the shares are positive, of the classes that there are first.
        region_shares: (S, h, w) shares of the same classes.
        region_valid: (S,) bool, rows that have a class.
    """

    centers: Tensor
    masks: Tensor
    valid: Tensor
    classes: Tensor
    regions: Tensor
    region_masks: Tensor
    region_shares: Tensor
    region_valid: Tensor


@dataclass(frozen=True)
class ReleaseTargets:
    """The release's options: its defaults for COCO but for the classes.

    Attributes:
        num_classes: C.
        num_regions: S, label 0 ("things") among them.
        scales: least and greatest square root of the box areas of each level.
        min_overlap: of a moved box.
        gaussian_sigma: window over standard deviation.
    """

    num_classes: int = 80
    num_regions: int = 54
    scales: tuple[tuple[float, float], ...] = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    min_overlap: float = 0.7
    gaussian_sigma: float = 3.0

    def batch(
        self,
        instances: Sequence[Instances],
        sem_segs: Sequence[Tensor],
        *,
        padded: Size,
        common: Size,
        levels: Sequence[Size],
    ) -> list[list[LevelTargets]]:
        """The targets of each level of each image; arguments as ``make_targets`` has them."""
        return [self.image(x, sem_seg, padded, common, levels) for x, sem_seg in zip(instances, sem_segs, strict=True)]

    def image(
        self, instances: Instances, sem_seg: Tensor, padded: Size, common: Size, levels: Sequence[Size]
    ) -> list[LevelTargets]:
        """The targets of each level of one image."""
        semantic = self.semantic_map(sem_seg, common)
        masks = torch.zeros(len(instances), *common)
        centers = []
        for index in range(len(instances)):
            reduced = reduce(instances.gt_masks.tensor[index][None].float())
            masks[index, : reduced.shape[1], : reduced.shape[2]] = reduced[0]
            centers.append(center_of_mass(masks[index]))
        boxes = instances.gt_boxes.tensor
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        result = []
        for size, (least, greatest) in zip(levels, self.scales, strict=True):
            found = [index for index in range(len(instances)) if least <= sides[index] <= greatest]
            level_masks = torch.full((ROWS, *common), FILL)
            valid = torch.zeros(ROWS, dtype=torch.bool)
            classes = torch.zeros(ROWS, dtype=torch.int64)
            heatmap = np.zeros((self.num_classes, *size), np.float32)
            for row, index in enumerate(found):
                level_masks[row] = masks[index]
                valid[row] = True
                classes[row] = instances.gt_classes[index]
                x, y = (centers[index] * torch.tensor([size[1] / common[1], size[0] / common[0]])).long().tolist()
                x, y = min(max(x, 0), size[1]), min(max(y, 0), size[0])
                width, height = (boxes[index, 2:] - boxes[index, :2]).tolist()
                radius = self.radius(width * size[1] / padded[1], height * size[0] / padded[0])
                self.draw(heatmap[int(instances.gt_classes[index])], x, y, radius)
            regions = self.regions(semantic, size)
            result.append(LevelTargets(torch.from_numpy(heatmap), level_masks, valid, classes, *regions))
        return result

    def semantic_map(self, sem_seg: Tensor, common: Size) -> Tensor:
        """(S, h, w) shares of the labels; pixels without a label have a class of their own, which is dropped."""
        labels = torch.where(sem_seg == 255, self.num_regions, sem_seg)
        one_hot = functional.one_hot(labels, self.num_regions + 1).permute(2, 0, 1)[:-1].float()
        reduced = reduce(one_hot)
        canvas = torch.zeros(self.num_regions, *common)
        canvas[:, : reduced.shape[1], : reduced.shape[2]] = reduced
        return canvas

    def regions(self, semantic: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last four attributes of :class:`LevelTargets`."""
        scores = functional.interpolate(semantic[None], size=size, mode="bilinear", align_corners=False)[0]
        scores = scores.clamp(max=1)
        scores[scores < 0.5] = 0
        masks, shares = torch.zeros_like(scores), torch.zeros_like(semantic)
        valid = torch.zeros(self.num_regions, dtype=torch.bool)
        present = (scores > 0).flatten(1).any(dim=1).nonzero()[:, 0]
        for row, label in enumerate(present.tolist()):
            masks[row] = (scores[label] > 0).float()
            shares[row] = semantic[label]
            valid[row] = True
        return scores, masks, shares, valid

    def radius(self, width: float, height: float) -> int:
        """How far a box of these sides, in cells, may move: the least of the release's three cases."""
        total, area, overlap = width + height, width * height, self.min_overlap
        first = (total + np.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
        second = (2 * total + np.sqrt(4 * total**2 - 16 * (1 - overlap) * area)) / 2
        third = (-2 * overlap * total + np.sqrt(4 * overlap**2 * total**2 + 16 * overlap * (1 - overlap) * area)) / 2
        return max(int(min(first, second, third)), 0)

    def draw(self, heatmap: np.ndarray, x: int, y: int, radius: int) -> None:
        """Draws one Gaussian into (H_l, W_l), the maximum where there is one."""
        height, width = heatmap.shape
        left, right = min(x, radius), min(width - x, radius + 1)
        top, bottom = min(y, radius), min(height - y, radius + 1)
        sigma = (2 * radius + 1) / self.gaussian_sigma
        dy, dx = np.ogrid[-radius : radius + 1, -radius : radius + 1]
        window = np.exp(-(dx * dx + dy * dy) / (2 * sigma * sigma))
        window[window < np.finfo(window.dtype).eps * window.max()] = 0
        target = heatmap[y - top : y + bottom, x - left : x + right]
        np.maximum(target, window[radius - top : radius + bottom, radius - left : radius + right], out=target)


def reduce(maps: Tensor) -> Tensor:
    """Resizes (K, H, W) to a quarter, halves rounded up."""
    height, width = maps.shape[1:]
    size = (int(height / STRIDE + 0.5), int(width / STRIDE + 0.5))
    return functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def center_of_mass(mask: Tensor) -> Tensor:
    """(x, y) of the cells of (h, w) that are not 0; (0, 0) where all are."""
    cells = mask.nonzero()
    if len(cells) == 0:
        return torch.zeros(2)
    return cells.float().mean(dim=0).flip(0)
