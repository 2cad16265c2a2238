"""Makes a virtual environment that can be installed into, out of whatever is there.

    python packaging/create_environment.py .venv            # keeps a usable one, whatever its Python
    python packaging/create_environment.py .venv --exactly  # which must then have this Python's version

An installation that was interrupted leaves packages behind whose files are not all there, though pip counts them as
installed. They are taken off pip's list, so that the next ``pip install`` completes them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path


def python_version(folder: Path) -> str | None:
    """The version (``"3.11"``) of the environment at ``folder``, or None where there is no environment that runs."""
    script = "import sys; print('%d.%d' % sys.version_info[:2], sys.prefix != sys.base_prefix)"
    try:
        done = subprocess.run([str(folder / "bin" / "python"), "-c", script], capture_output=True, text=True)
    except OSError:
        return None
    version, _, isolated = done.stdout.strip().partition(" ")
    return version if done.returncode == 0 and isolated == "True" else None


def unfinished_distributions(folder: Path) -> list[Path]:
    """The ``dist-info`` folders of packages whose installation was interrupted.

    pip writes INSTALLER after the last file of the package.
    """
    infos = folder.glob("lib/python*/site-packages/*.dist-info")
    return sorted(info for info in infos if not (info / "INSTALLER").is_file())


def create(folder: Path, exactly: bool = False) -> None:
    """Creates the environment at ``folder``, or makes the one that is there usable.

    Raises:
        SystemExit: ``exactly``, and the environment has another Python than the running one.
    """
    found, wanted = python_version(folder), f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found is None:
        print(f"creating {folder} with Python {wanted}", flush=True)
        venv.EnvBuilder(clear=folder.exists(), with_pip=True, symlinks=True).create(folder)
        return
    if exactly and found != wanted:
        sys.exit(
            f"{folder} has Python {found}, asked for is {wanted}: run `make distclean` first, which deletes {folder}"
        )
    for info in unfinished_distributions(folder):
        print(f"{info.name} was not installed to the end", flush=True)
        shutil.rmtree(info)
    python = str(folder / "bin" / "python")
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        subprocess.run([python, "-m", "ensurepip", "--upgrade"], check=True)


def main() -> None:
    """Creates the environment that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exactly", action="store_true", help="do not keep an environment of another Python version")
    arguments = parser.parse_args()
    create(arguments.folder, arguments.exactly)


if __name__ == "__main__":
    main()
