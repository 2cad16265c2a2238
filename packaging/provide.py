"""Provides Detectron2, panopticapi and OpenCV: what cannot simply be listed as a requirement.

    python packaging/provide.py            # installs what is missing into the environment of this Python
    python packaging/provide.py --registry # does not try GitHub

Whatever is importable already is left alone. Detectron2 and panopticapi are not on the package index under their own
names: they come from the pinned official commit on GitHub, given up when GitHub does not answer within ten seconds, and
then from the registry's archive, pinned by its hash and adapted by ``registry_*.py`` beside this file. OpenCV comes in
packages that break each other when two of them are installed, so the headless one is installed only where there is no
``cv2``. torch has to be installed before: Detectron2's setup imports it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import registry_detectron2
import registry_panopticapi
from substitution import PatchError

GITHUB_TIMEOUT_SECONDS = 10
DETECTRON2_COMMIT = "https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"
PANOPTICAPI_COMMIT = "https://github.com/cocodataset/panopticapi.git@7bb4655548f98f3fedc07bf37e9040a992b054b0"
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"

# git asks nobody for a password, and gives up a transfer that stands still.
GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
    "GIT_HTTP_LOW_SPEED_TIME": str(GITHUB_TIMEOUT_SECONDS),
}


class ProvideError(RuntimeError):
    """Something could not be provided; the message says what, and what to do."""


def pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Runs pip of this interpreter; its output goes where ours goes.

    Raises:
        ProvideError: pip failed. Its own message stands in the output.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ProvideError(f"`pip {' '.join(arguments)}` failed, its message is above")


def importable(name: str) -> bool:
    """Whether ``import name`` finds a package or module. A bare folder of that name is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def check_build_tools() -> None:
    """Makes sure that what Detectron2's setup imports is there.

    Raises:
        ProvideError: something is missing. The message names it and the command to run.
    """
    missing = [name for name in ("torch", "setuptools", "wheel") if not importable(name)]
    if missing:
        pair = sorted(REQUIREMENTS.glob("torch-*.txt"), key=lambda path: int(path.stem.rpartition(".")[2]))[-1]
        files = " ".join(f"-r {path}" for path in (pair, REQUIREMENTS / "build.txt"))
        raise ProvideError(
            f"Detectron2 cannot be built without {', '.join(missing)}. "
            f"First run `{sys.executable} -m pip install {files}`, or install any other torch from 2.4 on "
            "with the torchvision that goes with it."
        )


@functools.cache
def github_answers(repository: str = DETECTRON2_COMMIT.rpartition("@")[0]) -> bool:
    """Whether git can reach ``repository`` within ten seconds. Asked once for everything on GitHub."""
    try:
        process = subprocess.Popen(
            ["git", "ls-remote", "--exit-code", repository, "HEAD"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **GIT_ENVIRONMENT},
            start_new_session=True,
        )
    except FileNotFoundError:
        return False
    try:
        return process.wait(GITHUB_TIMEOUT_SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        # git leaves the connection to a child of its own, which outlives it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def install_from_github(pinned: str) -> bool:
    """Installs ``pinned`` (``https://...git@<commit>``). Returns False where it is out of reach or does not build."""
    if not github_answers():
        print("GitHub does not answer, taking the registry's archive", flush=True)
        return False
    try:
        pip("install", "--no-build-isolation", f"git+{pinned}", environment=GIT_ENVIRONMENT)
    except ProvideError:
        print(f"{pinned} cannot be installed here, taking the registry's archive", flush=True)
        return False
    return True


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Fetches one pinned file into ``folder``. pip compares the hash before anything in the file is run.

    Raises:
        ProvideError: the index does not hold it, the download broke off, or the hash is another one.
    """
    pinned, target = folder / "pinned.txt", folder / "download"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--require-hashes"]
    pip("download", *options, "-r", str(pinned), "-d", str(target))
    (found,) = target.iterdir()
    return found


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar archive whose hash has been checked."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:  # Python 3.10.0 to 3.10.11
            tar.extractall(folder)


def install_detectron2_from_registry() -> None:
    """Builds and installs the wheel ``detectron2 0.5`` from the registry's archive."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unpack(download(registry_detectron2.REQUIREMENT, registry_detectron2.SHA256, folder), folder)
        (source,) = folder.glob("detectron2_cdo-*")
        registry_detectron2.apply(source)
        pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
        (wheel,) = folder.glob("detectron2-*.whl")
        pip("install", str(wheel))


def install_panopticapi_from_registry() -> None:
    """Rebuilds and installs the registry's wheel under the name ``panopticapi``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original = download(registry_panopticapi.REQUIREMENT, registry_panopticapi.SHA256, folder)
        unpacked = folder / "unpacked"
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(original), str(unpacked)], check=True)
        registry_panopticapi.rewrite_metadata(unpacked)
        subprocess.run([sys.executable, "-m", "wheel", "pack", str(unpacked), "-d", str(folder)], check=True)
        (wheel,) = folder.glob("panopticapi-*.whl")
        pip("install", str(wheel))


def install_opencv() -> None:
    """Installs the headless OpenCV."""
    pip("install", "-r", str(REQUIREMENTS / "opencv.txt"))


def provide(name: str, *installers: Callable[[], bool | None]) -> None:
    """Makes the module ``name`` importable: leaves it alone where it is, else runs ``installers`` until one succeeds.

    An installer that returns False has not succeeded and leaves it to the next.

    Raises:
        ProvideError: the last of them failed.
    """
    if importable(name):
        print(f"{name} is installed already, left as it is", flush=True)
        return
    for install in installers:
        if install() is not False:
            return
    raise ProvideError(f"{name} could not be installed")


def main() -> None:
    """Provides what is missing. Exits with one message where that is impossible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", action="store_true", help="do not try GitHub")
    try_github = not parser.parse_args().registry

    def from_github(pinned: str) -> Callable[[], bool]:
        return lambda: try_github and install_from_github(pinned)

    try:
        provide("cv2", install_opencv)
        if not importable("detectron2"):
            check_build_tools()
        provide("detectron2", from_github(DETECTRON2_COMMIT), install_detectron2_from_registry)
        provide("panopticapi", from_github(PANOPTICAPI_COMMIT), install_panopticapi_from_registry)
    except (ProvideError, PatchError, subprocess.CalledProcessError) as error:
        sys.exit(f"packaging/provide.py: {error}")


if __name__ == "__main__":
    main()
