"""Says at import what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util

MINIMUM_DETECTRON2 = (0, 5)
HOW_TO_INSTALL = (
    "Run `make` in a clone of ConvMask, or `python packaging/provide.py`, or install it from its GitHub source."
)


def check_detectron2() -> None:
    """Makes sure that a Detectron2 of at least version 0.5 can be imported.

    Raises:
        ImportError: it is missing or older. The message names the version found and the command to run.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(f"ConvMask needs Detectron2, which is not installed. {HOW_TO_INSTALL}")
    import detectron2

    found = getattr(detectron2, "__version__", "unknown")
    parts = found.split("+")[0].split(".")[:2]
    if not all(p.isdigit() for p in parts) or tuple(int(p) for p in parts) < MINIMUM_DETECTRON2:
        needed = ".".join(map(str, MINIMUM_DETECTRON2))
        raise ImportError(f"ConvMask needs Detectron2 {needed} or later, found {found}. {HOW_TO_INSTALL}")
