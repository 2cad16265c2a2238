from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convmask.utils import requirements

# Blocks the real Detectron2, wherever it is installed.
WITHOUT_DETECTRON2 = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def find_all_but_detectron2(name, path=None, target=None):
    return None if name.split(".")[0] == "detectron2" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_all_but_detectron2
"""


def run(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=repository,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_missing_detectron2_is_said_at_import(repository: Path) -> None:
    done = run(repository, "-c", WITHOUT_DETECTRON2 + "import convmask")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ConvMask needs Detectron2, which is not installed. Run `make install`")
    assert "python packaging/provide.py" in last


@pytest.mark.parametrize("version", ["0.4.1", "nonsense"])
def test_an_older_detectron2_is_said_at_import(repository: Path, tmp_path: Path, version: str) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    done = run(repository, "-c", "import convmask", PYTHONPATH=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: ConvMask needs Detectron2 0.5 or later, found {version} in {package}")
    assert "pip uninstall detectron2" in last


def test_a_folder_in_the_way_is_said_at_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = requirements.importlib.machinery.ModuleSpec("detectron2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match=rf"is {tmp_path}, a folder without __init__\.py"):
        requirements.check_detectron2()


@pytest.mark.parametrize("version", ["0.5", "0.6+cu130", "1.0.post1"])
def test_later_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import detectron2

    monkeypatch.setattr(detectron2, "__version__", version)
    requirements.check_detectron2()


def test_the_environment_is_reported_without_detectron2(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DETECTRON2)
    done = run(repository, "-m", "convmask.utils.collect_env", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith("C++"))
    assert lines["detectron2"] == "missing (No module named 'detectron2')"
    assert lines["torch"][0].isdigit()
