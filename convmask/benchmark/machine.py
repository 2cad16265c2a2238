"""What a measurement was made on: the names of the hardware and the versions that matter, without paths."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torchvision

import convmask
from convmask.ops import extension_status


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of the hardware of a device: "cpu", "cuda", "cuda:1"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def describe_machine(device: str = "cpu") -> dict[str, str | int]:
    """Hardware, versions and the time in UTC, for a record of a measurement on ``device``."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, str | int] = {
        "device": device_name(device),
        "processor": processor(),
        "cores": usable or 1,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": _version("detectron2"),
        "convmask": convmask.__version__,
        "operators": "compiled" if extension_status()[0] else "references",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        described["cuda"] = str(torch.version.cuda)
        described["cudnn"] = str(torch.backends.cudnn.version())
    return described


def in_a_line(machine: dict[str, str | int]) -> str:
    """A description of :func:`describe_machine` for the head of a table."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "torchvision", "detectron2", "convmask"))
    gpu = f"CUDA {machine['cuda']}, " if "cuda" in machine else ""
    where = f"{machine['device']}, {machine['threads']} of {machine['cores']} threads"
    return f"{where}; {gpu}{versions}, operators: {machine['operators']}; {machine['time']}"


def _version(distribution: str) -> str:
    # a checkout on the path is no distribution
    module = __import__(distribution)
    try:
        return str(getattr(module, "__version__", "")) or version(distribution)
    except PackageNotFoundError:
        return "of unknown version"
