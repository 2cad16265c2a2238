"""Compares a checkpoint with a model, and says in words and tables what does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from tabulate import tabulate

Shape = tuple[int, ...]

_MAX_LINES = 12
# Entries whose absence or presence says nothing: counters, and buffers that follow from the config
_INCIDENTAL = re.compile(
    r"(^|\.)(pixel_mean|pixel_std|num_batches_tracked|relative_position_index)$|anchor_generator\.cell_anchors\."
)
# layers of a backbone that ImageNet weights never hold: offsets of deformable convolutions start at zero, and Swin
# Transformers normalise each of the outputs that a detector reads
_NEVER_PRETRAINED = re.compile(r"(^|\.)(\w*offset\w*|(backbone|bottom_up)\.norm\d)\.")


@dataclass(frozen=True)
class Fit:
    """What fits between a checkpoint and a model, by the model's names.

    Attributes:
        loaded: number of tensors that fit.
        names: names of all parameters and buffers of the model.
        missing: names that the model has and the file lacks.
        unexpected: names that the file has and the model lacks.
        misshaped: (name, shape in the file, shape in the model).
    """

    loaded: int
    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[tuple[str, Shape, Shape]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the file has its place in the model, and the other way round."""
        return not (self.missing or self.unexpected or self.misshaped)

    @property
    def present(self) -> set[str]:
        """Names of the model that the file has, in whatever shape."""
        return set(self.names) - set(self.missing)


def without_incidental(names: Iterable[str]) -> list[str]:
    """The names that matter: without counters, stored pixel means and anchors."""
    return [name for name in names if not _INCIDENTAL.search(name)]


def place_leftovers(state: Mapping[str, torch.Tensor], model_names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Gives relative names that Detectron2's matching left alone the names that they would have in the model.

    That matching passes over tensors of another shape and over layers that the model lacks. Under their full names both
    are compared with the model like everything else.

    Args:
        state: names after matching.
        model_names: names of the model's parameters and buffers.
    """
    known = set(model_names)
    endings: dict[str, str] = {}
    parents: dict[str, str] = {}
    for name in sorted(known):
        parts = name.split(".")
        for start in range(len(parts)):
            endings.setdefault(".".join(parts[start:]), name)
            parents.setdefault(parts[start], "".join(part + "." for part in parts[:start]))
    placed = {name: tensor for name, tensor in state.items() if name in known}
    for name, tensor in state.items():
        if name not in known:
            target = endings.get(name, parents.get(name.split(".")[0], "") + name)
            # a name that has found its place keeps it
            placed[name if target in placed else target] = tensor
    return placed


def misfit_of_backbone(fit: Fit) -> Fit:
    """The part of ``fit`` that means that the backbone is another one.

    The backbone is ``backbone.bottom_up`` (the network below an FPN) or else ``backbone``. Stages of it that only the
    file has are fine: they were cut off. Within a stage that both have, everything must agree.
    """
    below_fpn = any(name.startswith("backbone.bottom_up.") for name in fit.names)
    prefix = "backbone.bottom_up." if below_fpn else "backbone."
    modules = {branch for name in fit.names for branch in _branches(name) if branch.startswith(prefix)}

    def belongs(name: str) -> bool:
        return name.startswith(prefix) and not _NEVER_PRETRAINED.search(name)

    return replace(
        fit,
        missing=[name for name in fit.missing if belongs(name)],
        unexpected=[name for name in fit.unexpected if belongs(name) and not modules.isdisjoint(_branches(name))],
        misshaped=[entry for entry in fit.misshaped if belongs(entry[0])],
    )


def table_of_fresh_layers(fit: Fit) -> str:
    """A table of the layers that keep their initial values, and why. Where a whole branch is absent it is one row."""
    absent = _outermost(fit.missing, fit.present)
    rows = [(branch, number, "absent in the file") for branch, number in absent.items()]
    rows += [(name, 1, f"{there} in the file, {here} in the model") for name, there, here in fit.misshaped]
    rows.sort(key=lambda row: _natural(row[0]))
    return tabulate(rows, headers=["starts afresh", "tensors", "why"], tablefmt="github")


def diagnose(fit: Fit) -> str:
    """One clause: what is different about the file."""
    if fit.loaded == 0:
        return "another architecture, not one tensor fits"
    if fit.misshaped and not fit.missing and not fit.unexpected:
        if all(there[1:] == here[1:] for _, there, here in fit.misshaped):
            return "another number of classes (or outputs)"
        return "another variant of this model, layers have other sizes"
    foreign = ", ".join(sorted(_parts(fit.unexpected) - _parts(fit.names)))
    absent = ", ".join(sorted(_parts(fit.missing) - _parts(fit.present)))
    if foreign:
        return f"another method, with {foreign}" + (f" and without {absent}" if absent else "")
    if absent:
        return f"{absent} of the model absent in it"
    return "another variant of this model; depth, width or normalisation differ"


def describe(fit: Fit) -> str:
    """The lines of an error: what is absent, what is too much, and which shapes differ; each list shortened."""
    lines = [f"{fit.loaded} tensors fit"]
    lines += _listing("in the model, absent in the file", _outermost(fit.missing, fit.present))
    lines += _listing("in the file, unknown to the model", _outermost(fit.unexpected, fit.names))
    shapes = {f"{name}: {there} in the file, {here} in the model": 1 for name, there, here in sorted(fit.misshaped)}
    return "\n".join(f"  {line}" for line in lines + _listing("of another shape", shapes))


def _parts(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _branches(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c."""
    return [name[: match.start()] for match in re.finditer(r"\.", name)] + [name]


def _outermost(names: Iterable[str], others: Iterable[str]) -> dict[str, int]:
    """The outermost modules of ``names`` of which ``others`` has nothing, and how many of the names each holds."""
    known = {branch for name in others for branch in _branches(name)}
    found = Counter(next((branch for branch in _branches(name) if branch not in known), name) for name in names)
    return {branch: found[branch] for branch in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts res4.10 after res4.9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _listing(title: str, items: Mapping[str, int]) -> list[str]:
    if not items:
        return []
    lines = [f"  {item} ({number} tensors)" if number > 1 else f"  {item}" for item, number in items.items()]
    more = [f"  ... and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return [f"{title}:", *lines[:_MAX_LINES], *more]
