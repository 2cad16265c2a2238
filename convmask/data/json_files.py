"""Reading annotation files that may be missing, empty, broken or of another format."""

from __future__ import annotations

import json
import os
from typing import Any

from detectron2.utils.file_io import PathManager

from convmask.data.errors import DatasetError


def datasets_root() -> str:
    """The folder of the built-in datasets: ``$DETECTRON2_DATASETS``, by default ``datasets``."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def missing(path: str, what: str = "file") -> DatasetError:
    """The error for a path that does not exist; says where built-in datasets are looked for if it is one of theirs."""
    message = f"no {what} {path}"
    if path.startswith(datasets_root().rstrip("/") + "/"):
        setting = os.environ.get("DETECTRON2_DATASETS")
        message += f": built-in datasets are looked for in DETECTRON2_DATASETS ({setting or 'not set, so ./datasets'})"
    return DatasetError(message)


def read_json(path: str, lists: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads a json object through Detectron2's ``PathManager``.

    Args:
        path: the file.
        lists: names of the lists that the object must hold.

    Raises:
        DatasetError: the file is missing, unreadable, empty, no json, no object, or lacks one of ``lists``.
    """
    if not PathManager.isfile(path):
        raise missing(path)
    try:
        with PathManager.open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error
    if not data.strip():
        raise DatasetError(f"{path}: is empty")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is no valid json ({error or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: holds a {type(content).__name__}, not an object with {', '.join(lists) or 'fields'}"
        )
    for field in lists:
        if not isinstance(content.get(field), list):
            state = "is not a list" if field in content else "is missing"
            raise DatasetError(
                f"{path}: {field} {state}; the file has {', '.join(sorted(content)[:10]) or 'no fields'}"
            )
    return content
