from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from convmask.ops import _build_record, _extension, extension_status, panoptic_merge

MERGE_TWICE = """
import torch
from convmask.ops import extension_status, panoptic_merge
print(extension_status())
for _ in range(2):
    ids, _ = panoptic_merge(torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1), torch.zeros(1, dtype=torch.int64),
                            torch.zeros(2, 2, dtype=torch.int64))
print(ids.tolist())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.fixture(autouse=True)
def not_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVMASK_DISABLE_EXT", raising=False)


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``install(torch=..., sources=...)`` makes folders like convmask/ops and csrc; the library in it is none."""

    def make(**changes: str) -> tuple[Path, Path]:
        folder, csrc = tmp_path / "ops", tmp_path / "csrc"
        csrc.mkdir()
        (csrc / "module.cpp").write_text("int x;\n")
        record = {"torch": torch.__version__, "cuda": None, "sources": _build_record.source_digest(csrc), **changes}
        _build_record.write_record(folder, **record)
        (folder / "_C.abi3.so").write_bytes(b"no library")
        return folder, csrc

    return make


def test_the_status_is_what_happened() -> None:
    loaded, text = extension_status()
    assert loaded == torch._C._dispatch_has_kernel_for_dispatch_key("convmask::panoptic_merge", "CPU")
    assert ("built with torch" in text) == loaded or "rebuild" in text


def test_a_library_for_another_torch_is_not_loaded(install: Callable[..., tuple[Path, Path]]) -> None:
    loaded, reason = _extension._load(*install(torch="2.0.1+cpu"))
    assert not loaded
    assert reason.startswith(f"they were built with torch 2.0.1+cpu, but torch {torch.__version__} is running")
    assert reason.endswith(_extension.BUILD_COMMAND)


def test_a_library_from_other_sources_is_not_loaded(install: Callable[..., tuple[Path, Path]]) -> None:
    folder, csrc = install()
    (csrc / "module.cpp").write_text("int y;\n")
    loaded, reason = _extension._load(folder, csrc)
    assert not loaded
    assert "other sources than those in csrc/" in reason
    assert reason.endswith(_extension.BUILD_COMMAND)


def test_an_installed_package_has_no_sources_to_compare(install: Callable[..., tuple[Path, Path]]) -> None:
    folder, csrc = install()
    shutil.rmtree(csrc)
    assert "cannot be loaded" in _extension._load(folder, csrc)[1]


def test_a_broken_library_is_reported(install: Callable[..., tuple[Path, Path]]) -> None:
    loaded, reason = _extension._load(*install())
    assert not loaded
    assert "_C.abi3.so cannot be loaded" in reason
    assert reason.endswith(_extension.BUILD_COMMAND)


@pytest.mark.parametrize("text", [None, "", "[]", '{"torch": "2.9"}', '"torch cuda sources"'])
def test_a_library_without_a_proper_record_is_not_loaded(
    install: Callable[..., tuple[Path, Path]], text: str | None
) -> None:
    folder, csrc = install()
    (folder / _build_record.NAME).unlink()
    if text is not None:
        (folder / _build_record.NAME).write_text(text)
    loaded, reason = _extension._load(folder, csrc)
    assert not loaded
    assert _build_record.NAME in reason
    assert reason.endswith(_extension.BUILD_COMMAND)


def test_no_library_at_all(tmp_path: Path) -> None:
    loaded, reason = _extension._load(tmp_path, tmp_path)
    assert not loaded
    assert reason == f"they have not been built; build them with {_extension.BUILD_COMMAND}"


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_cpp", ".cpp").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return _build_record.source_digest(folder)

    first = digest(a_cpp="x", b__c_cpp="y")
    assert first == digest(b__c_cpp="y", a_cpp="x", build_py="not compiled")
    assert len({first, digest(a_cpp="xy", b__c_cpp=""), digest(a_cpp="x", b__d_cpp="y"), digest(a_cpp="x")}) == 4


def test_the_record_is_read_as_written(tmp_path: Path) -> None:
    _build_record.write_record(tmp_path / "new", torch="2.9.0", cuda="13.0", sources="ab")
    assert _build_record.read_record(tmp_path / "new") == {"torch": "2.9.0", "cuda": "13.0", "sources": "ab"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == [_build_record.NAME]


def test_disabled_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, install: Callable[..., tuple[Path, Path]]
) -> None:
    folder, csrc = install()
    monkeypatch.setenv("CONVMASK_DISABLE_EXT", "1")
    assert _extension._load(folder, csrc) == (False, "CONVMASK_DISABLE_EXT is set; unset it to use them")
    monkeypatch.setenv("CONVMASK_DISABLE_EXT", "0")
    assert "cannot be loaded" in _extension._load(folder, csrc)[1]


def test_the_slow_path_says_so_once() -> None:
    process = run_python(MERGE_TWICE, CONVMASK_DISABLE_EXT="1")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[0].startswith("(False, 'CONVMASK_DISABLE_EXT is set")
    assert process.stdout.splitlines()[1] == "[[1, 1], [1, 1]]"
    (message,) = [line for line in process.stderr.splitlines() if "compiled operators" in line]
    assert "panoptic_merge about" in message
    assert "times slower" in message


def test_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_extension, "_warned", False)
    monkeypatch.setattr(_extension, "_status", (True, "CPU kernels, built with torch 2.9.0"))
    with caplog.at_level(logging.WARNING, logger=_extension.__name__):
        _extension.warn_slow_path("mps")
        _extension.warn_slow_path("mps")
    (record,) = caplog.records
    assert "there are CPU kernels, built with torch 2.9.0, and none for mps" in record.getMessage()
    assert _extension.BUILD_COMMAND in record.getMessage()


def test_compiled_kernels_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    if not extension_status()[0]:
        pytest.skip(f"no compiled operators: {extension_status()[1]}")
    empty = torch.zeros(0, 2, 2, dtype=torch.bool)
    panoptic_merge(empty, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    assert not caplog.records


def build(repository: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds the library from a copy of the sources, so that nothing lands in the clone."""
    shutil.copytree(repository / "csrc", target / "csrc")
    shutil.copytree(repository / "convmask" / "ops", target / "convmask" / "ops", ignore=shutil.ignore_patterns("_C*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "convmask/__init__.py"):
        shutil.copy(repository / name, target / name)
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        **{"cwd": target, "capture_output": True, "text": True, "timeout": 300},
        env={**os.environ, "FORCE_CUDA": "0", **environment},
    )


def built_files(target: Path) -> list[str]:
    return sorted(path.name for path in (target / "convmask" / "ops").glob("_C*"))


def test_nothing_is_built_without_torch_or_on_request(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "path" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    isolated = {"PYTHONPATH": str(broken.parent)}
    for index, (environment, code, message) in enumerate(
        [
            ({"CONVMASK_BUILD_EXT": "0", **isolated}, 0, "because CONVMASK_BUILD_EXT=0"),
            ({"CONVMASK_BUILD_EXT": "", **isolated}, 0, "not built: No module named 'torch'"),
            ({"CONVMASK_BUILD_EXT": "1", **isolated}, 1, "No module named 'torch'"),
        ]
    ):
        target = tmp_path / str(index)
        process = build(repository, target, **environment)
        assert process.returncode == code, process.stderr
        assert message in process.stderr
        assert built_files(target) == []


@pytest.mark.slow
@pytest.mark.parametrize(("wish", "code"), [("", 0), ("1", 1)])
def test_a_failing_compiler_fails_the_install_only_if_asked_to(
    repository: Path, tmp_path: Path, wish: str, code: int
) -> None:
    process = build(repository, tmp_path, CONVMASK_BUILD_EXT=wish, CXX="/bin/false", CC="/bin/false")
    assert (process.returncode == 0) == (code == 0), process.stderr
    assert ("the install goes on without them" in process.stderr) == (code == 0)
    assert built_files(tmp_path) == []


@pytest.mark.slow
def test_a_build_in_place_is_loaded(repository: Path, tmp_path: Path) -> None:
    process = build(repository, tmp_path, CONVMASK_BUILD_EXT="1")
    if process.returncode != 0 and shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "convmask" / "ops"
    record = json.loads((folder / _build_record.NAME).read_text())
    assert record["torch"] == torch.__version__
    load = f"""
import os
from pathlib import Path
from convmask.ops import _extension
del os.environ["CONVMASK_DISABLE_EXT"]  # set until here, since one process cannot load the kernels of two libraries
print(_extension._load(Path({str(folder)!r}), Path({str(tmp_path / "csrc")!r})))
"""
    assert run_python(load, CONVMASK_DISABLE_EXT="1").stdout.startswith("(True, ")
