"""Importing a user's own module, which registers datasets."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from convmask.data.errors import DatasetError


def import_user_module(name: str) -> ModuleType:
    """Imports a module that registers datasets, from the current folder or from wherever Python finds it.

    Args:
        name: as in an ``import`` statement, or the path of the file: ``my_datasets`` or ``data/my_datasets.py``.

    Raises:
        DatasetError: there is no such module. Errors of the module itself are raised as they are.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise DatasetError(f"no module to import: there is no file {name}")
        folder, name = str(path.resolve().parent), path.stem
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        found = name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise DatasetError(f"no module {name!r} to import: looked in {folder} and among the installed ones")
    return importlib.import_module(name)
