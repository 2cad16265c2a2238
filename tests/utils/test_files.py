from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from convmask.utils.files import write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    for content in (b"first", b""):
        write_atomically(tmp_path / "file.json", content)
        assert (tmp_path / "file.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_name_as_long_as_a_name_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".png")
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_a_name_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically("file", b"content")
    assert Path("file").read_bytes() == b"content"


def test_others_may_read_it_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["os.replace", "builtins.open"])
def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
