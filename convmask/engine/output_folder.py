"""The output folder of a run: that it can be written, and that no other run writes into it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import IO

from detectron2.utils import comm

from convmask.engine.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

# The locks of this process, by the folder's real path: a lock is given back when its file is closed.
_HELD: dict[str, IO[str]] = {}


def claim_output_folder(folder: str) -> None:
    """Makes a folder and locks it for this job; the system takes the lock away when the main process ends, however.

    Of several processes the first does it. Folders on remote storage ("s3://...") are left to their handler.

    Raises:
        ConfigError: in every process: the folder cannot be made or written, or another run has locked it.
    """
    problem = ""
    if comm.is_main_process() and "://" not in folder:
        problem = _claim(folder)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ConfigError(f"OUTPUT_DIR {folder}: {problem}")


def _claim(folder: str) -> str:
    """What is wrong with the folder, "" if nothing is and it is locked."""
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.realpath(folder)
        if path in _HELD:
            # The folder of an earlier run of this process may have been deleted since.
            if os.path.exists(os.path.join(path, LOCK_FILE)):
                return ""
            _HELD.pop(path).close()
        file = open(os.path.join(path, LOCK_FILE), "a+")  # noqa: SIM115  open as long as the process lives
    except OSError as error:
        return f"cannot be written to: {error.strerror or error}"
    taken = _lock(file)
    if taken:
        file.close()
        return taken
    _HELD[path] = file
    return ""


def _lock(file: IO[str]) -> str:
    if fcntl is None:
        return ""
    try:
        # A lock of the process, not of the open file: workers of a data loader that outlive it do not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            return f"another run ({file.read().strip() or 'unknown'}) writes there; name another folder"
        logger.warning("%s: this file system has no locks (%s): see to it that one run writes here", file.name, error)
        return ""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""
