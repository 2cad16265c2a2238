from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from convmask.data.errors import DatasetError
from convmask.data.user_modules import import_user_module


@pytest.fixture(autouse=True)
def _paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["p3_user", "p3_user.py", "sub/p3_deeper.py"])
def test_names_and_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "p3_user.py").write_text("VALUE = 7")
    (tmp_path / "sub" / "p3_deeper.py").write_text("VALUE = 7")
    assert import_user_module(name).VALUE == 7


@pytest.mark.parametrize("name", ["p3_absent", "p3_absent.deeper", "p3_absent.py", "", ".relative"])
def test_an_absent_one_is_named(name: str) -> None:
    with pytest.raises(DatasetError, match="to import"):
        import_user_module(name)


def test_errors_of_the_module_are_shown_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "p3_wrong.py").write_text("import p3_is_not_installed")
    with pytest.raises(ModuleNotFoundError, match="p3_is_not_installed"):
        import_user_module("p3_wrong")
