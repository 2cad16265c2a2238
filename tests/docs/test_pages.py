"""Links of the pages lead somewhere, and the tables of keys and configs are those of the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.config import CfgNode

from convmask.config import get_cfg

from .pages import ROOT, anchors, inline_code, links, pages, read


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documentation_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load(ROOT / "docs" / "tables.py")


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    assert [target for target in links(page) if not leads_somewhere(page, target)] == []


def leads_somewhere(page: str, target: str) -> bool:
    """To a file of the clone (a folder is a page on GitHub, and nothing in the built site), and to a heading in it."""
    path, _, anchor = target.partition("#")
    file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    if not file.is_file() or ROOT not in file.parents:
        return False
    return not anchor or file.suffix != ".md" or anchor in anchors(str(file.relative_to(ROOT)))


@pytest.mark.parametrize("target", ["absent.md", "../csrc", "data.md#absent", "../../etc/passwd", "#absent"])
def test_a_dead_link_is_noticed(target: str) -> None:
    assert not leads_somewhere("docs/training.md", target)


@pytest.mark.parametrize("page", pages())
def test_paths_in_the_text_are_there(page: str) -> None:
    """Paths that begin with a folder of the clone, or, in a method's README, of the method."""
    below = [ROOT, (ROOT / page).parent]
    folders = {path.name for folder in below for path in folder.iterdir() if path.is_dir()} - {
        "output",
        "build",
        "dist",
    }
    paths = [code for code in inline_code(read(page)) if re.fullmatch(r"[\w.-]+(?:/[\w.*{},-]+)+/?", code)]
    braces = [path for path in paths if path.partition("/")[0] in folders and not re.search(r"[{}]", path)]
    assert [path for path in braces if not any(list(folder.glob(path)) for folder in below)] == []


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= targets
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)} == set()


def test_tables_are_those_of_the_code(tables: ModuleType) -> None:
    assert len(tables.pages()) >= 2
    stale = [path for path in tables.pages() if tables.updated(path.read_text()) != path.read_text()]
    assert stale == [], "python docs/tables.py brings them up to date"


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in node.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {f"{prefix}{name}"}
    return found


@pytest.mark.parametrize("name", ["PANOPTIC_FCN", "FCIS", "EMBED_MASK", "KNET"])
def test_every_key_is_in_its_table(tables: ModuleType, name: str) -> None:
    cfg = get_cfg()
    if name not in cfg.MODEL:
        pytest.skip("the method is not there")
    assert set(re.findall(r"^\| `([\w.]+)`", tables.keys_table(f"MODEL.{name}"), flags=re.MULTILINE)) == leaves(
        cfg.MODEL[name]
    )


def test_a_key_without_a_comment_is_noticed(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_comment", lambda lines, number: "")
    with pytest.raises(ValueError, match=r"config\.py: no comment says what [A-Z_.]+ means"):
        tables.keys_table("shared")


def test_the_index_lists_every_method() -> None:
    navigation = load(ROOT / "docs" / "_extensions" / "navigation.py")
    found = navigation.sections(read("docs/index.md"), "docs")
    assert {f"docs/methods/{path.stem}" for path in (ROOT / "docs" / "methods").glob("*.md")} <= set(found["Methods"])
    assert found["Start"]["README"] == "What ConvMask is"
