"""Category ids of a dataset and the class indices that models use for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from detectron2.utils.colormap import colormap

from convmask.data.errors import DatasetError

SemanticLayout = Literal["separated", "all"]
LabelOrder = Literal["things_first", "category_id"]

THINGS_NAME = "things"
THINGS_COLOR = (82, 18, 128)


@dataclass(frozen=True)
class Category:
    """One category: its id in the dataset, its name, whether it is a thing, and an RGB colour (0 to 255)."""

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]


def category_problems(categories: Any) -> list[tuple[str, str]]:
    """What is wrong with the ``categories`` list of a panoptic json, as pairs of (field, message)."""
    if not isinstance(categories, Sequence) or isinstance(categories, str) or not categories:
        return [("categories", "is not a list with at least one category")]
    problems: list[tuple[str, str]] = []
    kind_of_id: dict[int, Any] = {}
    kinds_of_name: dict[str, Any] = {}
    for index, entry in enumerate(categories):
        field = f"categories[{index}]"
        if not isinstance(entry, Mapping):
            problems.append((field, f"is not an object: {entry!r:.80}"))
            continue
        wrong = _entry_problems(field, entry)
        problems += wrong
        if wrong:
            continue
        identity, name, isthing = entry["id"], entry["name"], bool(entry["isthing"])
        if identity in kind_of_id:
            other = "" if kind_of_id[identity] == isthing else ", once as a thing and once as stuff"
            problems.append((f"{field}.id", f"category id {identity} occurs twice{other}"))
        elif kinds_of_name.setdefault(name, isthing) != isthing:
            problems.append((f"{field}.isthing", f"category {name!r} is a thing in one entry and stuff in another"))
        kind_of_id.setdefault(identity, isthing)
    return problems


def _entry_problems(field: str, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems = []
    if not isinstance(entry.get("id"), int) or isinstance(entry["id"], bool) or entry["id"] < 0:
        problems.append((f"{field}.id", f"is not an integer of at least 0: {entry.get('id')!r:.80}"))
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        problems.append((f"{field}.name", f"is not a name: {entry.get('name')!r:.80}"))
    if not isinstance(entry.get("isthing"), int) or entry["isthing"] not in (0, 1):
        problems.append((f"{field}.isthing", f"is neither 0 nor 1: {entry.get('isthing')!r:.80}"))
    if "color" in entry and not _is_color(entry["color"]):
        problems.append((f"{field}.color", f"is not three integers from 0 to 255: {entry['color']!r:.80}"))
    return problems


def _is_color(color: Any) -> bool:
    return (
        isinstance(color, Sequence)
        and len(color) == 3
        and all(isinstance(value, int) and 0 <= value <= 255 for value in color)
    )


def palette_color(index: int) -> tuple[int, int, int]:
    """An RGB colour (0 to 255) for the ``index``-th class of a dataset that gives none."""
    palette = colormap(rgb=True, maximum=255)
    red, green, blue = (int(value) for value in palette[index % len(palette)])
    return red, green, blue


@dataclass(frozen=True)
class PanopticCategories:
    """The categories of a panoptic dataset and their class indices.

    Contiguous ids, in order of category id: things 0 to T-1, stuff 1 to S. They are the class indices of dataset dicts,
    of metadata and of panoptic predictions. Labels of a semantic map come in two layouts:

    - ``"separated"`` (Detectron2's, T + S classes become 1 + S): 0 is any thing, stuff is 1 to S;
    - ``"all"``: every category has a label of its own, 0 to T+S-1, in the order of ``all_order``.

    Attributes:
        things: T thing categories, sorted by id.
        stuff: S stuff categories, sorted by id.
        all_order: the T + S category ids in order of their label in the layout ``"all"``.
    """

    things: tuple[Category, ...]
    stuff: tuple[Category, ...]
    all_order: tuple[int, ...]

    @classmethod
    def from_coco(
        cls, categories: Iterable[Mapping[str, Any]], label_order: LabelOrder = "things_first"
    ) -> PanopticCategories:
        """Reads the ``categories`` of a COCO panoptic json: ``{"id", "name", "isthing"}`` and optionally ``"color"``.

        Ids need not be contiguous. ``label_order`` orders the layout ``"all"``: things before stuff, or by category id
        alone, which gives Cityscapes' train ids and ADE20K's labels.

        Raises:
            DatasetError: an entry is malformed, an id occurs twice, or a name is both a thing and stuff.
        """
        entries = list(categories)
        problems = category_problems(entries)
        if problems:
            raise DatasetError("; ".join(f"{field} {message}" for field, message in problems[:10]))
        if label_order not in get_args(LabelOrder):
            raise DatasetError(f"label_order is {label_order!r}, not one of {get_args(LabelOrder)}")
        entries.sort(key=lambda entry: entry["id"])
        parsed = [
            Category(e["id"], e["name"], bool(e["isthing"]), _color(e.get("color", palette_color(index))))
            for index, e in enumerate(entries)
        ]
        things = tuple(category for category in parsed if category.isthing)
        stuff = tuple(category for category in parsed if not category.isthing)
        ordered = [*things, *stuff] if label_order == "things_first" else parsed
        return cls(things, stuff, tuple(category.id for category in ordered))

    @property
    def num_things(self) -> int:
        """T, the number of thing categories."""
        return len(self.things)

    @property
    def num_stuff(self) -> int:
        """S, the number of stuff categories, without the label "things"."""
        return len(self.stuff)

    @cached_property
    def by_id(self) -> dict[int, Category]:
        """Category id to category."""
        return {category.id: category for category in (*self.things, *self.stuff)}

    @cached_property
    def thing_ids(self) -> dict[int, int]:
        """Thing category id to contiguous id, 0 to T-1."""
        return {category.id: index for index, category in enumerate(self.things)}

    @cached_property
    def stuff_ids(self) -> dict[int, int]:
        """Stuff category id to contiguous id, 1 to S."""
        return {category.id: index for index, category in enumerate(self.stuff, start=1)}

    def contiguous_id(self, category_id: int) -> int:
        """The contiguous id of a category: 0 to T-1 for a thing, 1 to S for stuff.

        Raises:
            DatasetError: no category has this id.
        """
        self._check(category_id)
        return self.thing_ids[category_id] if category_id in self.thing_ids else self.stuff_ids[category_id]

    def category_id(self, contiguous_id: int, isthing: bool) -> int:
        """The dataset's id of the thing class 0 to T-1 or the stuff class 1 to S.

        Raises:
            DatasetError: there is no such class.
        """
        classes = self.things if isthing else self.stuff
        index = contiguous_id if isthing else contiguous_id - 1
        if not 0 <= index < len(classes):
            kind = "thing" if isthing else "stuff"
            raise DatasetError(f"no {kind} class {contiguous_id}: the dataset has {len(classes)} {kind} categories")
        return classes[index].id

    def semantic_label(self, category_id: int, layout: SemanticLayout) -> int:
        """The label of a category in a semantic map of the given layout.

        Raises:
            DatasetError: no category has this id, or there is no such layout.
        """
        self._check(category_id)
        if _checked(layout) == "all":
            return self._label_of_id[category_id]
        return self.stuff_ids.get(category_id, 0)

    def semantic_label_of(self, contiguous_id: int, isthing: bool, layout: SemanticLayout) -> int:
        """The semantic label of a segment as dataset dicts describe it: contiguous category id and ``isthing``."""
        return self.semantic_label(self.category_id(contiguous_id, isthing), layout)

    def num_semantic(self, layout: SemanticLayout) -> int:
        """The number of labels of a semantic map: 1 + S or T + S."""
        return self.num_stuff + (self.num_things if _checked(layout) == "all" else 1)

    def thing_labels(self, layout: SemanticLayout) -> tuple[int, ...]:
        """The semantic labels that stand for things: ``(0,)``, or the label of each thing class in order."""
        if _checked(layout) == "separated":
            return (0,)
        return tuple(self._label_of_id[category.id] for category in self.things)

    def stuff_labels(self, layout: SemanticLayout) -> tuple[int, ...]:
        """The semantic label of each stuff class, in order of contiguous id 1 to S."""
        return tuple(self.semantic_label(category.id, layout) for category in self.stuff)

    def semantic_classes(self, layout: SemanticLayout) -> list[str]:
        """The names of the semantic labels, in order."""
        if _checked(layout) == "all":
            return [self.by_id[category_id].name for category_id in self.all_order]
        return [THINGS_NAME, *(category.name for category in self.stuff)]

    def metadata(self) -> dict[str, Any]:
        """The class names, colours and id maps under the names that Detectron2's ``Metadata`` has for them."""
        # Detectron2 files the label "things" under category id 0, which some datasets use for a category.
        things_id = 0 if 0 not in self.by_id else -1
        return {
            "categories": self,
            "thing_classes": [category.name for category in self.things],
            "thing_colors": [list(category.color) for category in self.things],
            "thing_dataset_id_to_contiguous_id": dict(self.thing_ids),
            "stuff_classes": self.semantic_classes("separated"),
            "stuff_colors": [list(THINGS_COLOR), *(list(category.color) for category in self.stuff)],
            "stuff_dataset_id_to_contiguous_id": {things_id: 0, **self.stuff_ids},
        }

    @cached_property
    def _label_of_id(self) -> dict[int, int]:
        return {category_id: label for label, category_id in enumerate(self.all_order)}

    def _check(self, category_id: int) -> None:
        if category_id not in self.by_id:
            raise DatasetError(f"unknown category id {category_id!r}: the dataset has {sorted(self.by_id)}")


@dataclass(frozen=True)
class SemanticCategories(PanopticCategories):
    """The classes of a semantic-only dataset: no things, and labels 0 to S-1 in both layouts.

    The contiguous id of a class is its label.
    """

    @classmethod
    def from_names(cls, names: Sequence[str], colors: Sequence[Sequence[int]] | None = None) -> SemanticCategories:
        """Takes the class names in order of label, and a colour (RGB, 0 to 255) for each if the dataset has them."""
        stuff = tuple(
            Category(label, name, False, _color(palette_color(label) if colors is None else colors[label]))
            for label, name in enumerate(names)
        )
        return cls((), stuff, tuple(range(len(stuff))))

    @cached_property
    def stuff_ids(self) -> dict[int, int]:
        """Label to label, 0 to S-1."""
        return {category.id: category.id for category in self.stuff}

    def category_id(self, contiguous_id: int, isthing: bool) -> int:
        """The label itself.

        Raises:
            DatasetError: there is no such class.
        """
        if isthing or not 0 <= contiguous_id < self.num_stuff:
            raise DatasetError(f"no class {contiguous_id}: the dataset has {self.num_stuff} semantic classes")
        return contiguous_id

    def num_semantic(self, layout: SemanticLayout) -> int:
        """S, in both layouts."""
        _checked(layout)
        return self.num_stuff

    def thing_labels(self, layout: SemanticLayout) -> tuple[int, ...]:
        """None, in both layouts."""
        _checked(layout)
        return ()

    def semantic_classes(self, layout: SemanticLayout) -> list[str]:
        """The names in order of label, in both layouts."""
        _checked(layout)
        return [category.name for category in self.stuff]

    def metadata(self) -> dict[str, Any]:
        """``categories``, ``stuff_classes`` and ``stuff_colors``, as Detectron2's semantic datasets have them."""
        return {
            "categories": self,
            "stuff_classes": self.semantic_classes("all"),
            "stuff_colors": [list(category.color) for category in self.stuff],
        }


def _checked(layout: SemanticLayout) -> SemanticLayout:
    if layout not in get_args(SemanticLayout):
        raise DatasetError(f"semantic layout is {layout!r}, not one of {get_args(SemanticLayout)}")
    return layout


def _color(color: Sequence[int]) -> tuple[int, int, int]:
    red, green, blue = color
    return int(red), int(green), int(blue)
