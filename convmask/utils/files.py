"""Writing files so that no half-written one is ever seen under its name."""

from __future__ import annotations

import os
import uuid


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes ``content`` under a temporary name beside ``path``, then renames it; an existing file is replaced.

    Raises:
        OSError: the file cannot be written. What was at ``path`` is still there, and nothing else is left behind.
    """
    folder, name = os.path.split(os.fspath(path))
    # A short name: that of the file itself may be as long as the file system allows.
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, os.path.join(folder, name))
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
