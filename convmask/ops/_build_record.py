"""What a compiled library was built from: a json file beside it, read before the library is loaded.

Imports the standard library only, because ``setup.py`` runs this file on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = "_C.json"


def source_digest(csrc: Path) -> str:
    """The sha256 of every C++ and CUDA source below ``csrc``, names included."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")):
        for part in (path.relative_to(csrc).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def write_record(folder: Path, *, torch: str, cuda: str | None, sources: str) -> None:
    """Writes the record beside the library in ``folder``.

    Args:
        folder: where the library is.
        torch: ``torch.__version__`` of the build.
        cuda: the CUDA version if there are CUDA kernels, else None.
        sources: ``source_digest`` of the build.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{NAME}.{os.getpid()}"
    temporary.write_text(json.dumps({"torch": torch, "cuda": cuda, "sources": sources}) + "\n")
    temporary.replace(folder / NAME)


def read_record(folder: Path) -> dict[str, str | None]:
    """Reads the record.

    Raises:
        ValueError: there is none, or it is not what ``write_record`` writes.
    """
    try:
        record = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no build record {NAME}: their last build did not finish") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"their build record {NAME} cannot be read ({error})") from None
    if not isinstance(record, dict) or not {"torch", "cuda", "sources"} <= record.keys():
        raise ValueError(f"their build record {NAME} is incomplete")
    return record
