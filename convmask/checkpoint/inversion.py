"""From our names and layout back to those of an original release, where nothing is lost on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from convmask.checkpoint.errors import CheckpointError
from convmask.checkpoint.fit import without_incidental
from convmask.checkpoint.recognition import State, recognise


@dataclass(frozen=True)
class Inverter:
    """The way back to one original release. See :func:`register_inverter`."""

    name: str
    matches: Callable[[Mapping[str, torch.Tensor]], bool]
    invert: Callable[[State], State] | None
    entry: str = "model"
    reason: str = ""


_INVERTERS: list[Inverter] = []


def register_inverter(
    name: str,
    *,
    matches: Callable[[Mapping[str, torch.Tensor]], bool],
    entry: str = "model",
) -> Callable[[Callable[[State], State]], Callable[[State], State]]:
    """Registers the decorated function as the way back to an original release.

    Like a converter it takes what it knows out of its argument and returns it by the release's names.

    Args:
        name: of the release's converter.
        matches: whether a state by our names is a model of this kind.
        entry: of the file that holds the weights, as the release writes it.
    """

    def register(invert: Callable[[State], State]) -> Callable[[State], State]:
        _INVERTERS.append(Inverter(name, matches, invert, entry))
        return invert

    return register


def register_no_inverse(name: str, *, matches: Callable[[Mapping[str, torch.Tensor]], bool], reason: str) -> None:
    """Says why there is no way back to a release from what ``matches``."""
    _INVERTERS.append(Inverter(name, matches, None, reason=reason))


def find_inverter(state: Mapping[str, torch.Tensor], path: str) -> Inverter:
    """The way back for weights by our names.

    Args:
        state: by our names.
        path: of their file, for messages.

    Raises:
        CheckpointError: none is known, or the original holds what ours do not.
    """
    found = [inverter for inverter in _INVERTERS if inverter.matches(state)]
    if not found:
        known = ", ".join(inverter.name for inverter in _INVERTERS if inverter.invert)
        raise CheckpointError(f"{path}: is no model that there is a way back for; there is one to: {known}")
    for inverter in found:
        if inverter.invert:
            return inverter
    reasons = "; ".join(f"{inverter.name}: {inverter.reason}" for inverter in found)
    raise CheckpointError(f"{path}: cannot be given its original names without loss: {reasons}")


def invert(inverter: Inverter, state: State, path: str) -> dict[str, Any]:
    """The contents of a file as the release writes it, checked by converting it again.

    Raises:
        CheckpointError: a weight has no place in the release, or is not the same after converting it there and back.
    """
    assert inverter.invert is not None
    remaining = dict(state)
    try:
        original = inverter.invert(remaining)
    except Exception as error:  # a file of a stranger, in which tensors are missing or have other shapes
        raise CheckpointError(f"{path}: looks like {inverter.name}, but cannot be converted back: {error!r}") from error
    lost = without_incidental(remaining)
    if lost:
        raise CheckpointError(f"{path}: {inverter.name} has no place for {_some(lost)}")
    contents = {inverter.entry: original}
    back = recognise(dict(contents), path).state
    differing = [name for name in without_incidental(state) if not _equal(back.get(name), state[name])]
    if differing:
        raise CheckpointError(
            f"{path}: cannot be given the names of {inverter.name} without loss: {_some(differing)} would not be the "
            "same after loading the result"
        )
    return contents


def _equal(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def inverse_rules(rules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rules of :func:`rename_keys` the other way round.

    Args:
        rules: patterns of literal text (escaped or not) and groups that are not nested and not optional; every group
            once in the replacement.

    Raises:
        ValueError: a pattern holds something else.
    """
    return [_inverse(pattern, replacement) for pattern, replacement in rules]


_GROUP_REFERENCE = re.compile(r"\\(?:(\d)|g<(\w+)>)")


def _inverse(pattern: str, replacement: str) -> tuple[str, str]:
    template, groups = _template(pattern)
    parts, position = [], 0
    for reference in _GROUP_REFERENCE.finditer(replacement):
        key = reference[1] or reference[2]
        parts.append(re.escape(replacement[position : reference.start()]))
        parts.append(f"(?P<g{key}>{groups[key]})")
        position = reference.end()
    parts.append(re.escape(replacement[position:]))
    return "".join(parts), template


def _template(pattern: str) -> tuple[str, dict[str, str]]:
    """A pattern as a replacement that names its groups g1, g2, ..., and what each group matches."""
    groups: dict[str, str] = {}
    template, position = "", 0
    while position < len(pattern):
        character = pattern[position]
        if character == "(":
            end = _closing(pattern, position)
            content = pattern[position + 1 : end]
            named = re.match(r"\?P<(\w+)>", content)
            key = named[1] if named else str(len(groups) + 1)
            groups[key] = content[named.end() :] if named else content
            if content.startswith("?:") or pattern[end + 1 : end + 2] in ("?", "*", "+"):
                raise ValueError(f"{pattern}: an optional or nameless group has no inverse")
            template += rf"\g<g{key}>"
            position = end + 1
        elif character == "\\" and not pattern[position + 1].isalnum():
            template += pattern[position + 1]
            position += 2
        elif character.isalnum() or character in "_-":
            template += character
            position += 1
        else:
            raise ValueError(f"{pattern}: {pattern[position : position + 2]} outside a group has no inverse")
    return template, groups


def _closing(pattern: str, start: int) -> int:
    depth = 0
    for position in range(start, len(pattern)):
        if pattern[position] in "()" and pattern[position - 1] != "\\":
            depth += 1 if pattern[position] == "(" else -1
            if depth == 0:
                return position
    raise ValueError(f"{pattern}: a group does not end")
