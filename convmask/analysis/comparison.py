"""Two runs side by side: what got better and what got worse."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from convmask.analysis.run import TITLES, RunAnalysis, without_nan
from convmask.data.errors import DatasetError


@dataclass(frozen=True)
class Change:
    """A number before and after.

    Attributes:
        name: of what it is of.
        before, after: in percent; NaN where there is nothing to measure.
    """

    name: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class KindComparison:
    """How the results of one kind have changed.

    Attributes:
        task: that both runs are measured by; see :class:`convmask.analysis.run.KindAnalysis`.
        measure: "AP" or "PQ", of the first three.
        totals, by_class, by_size: in the order of the analyses.
        images: change of the quality of each image from 0 to 1, by image id.
    """

    kind: str
    task: str
    measure: str
    totals: list[Change]
    by_class: list[Change]
    by_size: list[Change]
    images: dict[Hashable, float]

    @property
    def title(self) -> str:
        """Kind and task, for readers."""
        return TITLES[self.task]

    def changed_images(self, limit: int) -> list[Hashable]:
        """Images of the greatest change, for better or worse; those that are as they were left out."""
        order = sorted(self.images, key=lambda image: -abs(self.images[image]))
        return [image for image in order[:limit] if self.images[image]]

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``json.dumps``; NaN becomes None."""
        parts = {"totals": self.totals, "by_class": self.by_class, "by_size": self.by_size}
        rows = {
            key: [
                without_nan({"name": x.name, "before": x.before, "after": x.after, "change": x.difference})
                for x in changes
            ]
            for key, changes in parts.items()
        }
        images = [{"image_id": image, "change": change} for image, change in self.images.items()]
        return {"task": self.task, "measure": self.measure, **rows, "images": images}


def compare(before: RunAnalysis, after: RunAnalysis) -> dict[str, KindComparison]:
    """Compares two runs on one dataset, as far as both have results of a kind.

    Raises:
        DatasetError: they have no kind of results in common, or one has masks and the other boxes alone.
    """
    shared = [kind for kind in after.kinds if kind in before.kinds]
    if not shared:
        raise DatasetError(
            f"{before.results.folder} and {after.results.folder} have no kind of results in common: "
            f"{', '.join(before.kinds) or 'none'} and {', '.join(after.kinds) or 'none'}"
        )
    return {kind: _compare(before, after, kind) for kind in shared}


def _compare(run_before: RunAnalysis, run_after: RunAnalysis, kind: str) -> KindComparison:
    before, after = run_before.kinds[kind], run_after.kinds[kind]
    task, measure = after.task, after.measure
    if before.task != task:
        # A run that has found nothing at all has neither masks nor boxes: its AP is 0 by either.
        if run_before.results.detections and run_after.results.detections:
            raise DatasetError(
                f"{run_before.results.folder} and {run_after.results.folder} cannot be compared: "
                f"one is measured as {before.title}, the other as {after.title}"
            )
        task = task if run_after.results.detections else before.task
    totals = [Change(name, before.totals[name], value) for name, value in after.totals.items()]
    by_class, by_size = (
        [Change(new["name"], old[measure], new[measure]) for old, new in zip(olds, news, strict=True)]
        for olds, news in ((before.by_class, after.by_class), (before.by_size, after.by_size))
    )
    images = {image: score.quality - before.images[image].quality for image, score in after.images.items()}
    return KindComparison(kind, task, measure, totals, by_class, by_size, images)
