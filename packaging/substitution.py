"""Changes to somebody else's sources, each of which has to match as often as it says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class PatchError(RuntimeError):
    """A substitution did not match as often as it must: these are not the sources that it was written for."""


@dataclass(frozen=True)
class Substitution:
    """Replaces ``pattern`` (a regular expression; ``^`` is a line's start) in ``file``, exactly ``count`` times."""

    why: str
    file: str
    pattern: str
    replacement: str
    count: int = 1


def literal(why: str, file: str, old: str, new: str, count: int = 1) -> Substitution:
    """A :class:`Substitution` of the text ``old`` by the text ``new``, neither of them a pattern."""
    return Substitution(why, file, re.escape(old), new.replace("\\", r"\\"), count)


def apply(substitutions: Iterable[Substitution], root: Path) -> None:
    """Applies ``substitutions`` to the files below ``root``, in their order.

    Raises:
        PatchError: one does not match as often as it must, or its file is absent. The tree is half changed then.
    """
    for sub in substitutions:
        path = root / sub.file
        if not path.is_file():
            raise PatchError(f"{sub.file} is absent ({sub.why})")
        original = path.read_text(encoding="utf-8")
        text, found = re.subn(sub.pattern, sub.replacement, original, flags=re.MULTILINE)
        if found != sub.count:
            raise PatchError(f"{sub.file}: {sub.pattern!r} matched {found} times instead of {sub.count} ({sub.why})")
        path.write_text(text, encoding="utf-8")
