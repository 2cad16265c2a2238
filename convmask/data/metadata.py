"""Metadata that is read from the dataset when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from convmask.data.errors import DatasetError

LAZY_KEYS = frozenset(
    {
        "categories",
        "thing_classes",
        "thing_colors",
        "thing_dataset_id_to_contiguous_id",
        "stuff_classes",
        "stuff_colors",
        "stuff_dataset_id_to_contiguous_id",
    }
)


class LazyMetadata(Metadata):
    """Detectron2's ``Metadata`` whose class names, colours and id maps are loaded at their first use.

    Registering a dataset therefore reads nothing, and an absent file is an error only for who needs it.
    """

    __slots__ = ("_load",)

    def __init__(self, load: Callable[[], dict[str, Any]] | None = None, **values: Any) -> None:
        """Takes what is known already, and a function that returns the rest: some of ``LAZY_KEYS``."""
        super().__init__(**values)
        object.__setattr__(self, "_load", load)

    def __getattr__(self, key: str) -> Any:
        """Loads what is missing when ``key`` is one of ``LAZY_KEYS``.

        Raises:
            DatasetError: the dataset cannot be read.
            AttributeError: the metadata has no such key.
        """
        if key in LAZY_KEYS:
            self.resolve()
            if key in self.__dict__:
                return self.__dict__[key]
        return super().__getattr__(key)

    def resolve(self) -> None:
        """Loads what has not been loaded yet; values set by hand stay."""
        load = object.__getattribute__(self, "_load")
        if load is not None:
            values = load()
            object.__setattr__(self, "_load", None)
            for key, value in values.items():
                self.__dict__.setdefault(key, value)

    def as_dict(self) -> dict[str, Any]:
        """All values, loaded ones included."""
        self.resolve()
        return dict(self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles as plain, loaded metadata."""
        return _plain, (self.as_dict(),)


def _plain(values: dict[str, Any]) -> Metadata:
    return Metadata(**values)


def register(
    name: str,
    load_records: Callable[[], list[dict[str, Any]]],
    load_metadata: Callable[[], dict[str, Any]] | None,
    **metadata: Any,
) -> None:
    """Registers a dataset with Detectron2's catalogs; nothing is read before the first use.

    Raises:
        DatasetError: the name is taken.
    """
    if name in DatasetCatalog.list():
        raise DatasetError(f"dataset {name!r} is already registered")
    known = MetadataCatalog.pop(name).as_dict() if name in MetadataCatalog.list() else {}
    MetadataCatalog[name] = LazyMetadata(load_metadata, **{**known, "name": name, **metadata})
    DatasetCatalog.register(name, load_records)
