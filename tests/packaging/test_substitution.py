from __future__ import annotations

from pathlib import Path

import pytest
from substitution import PatchError, Substitution, apply, literal


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "module.py").write_text("first = f(x)\nsecond = f(x)\n")
    return tmp_path


def test_a_match_is_replaced_as_often_as_it_says(tree: Path) -> None:
    apply([Substitution("", "module.py", r"^(\w+) = f\(x\)$", r"\1 = g(x)", 2)], tree)
    assert (tree / "module.py").read_text() == "first = g(x)\nsecond = g(x)\n"


def test_a_literal_is_no_pattern(tree: Path) -> None:
    apply([literal("", "module.py", "first = f(x)", r"first = '\1\n'")], tree)
    assert (tree / "module.py").read_text() == "first = '\\1\\n'\nsecond = f(x)\n"


@pytest.mark.parametrize(("old", "count", "found"), [("g(x)", 1, 0), ("f(x)", 1, 2), ("f(x)", 3, 2)])
def test_another_number_of_matches_is_refused(tree: Path, old: str, count: int, found: int) -> None:
    before = (tree / "module.py").read_text()
    with pytest.raises(PatchError, match=rf"module\.py: .* matched {found} times instead of {count} \(the reason\)"):
        apply([literal("the reason", "module.py", old, "", count)], tree)
    assert (tree / "module.py").read_text() == before


def test_an_absent_file_is_refused(tree: Path) -> None:
    with pytest.raises(PatchError, match=r"other\.py is absent \(the reason\)"):
        apply([literal("the reason", "other.py", "x", "y")], tree)
