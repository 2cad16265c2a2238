"""Label maps as runs of equal values.

A panoptic map is piecewise constant: an image of a million pixels has some ten thousand runs. Counting the overlap of
two maps over their common runs takes one comparison of neighbours per pixel instead of a sort of all pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util


@dataclass(frozen=True)
class LabelRuns:
    """A label map of H x W pixels in row-major order, as R runs of equal values.

    Attributes:
        starts: (R,) int32 or int64, the flat index of the first pixel of each run; ascending, the first is 0.
        values: (R,) integers, the label of each run.
        shape: (H, W).
    """

    starts: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    @property
    def lengths(self) -> np.ndarray:
        """(R,) number of pixels of each run."""
        return np.diff(self.starts, append=self.shape[0] * self.shape[1])

    def decode(self) -> np.ndarray:
        """The (H, W) label map."""
        return np.repeat(self.values, self.lengths).reshape(self.shape)

    def with_values(self, values: np.ndarray) -> LabelRuns:
        """The same runs with the (R,) ``values``."""
        return LabelRuns(self.starts, values, self.shape)


def encode_runs(label_map: np.ndarray) -> LabelRuns:
    """Turns an (H, W) integer map into its runs."""
    height, width = label_map.shape
    flat = label_map.reshape(-1)
    first = np.ones(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    # Half the memory where ground truth is kept, for every image below 2^31 pixels.
    return LabelRuns(starts.astype(np.int32) if flat.size < 2**31 else starts, flat[starts], (height, width))


def common_runs(a: LabelRuns, b: LabelRuns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits two maps of one shape into runs on which both are constant.

    Returns:
        (C,) index of the run of ``a``, (C,) index of the run of ``b``, (C,) number of pixels.
    """
    pixels = a.shape[0] * a.shape[1]
    starts_a, starts_b = np.zeros(pixels, dtype=bool), np.zeros(pixels, dtype=bool)
    starts_a[a.starts] = True
    starts_b[b.starts] = True
    starts = np.flatnonzero(starts_a | starts_b)
    lengths = np.diff(starts, append=pixels)
    return np.cumsum(starts_a[starts]) - 1, np.cumsum(starts_b[starts]) - 1, lengths


def position_of(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Looks the (R,) ``values`` up in ``ids``, N distinct integers in any order: (R,) positions, -1 for others."""
    if ids.size == 0:
        return np.full(values.shape, -1, dtype=np.int64)
    order = np.argsort(ids)
    ascending = ids[order]
    place = np.minimum(np.searchsorted(ascending, values), ids.size - 1)
    return np.where(ascending[place] == values, order[place], -1)


def encode_masks(label_map: np.ndarray, ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO's compressed run-length code of the mask of each of ``ids`` in an (H, W) label map.

    One pass over the map serves all masks, where ``pycocotools.mask.encode`` needs an (H, W, N) array. An id that is
    absent gives an empty mask.

    Returns:
        a list of {"size": [H, W], "counts": str}, in the order of ``ids``.
    """
    height, width = label_map.shape
    runs = encode_runs(np.ascontiguousarray(label_map.T))
    wanted = np.asarray(ids, dtype=np.int64)
    position = position_of(runs.values, wanted)
    of_wanted = np.flatnonzero(position >= 0)
    by_mask = of_wanted[np.argsort(position[of_wanted], kind="stable")]
    bounds = np.searchsorted(position[by_mask], np.arange(wanted.size + 1))
    starts = runs.starts.astype(np.int64)
    ends = starts + runs.lengths
    masks = []
    for first, last in itertools.pairwise(bounds):
        own = by_mask[first:last]
        # COCO's counts alternate between pixels outside and inside, beginning outside.
        edges = np.stack([starts[own], ends[own]], axis=1).reshape(-1)
        counts = np.diff(edges, prepend=0, append=height * width).tolist()
        # pycocotools writes no empty run at the end.
        counts = counts[:-1] if counts[-1] == 0 else counts
        rle = mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        masks.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return masks
