"""Says at import what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util
import sys

MINIMUM_DETECTRON2 = (0, 5)
HOW_TO_INSTALL = (
    "Run `make install` in a clone of ConvMask, or `python packaging/provide.py` there for this Python "
    f"({sys.executable}), or install Detectron2 from its GitHub source."
)


def check_detectron2() -> None:
    """Makes sure that a Detectron2 of at least version 0.5 can be imported.

    Raises:
        ImportError: it is missing or older. The message names the version found and the command to run.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        raise ImportError(f"ConvMask needs Detectron2, which is not installed. {HOW_TO_INSTALL}")
    if spec.origin is None:
        folders = ", ".join(spec.submodule_search_locations or [])
        raise ImportError(
            f"ConvMask needs Detectron2. What Python finds under its name is {folders}, a folder without __init__.py: "
            f"move it or leave it out of PYTHONPATH. {HOW_TO_INSTALL}"
        )
    import detectron2

    found = getattr(detectron2, "__version__", "unknown")
    if _major_minor(found) < MINIMUM_DETECTRON2:
        needed = ".".join(map(str, MINIMUM_DETECTRON2))
        raise ImportError(
            f"ConvMask needs Detectron2 {needed} or later, found {found} in {spec.origin}. "
            f"Run `{sys.executable} -m pip uninstall detectron2` first. {HOW_TO_INSTALL}"
        )


def reporting_the_environment() -> bool:
    """Whether ``python -m convmask.utils.collect_env`` is running, which has to work where a requirement is missing."""
    return any(argument.endswith("convmask.utils.collect_env") for argument in sys.orig_argv[1:3])


def _major_minor(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
