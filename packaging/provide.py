"""Provides Detectron2 and panopticapi, which the package index does not hold under their own names.

    python packaging/provide.py            # installs what is missing into the environment of this Python
    python packaging/provide.py --registry # does not try GitHub

Order, for each: already importable -> left alone; the pinned official commit from GitHub, given up when GitHub does not
answer within ten seconds; the registry's archive, pinned by its hash and adapted by ``registry_*.py`` beside this file.
torch has to be installed before: Detectron2's setup imports it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import registry_detectron2
import registry_panopticapi

GITHUB_TIMEOUT_SECONDS = 10
DETECTRON2_COMMIT = "https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"
PANOPTICAPI_COMMIT = "https://github.com/cocodataset/panopticapi.git@7bb4655548f98f3fedc07bf37e9040a992b054b0"


def pip(*arguments: str) -> None:
    """Runs pip of this interpreter; its output goes where ours goes."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def github_answers(repository: str) -> bool:
    """Whether git can reach ``repository`` within :data:`GITHUB_TIMEOUT_SECONDS`."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        command = ["git", "ls-remote", "--exit-code", repository, "HEAD"]
        done = subprocess.run(command, timeout=GITHUB_TIMEOUT_SECONDS, capture_output=True, env=environment)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return False
    return done.returncode == 0


def install_from_github(pinned: str) -> bool:
    """Installs ``pinned`` (``https://...git@<commit>``). Returns False where GitHub is out of reach or the build fails."""
    repository = pinned.rpartition("@")[0]
    if not github_answers(repository):
        print(f"{repository} does not answer, taking the registry's archive", flush=True)
        return False
    try:
        pip("install", "--no-build-isolation", f"git+{pinned}")
    except subprocess.CalledProcessError:
        print(f"{pinned} does not build here, taking the registry's archive", flush=True)
        return False
    return True


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Fetches one pinned file into ``folder``. pip compares the hash before anything in the file is run."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    target = folder / "download"
    pip(
        "download",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--require-hashes",
        "-r",
        str(pinned),
        "-d",
        str(target),
    )
    (found,) = target.iterdir()
    return found


def install_detectron2_from_registry() -> None:
    """Builds and installs the wheel ``detectron2 0.5`` from the registry's archive."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = download(registry_detectron2.REQUIREMENT, registry_detectron2.SHA256, folder)
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(folder, filter="data")
            else:  # Python 3.10.0 to 3.10.11; the archive's hash was checked above
                tar.extractall(folder)
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


def provide(name: str, pinned: str, from_registry: Callable[[], None], try_github: bool) -> None:
    """Makes the module ``name`` importable, by the order that the module's docstring gives."""
    if importlib.util.find_spec(name) is not None:
        print(f"{name} is installed already, left as it is")
        return
    if not (try_github and install_from_github(pinned)):
        from_registry()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", action="store_true", help="do not try GitHub")
    try_github = not parser.parse_args().registry
    provide("detectron2", DETECTRON2_COMMIT, install_detectron2_from_registry, try_github)
    provide("panopticapi", PANOPTICAPI_COMMIT, install_panopticapi_from_registry, try_github)


if __name__ == "__main__":
    main()
