"""What the authors' release and ChainerCV do differently."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """How one release counts and rounds.

    Attributes:
        name: "mxnet" or "chainercv".
        offset: a box from x1 to x2 is x2 - x1 + offset wide. 1: both ends are pixels of it.
        rounded: RoIs are rounded to pixels before pooling, and anchors' sides to whole numbers.
        first_mask_class: at inference a RoI has the mask of the best class from this on; 0 is background.
        epsilon: added to the sides of a box that divide, or (offset 0) their least value.
        fixed_normalizer: losses of RoIs are divided by the number that should have been sampled, not by that which was.
        scaled_min_size: the RPN's MIN_SIZE is in pixels of the original image, else of the input.
        rank_by_foreground: proposals are ranked by the foreground logit alone, not by its softmax.
        floor_cells: proposals come from the floor(H / stride) x floor(W / stride) first cells only.
        stem_epsilon: of the first batch normalisation.
    """

    name: str
    offset: int
    rounded: bool
    first_mask_class: int
    epsilon: float
    fixed_normalizer: bool
    scaled_min_size: bool
    rank_by_foreground: bool
    floor_cells: bool
    stem_epsilon: float


MXNET = Convention("mxnet", 1, True, 1, 1e-14, True, False, False, True, 1e-5)
CHAINERCV = Convention("chainercv", 0, False, 0, 1.1920929e-07, False, True, True, False, 2e-5)
CONVENTIONS = {convention.name: convention for convention in (MXNET, CHAINERCV)}


def convention_named(name: str) -> Convention:
    """The convention of the key ``MODEL.FCIS.CONVENTION``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"MODEL.FCIS.CONVENTION {name!r} is not one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
