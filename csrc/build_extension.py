"""The optional compiled library: which sources, and a build command that may fail without failing the install.

``CONVMASK_BUILD_EXT=0`` builds nothing, ``1`` makes a failure fatal; otherwise the library is built if torch and a
compiler are there. ``FORCE_CUDA=1`` builds the CUDA kernels although no GPU is present (``TORCH_CUDA_ARCH_LIST`` says
for which). ``MAX_JOBS`` limits the parallel compilers.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = "convmask.ops"
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # one library for every Python from 3.10 on

_record = runpy.run_path(str(ROOT / "convmask" / "ops" / "_build_record.py"))


def extension_arguments() -> dict[str, Any]:
    """The arguments for ``setuptools.setup`` that build the library; none where it cannot or shall not be built."""
    wish = os.environ.get("CONVMASK_BUILD_EXT", "")
    if wish == "0":
        _say("not built, because CONVMASK_BUILD_EXT=0")
        return {}
    try:
        extension = _extension()
        command = _build_command(fatal=wish == "1")
    except Exception as error:
        if wish == "1":
            raise
        _say(f"not built: {error}")
        return {}
    limited = {"options": {"bdist_wheel": {"py_limited_api": "cp310"}}} if LIMITED_API else {}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}, **limited}


def _say(text: str) -> None:
    print(f"convmask: compiled operators {text}", file=sys.stderr)


def _extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(CSRC.rglob("*.cpp"))
    compile_arguments = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]}
    if sys.platform == "win32":
        compile_arguments = {"cxx": ["/O2"]}
    elif platform.machine() in ("x86_64", "AMD64"):
        compile_arguments["cxx"].append("-march=x86-64-v2")  # popcnt and SSE4, in every such processor since 2009
    link_arguments: list[str] = []
    if sys.platform == "linux":
        # at::parallel_for is a template in torch's headers: without the flag it compiles to one thread
        compile_arguments["cxx"].append("-fopenmp")
        link_arguments.append("-fopenmp")
    kind = CppExtension
    if _with_cuda():
        _find_cuda_files()
        kind = CUDAExtension
        sources += sorted(CSRC.rglob("*.cu"))
        compile_arguments["nvcc"] = ["-O3"]
    macros = [("Py_LIMITED_API", "0x030A0000")] if LIMITED_API else []
    return kind(
        f"{PACKAGE}._C",
        [str(source.relative_to(ROOT)) for source in sources],
        define_macros=macros,
        extra_compile_args=compile_arguments,
        extra_link_args=link_arguments,
        py_limited_api=LIMITED_API,
    )


def _with_cuda() -> bool:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("FORCE_CUDA") == "1":
        if torch.version.cuda is None or CUDA_HOME is None:
            raise RuntimeError("FORCE_CUDA=1 needs a torch built with CUDA, and the CUDA toolkit (nvcc)")
        return True
    return torch.version.cuda is not None and CUDA_HOME is not None and torch.cuda.is_available()


def _find_cuda_files() -> None:
    """Helps torch where the toolkit lies in an unusual place, or is one without the mathematical libraries."""
    import torch
    from torch.utils import cpp_extension

    if not Path(cpp_extension.CUDA_HOME, "include", "cuda_runtime.h").is_file():  # torch took the folder above nvcc's
        usual = Path("/usr/local/cuda")
        if (usual / "include" / "cuda_runtime.h").is_file():
            cpp_extension.CUDA_HOME = str(usual)
    if not Path(cpp_extension.CUDA_HOME, "include", "cusparse.h").is_file():
        packages = Path(torch.__file__).parents[1] / "nvidia"  # the wheels that torch depends on hold these headers
        found = {str(header.parent) for header in packages.glob("*/include/cu*.h")}
        os.environ["CPATH"] = os.pathsep.join([*filter(None, [os.environ.get("CPATH")]), *sorted(found)])


def _build_command(*, fatal: bool) -> type:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildOptionalExtension(BuildExtension):  # type: ignore[misc]
        """Builds the library and the record beside it; leaves both out if a compiler fails."""

        def run(self) -> None:
            folder = self._folder()
            (folder / _record["NAME"]).unlink(missing_ok=True)  # a library without a record is never loaded
            try:
                super().run()
            except Exception as error:
                if fatal:
                    raise
                _say(f"not built, the install goes on without them: {str(error).strip()}")
                self.extensions = []
                return
            cuda = any(source.endswith(".cu") for e in self.extensions for source in e.sources)
            _record["write_record"](
                folder,
                torch=torch.__version__,
                cuda=torch.version.cuda if cuda else None,
                sources=_record["source_digest"](CSRC),
            )
            _say(f"built in {folder}")

        def _folder(self) -> Path:
            root = ROOT if self.inplace else Path(self.build_lib)
            return root / PACKAGE.replace(".", "/")

        def get_outputs(self) -> list[str]:
            outputs: list[str] = super().get_outputs()
            return [*outputs, str(Path(self.build_lib, PACKAGE.replace(".", "/"), _record["NAME"]))] if outputs else []

    return BuildOptionalExtension
