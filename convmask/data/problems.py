"""What is wrong with a dataset, one thing at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from convmask.data.errors import DatasetError


@dataclass(frozen=True)
class Problem:
    """One wrong thing.

    Attributes:
        file: the annotation file or picture, or the name of the dataset, that it is in.
        image: id or file name of the image that it belongs to; empty where it concerns the whole file.
        field: of the entry; empty where the file itself is meant.
        message: what is wrong, with the value.
        fatal: training would fail or learn nonsense. Otherwise training leaves the entry out or can do without it.
    """

    file: str
    image: str
    field: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        """One line: file, image, field and message."""
        image = f"image {self.image}" if self.image else ""
        return ": ".join(part for part in (self.file, image, self.field, self.message) if part)


def listing(problems: Sequence[Problem], limit: int = 10) -> str:
    """The first ``limit`` problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more; tools/validate_dataset.py lists all")
    return "\n".join(lines)


def raise_if_fatal(problems: Iterable[Problem], what: str, limit: int = 10) -> None:
    """Raises one error for all fatal problems.

    Args:
        problems: fatal ones and others.
        what: what was checked, for the first line.
        limit: how many are listed; the rest is counted.

    Raises:
        DatasetError: there is a fatal problem.
    """
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        count = "1 problem" if len(fatal) == 1 else f"{len(fatal)} problems"
        raise DatasetError(f"{what}: {count}\n{listing(fatal, limit)}")
