"""The most memory that a function takes above what is there when it begins."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def extra_memory(function: Callable[[], Any], device: str = "cpu") -> float:
    """MiB that one call of ``function`` takes at its peak, its result included.

    On CUDA that of PyTorch's allocator. On the CPU that of the whole process: call it in a process that has done
    nothing else (:func:`in_fresh_process`), in which nothing lies about that was freed and can be taken again.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        extra = (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    else:
        _forget_the_peak()
        before = _peak_resident_memory()
        result = function()
        extra = _peak_resident_memory() - before
    del result
    return extra


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function of a module's top level returns in a process of its own.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, by a lack of memory perhaps.
        Exception: whatever the function raises.
    """
    # A forked process would have the memory of this one, and the threads of no library.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _forget_the_peak() -> None:
    """Lets the peak begin at what is there now; where only newer systems or root may do so, it stays a lower bound."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_resident_memory() -> float:
    """MiB. Not ``ru_maxrss`` on Linux, which begins at the peak of the parent process."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
