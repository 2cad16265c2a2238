from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import provide
import pytest


def test_what_is_importable_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    provide.provide("torch", lambda: pytest.fail("an installer ran"))
    assert capsys.readouterr().out == "torch is installed already, left as it is\n"


@pytest.mark.parametrize(("outcomes", "expected"), [((None, None), [0]), ((False, None), [0, 1]), ((True, None), [0])])
def test_installers_run_until_one_succeeds(outcomes: tuple[bool | None, ...], expected: list[int]) -> None:
    ran: list[int] = []

    def installer(index: int) -> bool | None:
        ran.append(index)
        return outcomes[index]

    provide.provide("convmask_no_such_module", lambda: installer(0), lambda: installer(1))
    assert ran == expected


def test_no_installer_left_is_an_error() -> None:
    with pytest.raises(provide.ProvideError, match="convmask_no_such_module could not be installed"):
        provide.provide("convmask_no_such_module", lambda: False)


def test_a_bare_folder_is_not_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "convmask_bare_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not provide.importable("convmask_bare_folder")
    (tmp_path / "convmask_bare_folder" / "__init__.py").touch()
    assert provide.importable("convmask_bare_folder")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records what ``provide.main`` does instead of doing it, on a machine that has none of the three."""
    done: list[str] = []
    monkeypatch.setattr(provide, "importable", lambda name: name not in ("cv2", "detectron2", "panopticapi"))
    monkeypatch.setattr(provide, "pip", lambda *arguments, **_: done.append("pip " + " ".join(arguments)))
    monkeypatch.setattr(provide, "github_answers", lambda: done.append("ask GitHub"))
    for name in ("detectron2", "panopticapi"):
        monkeypatch.setattr(provide, f"install_{name}_from_registry", lambda name=name: done.append(f"registry {name}"))
    monkeypatch.setattr(sys, "argv", ["provide.py"])
    return done


OPENCV = f"pip install -r {provide.REQUIREMENTS / 'opencv.txt'}"


def test_the_registry_comes_after_github(steps: list[str]) -> None:
    provide.main()
    assert steps == [OPENCV, "ask GitHub", "registry detectron2", "ask GitHub", "registry panopticapi"]


def test_github_serves_what_it_can(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provide, "github_answers", lambda: True)
    provide.main()
    commits = provide.DETECTRON2_COMMIT, provide.PANOPTICAPI_COMMIT
    assert steps == [OPENCV, *(f"pip install --no-build-isolation git+{commit}" for commit in commits)]


def test_a_build_that_fails_leads_to_the_registry(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: str, **_: object) -> None:
        if any(argument.startswith("git+") for argument in arguments):
            raise provide.ProvideError("no compiler")

    monkeypatch.setattr(provide, "github_answers", lambda: True)
    monkeypatch.setattr(provide, "pip", failing)
    provide.main()
    assert steps == ["registry detectron2", "registry panopticapi"]


def test_registry_only(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["provide.py", "--registry"])
    provide.main()
    assert steps == [OPENCV, "registry detectron2", "registry panopticapi"]


def test_missing_torch_is_said_before_anything_is_fetched(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provide, "importable", lambda name: name in ("cv2", "setuptools", "wheel"))
    with pytest.raises(SystemExit, match=r"without torch\. First run .* -m pip install -r .*torch-2\.14\.txt"):
        provide.main()
    assert steps == []


def test_github_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provide, "GITHUB_TIMEOUT_SECONDS", 1)
    provide.github_answers.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        before = time.monotonic()
        assert not provide.github_answers(f"http://127.0.0.1:{server.getsockname()[1]}/detectron2.git")
        waited = time.monotonic() - before
    provide.github_answers.cache_clear()
    assert waited < 60  # far from git's own patience, which is endless


def test_no_git_is_no_github(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    provide.github_answers.cache_clear()
    assert not provide.github_answers("https://example.invalid/detectron2.git")
    provide.github_answers.cache_clear()


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of one package, ``convmask-pinned 1.0``, for pip to download from instead of the network."""
    root = tmp_path / "package"
    root.mkdir()
    (root / "convmask_pinned.py").touch()
    setup = "from setuptools import setup; setup(name='convmask-pinned', version='1.0', py_modules=['convmask_pinned'])"
    (root / "setup.py").write_text(setup)
    index = tmp_path / "index"
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(index)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return index


def test_download_takes_the_pinned_file(local_index: Path, tmp_path: Path) -> None:
    (archive,) = local_index.iterdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    found = provide.download("convmask-pinned==1.0", digest, tmp_path)
    assert found.read_bytes() == archive.read_bytes()


def test_download_refuses_another_hash(local_index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(provide.ProvideError, match=r"`pip download .*` failed, its message is above"):
        provide.download("convmask-pinned==1.0", "0" * 64, tmp_path)
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
