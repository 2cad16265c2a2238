"""From a short name or a path to the file of a config, and what is recorded about it."""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from convmask.engine.config_files import configs_folder
from convmask.engine.errors import ConfigError


@functools.cache
def config_files() -> dict[str, Path]:
    """Every config that describes a whole model, by its name below ``configs`` (``"FCIS/fcis_R_101_voc.yaml"``)."""
    root = configs_folder()
    paths = sorted(path for path in root.glob("*/*.yaml") if not path.name.startswith("Base-"))
    return {path.relative_to(root).as_posix(): path for path in paths}


def full_name(name: str) -> str:
    """The name of a config below ``configs``.

    Args:
        name: that name, with or without ``configs/`` before it and ``.yaml`` after it, or the file's name alone
            (``"panoptic_fcn_nuclei"``), which no two configs share.

    Raises:
        ConfigError: there is none of that name; the message lists the most similar ones.
    """
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    for known in config_files():
        path = known.removesuffix(".yaml")
        if wanted in (path, path.rpartition("/")[2]):
            return known
    short = [known.removesuffix(".yaml").rpartition("/")[2] for known in config_files()]
    close = difflib.get_close_matches(wanted.rpartition("/")[2], short, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "`python -m convmask.model_zoo` lists all"
    raise ConfigError(f"no config {name!r} in ConvMask's model zoo; {hint}")


@functools.cache
def _folder_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def results_of(name: str) -> dict[str, Any]:
    """What ``results.json`` beside a config says about it: ``weights``, ``published``, ``trained``, each where known.

    Args:
        name: of :func:`config_files`.
    """
    path = config_files()[name]
    return dict(_folder_results(path.parent).get(path.stem, {}))
