"""Which images are in which batch: a pure function of the seed and the iteration.

The images of a dataset are drawn epoch by epoch, each epoch a shuffle of its own. Their endless sequence is cut into
micro-batches of a fixed number of images of one orientation; the processes of a job, and the passes of an iteration
where gradients are accumulated, take them in turn. So every process can begin at any iteration, and two processes see
in one iteration what one process sees in two passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Draw(NamedTuple):
    """One image of a batch. Augmentation is seeded by it."""

    epoch: int
    """From 0."""
    image: int
    """Its index in the dataset."""
    occurrence: int = 0
    """How often the image has been drawn in this epoch before; above 0 only where images are repeated."""


class EpochSampler:
    """The order of the images in each epoch."""

    def __init__(self, size: int, seed: int, repeat_factors: Sequence[float] | None = None, share: float = 1.0) -> None:
        """Takes what the order follows from.

        Args:
            size: number of images.
            seed: not negative.
            repeat_factors: how often each image is drawn in an epoch on average (LVIS, arXiv 1908.03195, appendix B.2);
                by default once.
            share: only this share of the images, chosen by the seed, is drawn at all: above 0, at most 1.

        Raises:
            ValueError: no image is left.
        """
        self.size = size
        self.seed = seed
        self._factors = None if repeat_factors is None else np.asarray(repeat_factors, dtype=np.float64)
        shuffled = np.random.default_rng((seed, 0, 1)).permutation(size)
        self._chosen = np.sort(shuffled[: int(size * min(share, 1.0))])
        if not len(self._chosen) or (self._factors is not None and not (self._factors > 0).any()):
            raise ValueError(f"there is nothing to draw: {size} images, of which a share of {share} is used")

    def epoch(self, number: int) -> tuple[IntArray, IntArray]:
        """The indices of the images of an epoch in their order, and the occurrence of each, see :class:`Draw`."""
        generator = np.random.default_rng((self.seed, number))
        if self._factors is None:
            indices = generator.permutation(self._chosen)
            return indices, np.zeros_like(indices)
        factors = self._factors[self._chosen]
        whole = np.floor(factors)
        # Rounded up as often as the fraction says.
        times = (whole + (generator.random(len(factors)) < factors - whole)).astype(np.int64)
        indices = np.repeat(self._chosen, times)
        starts = np.repeat(np.cumsum(times) - times, times)
        order = generator.permutation(len(indices))
        return indices[order], (np.arange(len(indices)) - starts)[order]


class MicroBatches:
    """The endless sequence of micro-batches: lists of ``images`` draws of one group, wherever it is entered.

    A micro-batch is complete with its last image, and takes its place in the sequence then; the images that a group has
    left at the end of an epoch wait for those of the next.
    """

    def __init__(self, sampler: EpochSampler, images: int, groups: Sequence[int] | None = None) -> None:
        """Takes the order of the images.

        Args:
            sampler: of the dataset.
            images: in a micro-batch.
            groups: a number for each image of the dataset; those of a micro-batch have the same. None: any will do.
        """
        self._sampler = sampler
        self._images = images
        self._groups = None if groups is None else np.asarray(groups, dtype=np.int64)

    def start(self, first: int, step: int = 1) -> Iterator[list[Draw]]:
        """Micro-batches number ``first``, ``first + step``, ``first + 2 * step`` and so on, for ever."""
        number, wanted = 0, first
        waiting: dict[int, IntArray] = {}
        for epoch in count():
            complete = self._complete(epoch, waiting)
            while wanted < number + len(complete):
                yield [Draw(*map(int, draw)) for draw in complete[wanted - number]]
                wanted += step
            number += len(complete)

    def _complete(self, epoch: int, waiting: dict[int, IntArray]) -> list[IntArray]:
        """The micro-batches, each (images, 3), that are complete in an epoch; what is left over goes to ``waiting``."""
        indices, occurrences = self._sampler.epoch(epoch)
        draws = np.stack([np.full_like(indices, epoch), indices, occurrences], axis=1)
        groups = np.zeros_like(indices) if self._groups is None else self._groups[indices]
        found: list[tuple[int, IntArray]] = []
        for group in np.unique(groups).tolist():
            (positions,) = np.nonzero(groups == group)
            before = waiting.get(group, np.empty((0, 3), dtype=np.int64))
            together = np.concatenate([before, draws[positions]])
            whole = len(together) // self._images
            # The last image of each micro-batch is of this epoch: those before it were too few.
            last = positions[np.arange(1, whole + 1) * self._images - len(before) - 1]
            found += zip(last.tolist(), together[: whole * self._images].reshape(whole, self._images, 3), strict=True)
            waiting[group] = together[whole * self._images :]
        return [batch for _, batch in sorted(found, key=lambda entry: entry[0])]


def orientation_groups(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """1 for each image that is wider than high by its annotated size, 0 for others, 2 where no size is annotated.

    That is the grouping of Detectron2, whose models pad the images of a batch to a common size.
    """
    sizes = ((record.get("width"), record.get("height")) for record in records)
    return [2 if width is None or height is None else int(width > height) for width, height in sizes]
