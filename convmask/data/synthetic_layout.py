"""Where the segments of a synthetic image lie: ids, classes, boxes and areas, without the textures.

All arithmetic is on integers, so an image is the same on every platform. Coordinates are in 1/16 of a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

# The drawing is part of the data: changing anything that changes a picture means a higher version.
VERSION = 1

THINGS = ("disc", "square", "triangle", "star", "ring")
STUFF = ("stripes", "checker", "dots", "grain")
# Category ids of the dataset have a gap, as those of COCO do.
THING_CATEGORY_IDS = tuple(range(1, len(THINGS) + 1))
STUFF_CATEGORY_IDS = tuple(range(11, len(STUFF) + 11))

SUBPIXEL = 16
_ONE = 4096
# cos of k degrees, in 1/4096
COSINES = np.array([round(math.cos(math.radians(k)) * _ONE) for k in range(360)], dtype=np.int32)


@dataclass(frozen=True)
class Recipe:
    """What a split draws from. Sizes and lengths are in pixels, shares are parts of 100."""

    sizes: tuple[int, ...]
    """Heights and widths that an image may have."""
    objects: tuple[int, int]
    """The least and the greatest number of objects that are placed."""
    diameters: tuple[int, int]
    """The least and the greatest diameter of an object."""
    visible_share: int
    """An object is not placed where less than this share of itself, or of another object, would be seen."""
    void_share: int
    """The share of images with an unlabelled region."""
    hard: bool = False
    """Also tiny and image-filling objects, empty images and crowd regions, by turns."""


MODERATE = Recipe((112, 116, 120, 124, 128), (2, 6), (22, 56), 75, 15)
HARD = Recipe((64, 96, 112, 128, 160), (8, 24), (10, 70), 0, 50, hard=True)


@dataclass(frozen=True)
class Segment:
    """One region of an image."""

    id: int
    """Its value in the id map."""
    name: str
    """The class: one of THINGS or STUFF."""
    iscrowd: bool = False

    @property
    def isthing(self) -> bool:
        """Whether the class is of countable objects."""
        return self.name in THINGS

    @property
    def category_id(self) -> int:
        """The category id of the dataset (not contiguous)."""
        if self.isthing:
            return THING_CATEGORY_IDS[THINGS.index(self.name)]
        return STUFF_CATEGORY_IDS[STUFF.index(self.name)]


@dataclass(frozen=True)
class Layout:
    """The segments of one image."""

    order: IntArray
    """(H, W): 0 where nothing is labelled, k where ``segments[k - 1]`` is seen."""
    segments: tuple[Segment, ...]
    """Those of which at least one pixel is seen; stuff first."""

    @property
    def ids(self) -> IntArray:
        """(H, W): the id map, 0 is void."""
        return np.array([0, *(segment.id for segment in self.segments)], dtype=np.int32)[self.order]


@lru_cache(maxsize=64)
def _spline_weights(length: int, knots: int) -> npt.NDArray[np.float64]:
    """(length, knots): the uniform cubic B-spline at each pixel, times 6 * 64^3: whole numbers."""
    position = (np.arange(length, dtype=np.int64) * 64 * (knots - 3)) // length
    cell, t = np.divmod(position, 64)
    s = 64 - t
    basis = (s**3, 3 * t**3 - 6 * 64 * t**2 + 4 * 64**3, 3 * s**3 - 6 * 64 * s**2 + 4 * 64**3, t**3)
    weights = np.zeros((length, knots))
    for offset, value in enumerate(basis):
        weights[np.arange(length), cell + offset] = value
    return weights


def smooth_fields(rng: np.random.Generator, count: int, size: tuple[int, int], knots: int = 5) -> IntArray:
    """(count, height, width): smooth random surfaces over an image of ``size``, with values of 0 to 1023."""
    height, width = size
    controls = rng.integers(0, 1024, (count, knots, knots)).astype(np.float64)
    # Sums of whole numbers below 2^53 are exact in float64, in whatever order a matrix product adds them.
    product = _spline_weights(height, knots) @ controls @ _spline_weights(width, knots).T
    return (product.astype(np.int64) // (6 * 64**3) ** 2).astype(np.int32)


def _vertices(name: str, radius: int, angle: int) -> IntArray:
    """(V, 2): corners (x, y) of a shape around the origin, in subpixels."""
    turns, radii = {
        "square": ([45, 135, 225, 315], [_ONE] * 4),
        "triangle": ([0, 120, 240], [_ONE] * 3),
        "star": (list(range(0, 360, 36)), [_ONE, 1720] * 5),
    }[name]
    turn = (np.array(turns) + angle) % 360
    scaled = np.array(radii) * radius // _ONE
    return np.stack([scaled * COSINES[turn] // _ONE, scaled * COSINES[(turn + 270) % 360] // _ONE], axis=1).astype(
        np.int32
    )


def _inside_polygon(x: IntArray, y: IntArray, corners: IntArray) -> BoolArray:
    """(h, w): the even-odd rule at the grid of ``x`` (1, w) and ``y`` (h, 1)."""
    start = corners[:, :, None, None]
    end = np.concatenate((corners[1:], corners[:1]))[:, :, None, None]
    spans = (start[:, 1] <= y) != (end[:, 1] <= y)
    side = (end[:, 0] - start[:, 0]) * (y - start[:, 1]) - (x - start[:, 0]) * (end[:, 1] - start[:, 1])
    left = (side > 0) == (end[:, 1] > start[:, 1])
    return np.bitwise_xor.reduce(spans & left, axis=0)


def shape_mask(name: str, diameter: int, angle: int = 0) -> BoolArray:
    """The pixels of a whole shape.

    Args:
        name: one of THINGS.
        diameter: of the circle around the shape, in pixels. At 1 every shape is one pixel.
        angle: in degrees.

    Returns:
        (D, D): the mask; D is odd, and the shape's centre is the central pixel.
    """
    reach = diameter // 2
    radius = diameter * SUBPIXEL // 2
    x = np.arange(-reach, reach + 1, dtype=np.int32)[None] * SUBPIXEL
    y = x.T
    if name in ("disc", "ring"):
        distance = x * x + y * y
        mask = distance <= radius * radius
        if name == "ring" and diameter > 3:
            mask &= distance >= (radius * 9 // 16) ** 2
    else:
        mask = _inside_polygon(x, y, _vertices(name, radius, angle))
        mask[reach, reach] = True
    return mask


def place(mask: BoolArray, center: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[slice, slice], BoolArray]:
    """The part of an image of ``size`` (height, width) that a (D, D) mask at ``center`` (y, x) covers, and its part."""
    reach = mask.shape[0] // 2
    spans = [(max(c - reach, 0), max(min(c + reach + 1, length), 0)) for c, length in zip(center, size, strict=True)]
    rows, columns = (slice(low, high) for low, high in spans)
    inner = tuple(slice(low - c + reach, high - c + reach) for (low, high), c in zip(spans, center, strict=True))
    return (rows, columns), mask[inner]


class _Canvas:
    """The map that the segments are drawn into, from back to front."""

    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)
        self.order: IntArray = np.zeros((height, width), dtype=np.int32)
        self.names: list[tuple[str, bool]] = []
        # How many pixels each would have if nothing hid it.
        self.whole: list[int] = []

    def add(self, name: str, where: tuple[slice, slice], mask: BoolArray, iscrowd: bool = False) -> None:
        self.names.append((name, iscrowd))
        self.whole.append(int(np.count_nonzero(mask)))
        self.order[where][mask] = len(self.names)

    def leaves_visible(self, where: tuple[slice, slice], mask: BoolArray, share: int, whole: int) -> bool:
        """Whether ``share`` percent of the shape (``whole`` pixels) and of every object under it would be seen."""
        if 100 * int(np.count_nonzero(mask)) < share * whole:
            return False
        hidden = np.bincount(self.order[where][mask], minlength=len(self.names) + 1)
        for number in np.flatnonzero(hidden[1:]):
            if self.names[number][0] in STUFF:
                continue
            seen = int(np.count_nonzero(self.order == number + 1)) - int(hidden[number + 1])
            if 100 * seen < share * self.whole[number]:
                return False
        return True

    def layout(self) -> Layout:
        seen = np.bincount(self.order.ravel(), minlength=len(self.names) + 1)
        kept = [number for number in range(1, len(seen)) if seen[number]]
        renumber = np.zeros(len(seen), dtype=np.int32)
        renumber[kept] = np.arange(1, len(kept) + 1)
        segments = []
        for position, number in enumerate(kept, start=1):
            name, iscrowd = self.names[number - 1]
            # Large and far apart, so that all three bytes of an id are in use.
            segment = Segment(0, name, iscrowd)
            segments.append(Segment(segment.category_id * 10_000 + position, name, iscrowd))
        return Layout(renumber[self.order], tuple(segments))


_EVERYWHERE = (slice(None), slice(None))


def _add_background(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Two or three stuff regions with smooth borders."""
    height, width = canvas.size
    names = rng.permutation(len(STUFF))[: rng.integers(2, 4)]
    first, *others = smooth_fields(rng, len(names), (height, width))
    winner = np.zeros((height, width), dtype=np.int32)
    for region, field in enumerate(others, start=1):
        winner[field > first] = region
        first = np.maximum(first, field)
    areas = np.bincount(winner.ravel(), minlength=len(names))
    # A sliver of a texture cannot be recognised by its texture.
    winner[np.isin(winner, np.flatnonzero(areas * 12 < height * width))] = areas.argmax()
    for region, name in enumerate(names):
        canvas.add(STUFF[name], _EVERYWHERE, winner == region)


def _add_void(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A blob that nobody labelled."""
    field = smooth_fields(rng, 1, canvas.size, knots=6)[0]
    canvas.order[field > 1023 - rng.integers(260, 340)] = 0


def _add_object(canvas: _Canvas, rng: np.random.Generator, diameter: int, visible_share: int) -> bool:
    """One object at a place found in at most six trials. Returns False where there is none."""
    height, width = canvas.size
    name = THINGS[rng.integers(len(THINGS))]
    # The area of a shape depends on the circle around it: thin shapes get a larger one.
    diameter = diameter * {"star": 9, "triangle": 9, "square": 9}.get(name, 8) // 8
    margin = diameter // 3
    mask = shape_mask(name, diameter, int(rng.integers(360)))
    whole = int(np.count_nonzero(mask))
    for _ in range(6):
        center = (
            int(rng.integers(min(margin, height // 2), max(height - margin, height // 2 + 1))),
            int(rng.integers(min(margin, width // 2), max(width - margin, width // 2 + 1))),
        )
        where, part = place(mask, center, (height, width))
        if not visible_share or canvas.leaves_visible(where, part, visible_share, whole):
            canvas.add(name, where, part)
            canvas.whole[-1] = whole
            return True
    return False


def _add_crowd(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A region full of small objects of one class, annotated as one crowd."""
    height, width = canvas.size
    name = THINGS[rng.integers(len(THINGS))]
    crowd = np.zeros((height, width), dtype=bool)
    middle = rng.integers((height // 4, width // 4), (3 * height // 4, 3 * width // 4))
    for _ in range(40):
        offset = rng.integers(-height // 5, height // 5 + 1, 2)
        center = np.clip(middle + offset, 0, (height - 1, width - 1))
        mask = shape_mask(name, int(rng.integers(6, 13)), int(rng.integers(360)))
        where, part = place(mask, (int(center[0]), int(center[1])), (height, width))
        crowd[where] |= part
    canvas.add(name, _EVERYWHERE, crowd, iscrowd=True)


def _add_hard_objects(canvas: _Canvas, rng: np.random.Generator, recipe: Recipe, index: int) -> None:
    """By turns of the index: no object, an image-filling one, a crowd, many tiny ones, many that hide one another."""
    turn = index % 8
    if turn == 0:
        return
    if turn in (2, 6):
        _add_object(canvas, rng, int(max(canvas.size) * rng.integers(100, 161) // 100), 0)
    for _ in range(rng.integers(recipe.objects[0], recipe.objects[1] + 1)):
        tiny = turn in (3, 6) or rng.integers(4) == 0
        low, high = (1, 8) if tiny else recipe.diameters
        _add_object(canvas, rng, int(rng.integers(low, high + 1)), recipe.visible_share)
    if turn in (1, 5):
        _add_crowd(canvas, rng)


def _add_moderate_objects(canvas: _Canvas, rng: np.random.Generator, recipe: Recipe) -> None:
    """The larger objects first, so that there is room for the smaller ones."""
    count = int(rng.integers(recipe.objects[0], recipe.objects[1] + 1))
    diameters = np.sort(rng.integers(recipe.diameters[0], recipe.diameters[1] + 1, count))[::-1]
    placed = sum(_add_object(canvas, rng, int(diameter), recipe.visible_share) for diameter in diameters)
    while placed < recipe.objects[0]:
        placed += _add_object(canvas, rng, recipe.diameters[0], recipe.visible_share)


def draw_layout(recipe: Recipe, split: int, index: int) -> Layout:
    """The segments of image ``index`` of a split; the same on every platform.

    Args:
        recipe: MODERATE or HARD.
        split: the number of the split: images of two splits have nothing in common.
        index: of the image, not negative.
    """
    rng = np.random.default_rng([VERSION, split, index, 0])
    height, width = (int(size) for size in rng.choice(recipe.sizes, 2))
    canvas = _Canvas(height, width)
    _add_background(canvas, rng)
    if rng.integers(100) < recipe.void_share:
        _add_void(canvas, rng)
    if recipe.hard:
        _add_hard_objects(canvas, rng, recipe, index)
    else:
        _add_moderate_objects(canvas, rng, recipe)
    return canvas.layout()
