"""Loads the compiled kernels, if there are any that fit, and says why not.

The schemas and the reference implementations are in Python, so every operator works without the library: only slower.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from convmask.ops import _build_record

BUILD_COMMAND = "CONVMASK_BUILD_EXT=1 pip install --no-build-isolation --no-deps -e . (in a clone of ConvMask)"

_FOLDER = Path(__file__).parent
_CSRC = _FOLDER.parents[1] / "csrc"  # exists in a clone; an installed package has no sources beside it
_logger = logging.getLogger(__name__)
_status = (False, "convmask.ops is not imported")
_warned = False

# Operator -> how much slower its reference is, such as "about 20 times slower"; filled by `register_operator`.
SLOWDOWNS: dict[str, str] = {}


def extension_status() -> tuple[bool, str]:
    """Whether the compiled kernels are loaded, and which, or why not.

    Returns:
        ``(True, "CPU kernels, built with torch 2.9.0")`` or ``(False, reason)``. The reason ends in the command that
        helps, where a command does.
    """
    return _status


def load_extension() -> None:
    """Loads the library once; never raises. The outcome is in ``extension_status``."""
    global _status
    _status = _load(_FOLDER, _CSRC)


def _load(folder: Path, csrc: Path) -> tuple[bool, str]:
    if os.environ.get("CONVMASK_DISABLE_EXT", "0") not in ("", "0"):
        return False, "CONVMASK_DISABLE_EXT is set; unset it to use them"
    libraries = sorted(p for p in folder.glob("_C.*") if p.suffix in (".so", ".pyd", ".dylib"))
    if not libraries:
        return False, f"they have not been built; build them with {BUILD_COMMAND}"
    try:
        record = _build_record.read_record(folder)
    except ValueError as error:
        return False, f"{error}; rebuild them with {BUILD_COMMAND}"
    # A library is tied to the C++ interface of the torch it was compiled against and to the schemas of its sources.
    if record["torch"] != torch.__version__:
        built, running = record["torch"], torch.__version__
        return (
            False,
            f"they were built with torch {built}, but torch {running} is running; rebuild them with {BUILD_COMMAND}",
        )
    if (csrc / "module.cpp").is_file() and record["sources"] != _build_record.source_digest(csrc):
        return (
            False,
            f"they were built from other sources than those in {csrc.name}/; rebuild them with {BUILD_COMMAND}",
        )
    try:
        torch.ops.load_library(libraries[0])
    except Exception as error:  # whatever is wrong with the library, the reference works
        return False, f"{libraries[0].name} cannot be loaded ({error}); rebuild them with {BUILD_COMMAND}"
    kernels = f"CPU and CUDA {record['cuda']} kernels" if record["cuda"] else "CPU kernels"
    return True, f"{kernels}, built with torch {record['torch']}"


def warn_slow_path(device_type: str) -> None:
    """Says, once in a process, that plain PyTorch references run, how much slower they are, and what helps.

    Args:
        device_type: of the tensors at hand, such as "cpu".
    """
    global _warned
    if _warned:
        return
    _warned = True
    loaded, reason = _status
    if loaded:
        reason = f"there are {reason}, and none for {device_type}; rebuild them there with {BUILD_COMMAND}"
    slower = ", ".join(f"{name} {slowdown}" for name, slowdown in sorted(SLOWDOWNS.items()))
    _logger.warning("ConvMask's compiled operators are not in use: %s. Slower code runs instead (%s).", reason, slower)
