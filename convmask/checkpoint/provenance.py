"""Where the tensors of a converted checkpoint come from: which are renamed, reordered, joined, or left over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tabulate import tabulate

from convmask.checkpoint.recognition import State

# In the order of tables. "dropped": known to be of no use. "left over": no place for it is known.
STATUSES = ("kept", "renamed", "reordered", "part", "joined", "recomputed", "dropped", "left over")


@dataclass(frozen=True)
class Row:
    """What became of a tensor.

    Attributes:
        status: one of ``STATUSES``.
        sources: names in the file that was read.
        target: name in the result, "" where it is not in it.
        shape: of the result, or of the source where there is no result.
    """

    status: str
    sources: tuple[str, ...]
    target: str
    shape: tuple[int, ...]


def trace(state: State, convert: Callable[[State], State]) -> list[Row]:
    """What a conversion makes of each tensor, found by converting numbered elements in the place of the values.

    Args:
        state: unchanged.
        convert: as of :func:`register_converter`: returns the result and leaves in its argument what it does not know.
    """
    names = list(state)
    sizes = [state[name].numel() for name in names]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    kind = torch.int32 if starts[-1] < 2**31 else torch.int64
    numbered = {
        name: torch.arange(int(start), int(start) + size, dtype=kind).view(state[name].shape)
        for name, start, size in zip(names, starts, sizes, strict=False)
    }
    left = dict(state)
    converted = convert(left)
    placed = convert(numbered)
    values = {name: value.reshape(-1) for name, value in state.items()}
    rows, used = [], set(left)
    for target, value in converted.items():
        numbers = placed[target].reshape(-1).numpy() if target in placed else np.zeros(0, dtype=np.int64)
        row = _row(target, value, numbers, names, starts, values)
        used.update(row.sources)
        rows.append(row)
    rows = [_with_source(row, state, used) for row in rows]
    rows += [Row("left over", (name,), "", tuple(state[name].shape)) for name in left]
    rows += [Row("dropped", (name,), "", tuple(state[name].shape)) for name in names if name not in used]
    return rows


def _row(
    target: str,
    value: torch.Tensor,
    numbers: np.ndarray,
    names: Sequence[str],
    starts: np.ndarray,
    values: Mapping[str, torch.Tensor],
) -> Row:
    shape = tuple(value.shape)
    owners = np.searchsorted(starts, numbers, side="right") - 1
    if value.numel() == 0 or len(numbers) != value.numel() or not ((owners >= 0) & (owners < len(names))).all():
        return Row("recomputed", (), target, shape)
    order = np.unique(owners)
    sources = tuple(names[index] for index in order)
    flat = value.reshape(-1)
    for index, source in zip(order, sources, strict=True):
        mine = owners == index
        if not _same(flat[mine], values[source][torch.from_numpy(numbers[mine] - starts[index])]):
            # products of the numbers are near them
            likely = names[int(np.bincount(owners).argmax())]
            return Row("recomputed", (likely,) if values[likely].numel() == value.numel() else (), target, shape)
    if len(sources) > 1:
        return Row("joined", sources, target, shape)
    if len(numbers) < values[sources[0]].numel():
        return Row("part", sources, target, shape)
    if not np.array_equal(numbers, np.arange(starts[order[0]], starts[order[0] + 1])):
        return Row("reordered", sources, target, shape)
    return Row("kept" if sources[0] == target else "renamed", sources, target, shape)


def _with_source(row: Row, state: State, used: set[str]) -> Row:
    """A recomputed tensor, whose numbers say nothing, with the first of its shape that is not used otherwise."""
    if row.status != "recomputed" or row.sources:
        return row
    source = next((name for name, x in state.items() if name not in used and tuple(x.shape) == row.shape), "")
    used.add(source)
    return Row(row.status, (source,) if source else (), row.target, row.shape)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def summary(rows: Sequence[Row]) -> str:
    """How many tensors have each status, in one line."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def table(rows: Sequence[Row]) -> str:
    """A table with one line for tensors whose names differ in numbers only."""
    groups: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row.status, _pattern(" + ".join(row.sources)), _pattern(row.target))
        groups[key] = groups.get(key, 0) + 1
    order = sorted(groups, key=lambda key: STATUSES.index(key[0]))
    lines = [[status, groups[status, source, target], source, target or "-"] for status, source, target in order]
    return tabulate(lines, headers=["what", "tensors", "in the file", "in the result"], tablefmt="pipe")


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)
