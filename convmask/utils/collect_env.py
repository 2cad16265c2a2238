"""What this machine has of everything that ConvMask runs on: ``python -m convmask.utils.collect_env``.

Paste its output into a bug report. A piece that is missing or broken is a line of the report, never an error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

# Module and the distributions that may hold it, for those of which the version says enough.
LIBRARIES = {
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "PIL": ("pillow", "pillow-simd"),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
    "fvcore": ("fvcore",),
    "iopath": ("iopath",),
    "pycocotools": ("pycocotools",),
    "panopticapi": ("panopticapi",),
    "rich": ("rich",),
    "tensorboard": ("tensorboard",),
}
ENVIRONMENT_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DETECTRON2_DATASETS", "FVCORE_CACHE", "PYTHONPATH")


def collect() -> dict[str, str]:
    """Everything that the report says: what it is about -> a line of text. Never raises."""
    report = {
        "convmask": _attempt(_convmask),
        "operators": _attempt(_operators),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": _attempt(_torch),
        "torchvision": _attempt(_torchvision),
        "GPUs": _attempt(_gpus),
        "threads": _attempt(_threads),
        "detectron2": _attempt(_detectron2),
    }
    for module, distributions in LIBRARIES.items():
        report[module] = _attempt(partial(_library, module, distributions))
    report["C++ compiler"] = _attempt(_compiler)
    report["nvcc"] = _attempt(_nvcc)
    report["environment"] = _environment_variables()
    return report


def format_report(report: dict[str, str]) -> str:
    """``report`` as lines of two columns."""
    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in report.items())


def _attempt(describe: Callable[[], str]) -> str:
    # A broken installation fails in every way there is: missing symbols, SystemExit at import, wrong types.
    try:
        return describe()
    except ModuleNotFoundError as error:
        return f"missing ({error})"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"broken ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _convmask() -> str:
    module = importlib.import_module("convmask")
    return f"{module.__version__} ({_folder(module)})"


def _operators() -> str:
    loaded, explanation = importlib.import_module("convmask.ops").extension_status()
    return f"{'compiled' if loaded else 'not compiled, the slower PyTorch references run'}: {explanation}"


def _torch() -> str:
    torch = importlib.import_module("torch")
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "no CUDA"
    return f"{torch.__version__}, built with {cuda} ({_folder(torch)})"


def _torchvision() -> str:
    torchvision = importlib.import_module("torchvision")
    has_operators = importlib.import_module("torchvision.extension")._has_ops()
    missing = "" if has_operators else ", its operators cannot be loaded: not the pair of this torch"
    return f"{torchvision.__version__}{missing} ({_folder(torchvision)})"


def _gpus() -> str:
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        return "none"
    properties = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    return "; ".join(f"{p.name}, compute {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties)


def _threads() -> str:
    torch = importlib.import_module("torch")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"torch uses {torch.get_num_threads()} (interop {torch.get_num_interop_threads()}) of {usable} cores"


def _detectron2() -> str:
    module = importlib.import_module("detectron2")
    folder = _folder(module)
    return f"{module.__version__}, {_detectron2_origin(folder)}, {_detectron2_operators()} ({folder})"


def _detectron2_origin(folder: Path) -> str:
    """Where the Detectron2 in ``folder`` came from; packaging/provide.py has two ways."""
    if (folder / "_C.py").is_file():
        return "from the registry's archive"
    if "site-packages" not in folder.parts and "dist-packages" not in folder.parts:
        return "from a checkout"
    text = importlib.metadata.distribution("detectron2").read_text("direct_url.json")
    commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return f"from GitHub, commit {commit[:12]}" if commit else "from a wheel"


def _detectron2_operators() -> str:
    spec = importlib.util.find_spec("detectron2._C")
    if spec is None or str(spec.origin).endswith(".py"):
        return "without compiled operators"
    try:
        importlib.import_module("torch")
        compiled = importlib.import_module("detectron2._C")
    except ImportError as error:
        return f"with compiled operators that cannot be loaded ({str(error).partition(chr(10))[0]})"
    return f"with compiled operators ({compiled.get_compiler_version()}, CUDA {compiled.get_cuda_version()})"


def _library(module: str, distributions: tuple[str, ...]) -> str:
    folder = _folder(importlib.import_module(module))
    versions = {name: _version(name) for name in distributions}
    installed = [f"{name} {version}" if name != module else version for name, version in versions.items() if version]
    several = ": two packages with the same files break each other" if len(installed) > 1 else ""
    return f"{', '.join(installed) or 'of unknown version'}{several} ({folder})"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(module: ModuleType) -> Path:
    return Path(module.__file__).parent if module.__file__ else Path(next(iter(module.__path__)))


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")):
        path = shutil.which(name)
        if path:
            return f"{_output_of(path, '--version')[0]} ({path})"
    return "missing"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and Path(path).is_file():
            release = [line for line in _output_of(path, "--version") if "release" in line]
            return f"{release[0] if release else 'of unknown version'} ({path})"
    return "missing"


def _output_of(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    return (done.stdout or done.stderr).strip().splitlines() or ["of unknown version"]


def _environment_variables() -> str:
    chosen = sorted(name for name in os.environ if name.startswith("CONVMASK_") or name in ENVIRONMENT_VARIABLES)
    return ", ".join(f"{name}={os.environ[name]}" for name in chosen) or "nothing set that matters here"


if __name__ == "__main__":
    print(format_report(collect()))
