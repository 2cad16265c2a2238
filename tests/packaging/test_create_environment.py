from __future__ import annotations

import sys
import venv
from pathlib import Path

import create_environment
import pytest

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment without pip, which takes a fraction of a second to make."""
    folder = tmp_path / "env"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    return folder


def distribution(environment: Path, name: str, *, finished: bool) -> Path:
    (site_packages,) = environment.glob("lib/python*/site-packages")
    info = site_packages / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    if finished:
        (info / "INSTALLER").write_text("pip\n")
    return info


def test_version_of_an_environment(environment: Path, tmp_path: Path) -> None:
    assert create_environment.python_version(environment) == VERSION
    assert create_environment.python_version(tmp_path / "nothing") is None
    (environment / "pyvenv.cfg").unlink()  # its Python runs, and would install into the system
    assert create_environment.python_version(environment) is None


def test_interrupted_packages_are_taken_off_the_list(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distribution(environment, "whole", finished=True)
    torn = distribution(environment, "torn", finished=False)
    assert create_environment.unfinished_distributions(environment) == [torn]
    monkeypatch.setattr(create_environment.subprocess, "run", succeeding(create_environment.subprocess.run))
    create_environment.create(environment)
    assert whole.is_dir() and not torn.exists()


def succeeding(run):
    """``subprocess.run``, except that pip is there already."""

    def replacement(command, **options):
        return run([sys.executable, "-c", ""] if "pip" in command else command, **options)

    return replacement


def test_another_python_is_kept_unless_asked_for(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_environment, "python_version", lambda folder: "3.99")
    monkeypatch.setattr(create_environment.subprocess, "run", succeeding(create_environment.subprocess.run))
    create_environment.create(environment)
    with pytest.raises(SystemExit, match=rf"has Python 3\.99, asked for is {VERSION}: run `make distclean` first"):
        create_environment.create(environment, exactly=True)
    assert (environment / "pyvenv.cfg").is_file()


@pytest.mark.slow
def test_a_half_made_environment_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("")
    create_environment.create(folder)
    assert create_environment.python_version(folder) == VERSION
    assert list(folder.glob("lib/python*/site-packages/pip"))
