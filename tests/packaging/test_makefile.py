"""What make does before it installs anything, in a copy of the clone's set-up files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(repository: Path, tmp_path: Path) -> Path:
    shutil.copy(repository / "Makefile", tmp_path)
    for folder in ("requirements", "packaging"):
        shutil.copytree(repository / folder, tmp_path / folder)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "setup.py").touch()
    return tmp_path


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "TORCH", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=clone, capture_output=True, text=True, env=environment)


def fake_python(clone: Path, text: str) -> str:
    path = clone / "fake python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_make_alone_lists_every_target(clone: Path) -> None:
    done = make(clone)
    assert done.returncode == 0
    for target in ("demo", "test", "test-all", "docs", "lint", "format", "check-detectron2", "build", "wheel", "clean"):
        assert f"make {target} " in done.stdout
    assert not (clone / ".venv").exists()


def test_an_old_python_is_refused(clone: Path) -> None:
    done = make(clone, "test", fake_python(clone, '[ "$1" = --version ] && echo Python 3.9.1; exit 1'))
    assert done.returncode != 0
    assert "ConvMask needs Python 3.10 or later" in done.stderr and "Python 3.9.1" in done.stderr


def test_an_absent_python_is_named(clone: Path) -> None:
    assert "no-such-python is not there" in make(clone, "test", "PYTHON=no-such-python").stderr


def test_an_unknown_pair_is_refused_and_the_known_ones_named(clone: Path) -> None:
    done = make(clone, "test", "TORCH=1.0", fake_python(clone, "exit 0"))
    assert done.returncode != 0
    assert "TORCH=1.0: there is no such pair, there are 2.14" in done.stderr


def test_a_second_run_installs_nothing(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".environment-is-complete").write_text("2.9\n")
    (clone / ".venv" / ".convmask-is-installed").touch()
    assert make(clone, "--question", "install").returncode == 0
    assert "torch-2.14.txt" in make(clone, "--dry-run", "install", "TORCH=2.14").stdout
    os.utime(clone / "requirements" / "dev.txt", (2**31, 2**31))
    assert "-r requirements/torch-2.9.txt" in make(clone, "--dry-run", "install").stdout


def test_each_pair_pins_torch_and_torchvision(repository: Path) -> None:
    for path in (repository / "requirements").glob("torch-*.txt"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        torch, torchvision = (line.split("==") for line in lines)
        assert (torch[0], torchvision[0]) == ("torch", "torchvision")
        assert torch[1].startswith(path.stem.removeprefix("torch-") + ".")
        # torchvision 0.(n + 15) has gone with torch 2.n since 2.0
        assert int(torchvision[1].split(".")[1]) == int(torch[1].split(".")[1]) + 15


def test_a_folder_without_detectron2_is_no_checkout(clone: Path, tmp_path: Path) -> None:
    import check_checkout

    with pytest.raises(SystemExit, match="is no checkout of Detectron2"):
        check_checkout.check(str(tmp_path))
    with pytest.raises(SystemExit, match="name the checkout"):
        check_checkout.check("")


def test_a_checkout_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    import check_checkout

    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("__version__ = '0.6'\n")
    with pytest.raises(SystemExit, match="cannot be imported: ModuleNotFoundError"):
        check_checkout.check(str(tmp_path))
    (tmp_path / "detectron2" / "layers.py").touch()
    assert check_checkout.check(str(tmp_path)) == "0.6"
