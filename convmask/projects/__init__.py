"""The methods, one module each: ``convmask.projects.panoptic_fpn`` and so on.

In an installed package they are ordinary subpackages. In a clone they live in ``projects/<Method>/<method>``, where the
finder below looks for them: setuptools cannot map a subpackage to another folder in an editable install. Deleting a
method's folder takes it away and leaves the others as they are.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_CLONE = Path(__file__).resolve().parents[2] / "projects"


def _in_clone() -> dict[str, Path]:
    return {init.parent.name: init for init in _CLONE.glob("*/*/__init__.py")}


class _ProjectFinder(importlib.abc.MetaPathFinder):
    """Finds ``convmask.projects.<method>`` in the ``projects`` folder of a clone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        init = _in_clone().get(name) if parent == __name__ else None
        if init is None:
            return None
        return importlib.util.spec_from_file_location(fullname, init, submodule_search_locations=[str(init.parent)])


if _CLONE.is_dir():
    sys.meta_path.append(_ProjectFinder())


def available() -> list[str]:
    """Names of the methods that are present, sorted, without importing them."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} | set(_in_clone()))


def load(name: str) -> ModuleType:
    """Imports the method ``name`` (``"panoptic_fpn"``), which registers its parts with Detectron2.

    Raises:
        ImportError: there is no such method; the message lists those there are.
    """
    if name not in available():
        raise ImportError(f"no method {name!r} in convmask.projects; there are {', '.join(available())}")
    return importlib.import_module(f"{__name__}.{name}")


def part_of(architecture: type, part: str) -> ModuleType | None:
    """Imports an optional module of the method that a class belongs to.

    Args:
        architecture: a class of a method, or of its subclasses elsewhere.
        part: name of the module: ``"viewer"`` is ``convmask.projects.<method>.viewer``.

    Returns:
        The module; None where the class is of no method in ``convmask.projects``, or the method has no such module.
    """
    for ancestor in architecture.__mro__:
        if not ancestor.__module__.startswith(f"{__name__}."):
            continue
        package = ".".join(ancestor.__module__.split(".")[:3])
        if importlib.util.find_spec(f"{package}.{part}") is not None:
            return importlib.import_module(f"{package}.{part}")
    return None
