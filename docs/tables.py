#!/usr/bin/env python
"""Writes the tables of config keys, and of configs, that pages hold between two comments.

    python docs/tables.py           # brings the pages up to date
    python docs/tables.py --check   # exit code 1 and a list of the pages that are not

A key's meaning is the comment above the line that sets it, in ``convmask/config.py`` or a method's ``config.py``; its
default is the value it has. What a config is for is the comment at its head. So nothing is written twice.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

import convmask.config
from convmask import projects

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- (keys|configs): ([\w./* ]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


class _Lines:
    """Runs a function that adds keys, and keeps for each key the line of the source file that set it."""

    def __init__(self, add_config: Callable[[CfgNode], None], cfg: CfgNode) -> None:
        self.source = Path(sys.modules[add_config.__module__].__file__ or "")
        self._set: dict[tuple[int, str], int] = {}
        self._nodes: list[object] = []  # keeps them alive: ids are not used again
        plain = CfgNode.__setattr__

        def record(node: CfgNode, name: str, value: object) -> None:
            frame = sys._getframe(1)
            if frame.f_code.co_filename == str(self.source):
                self._nodes.append(node)
                self._set[id(node), name] = frame.f_lineno
            plain(node, name, value)

        with mock.patch.object(CfgNode, "__setattr__", record):
            add_config(cfg)

    def keys(self, node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
        """Dotted key, default and meaning of every key below ``node`` that the function has set, in its order."""
        lines = self.source.read_text(encoding="utf-8").splitlines()
        yield from self._keys(node, prefix, lines, "")

    def _keys(self, node: CfgNode, prefix: str, lines: list[str], above: str) -> Iterator[tuple[str, Any, str]]:
        for name, value in node.items():
            line = self._set.get((id(node), name))
            comment = _comment(lines, line) if line else ""
            if isinstance(value, CfgNode):
                yield from self._keys(value, f"{prefix}{name}.", lines, comment)
            elif line:
                # What switches a node on says no more than the node does.
                yield f"{prefix}{name}", value, comment or above


def _comment(lines: list[str], number: int) -> str:
    """The comment right above line ``number``, counted from 1."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        text = line.strip()
        if not text.startswith("#"):
            break
        found.insert(0, text.lstrip("# "))
    return " ".join(found)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _table(head: Sequence[str], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def keys_table(node: str) -> str:
    """The table of the keys below a node, ``"MODEL.KNET"``, or of those that all methods share, ``"shared"``."""
    cfg = get_detectron2_cfg()
    if node == "shared":
        lines, root, prefix = _Lines(convmask.config.add_convmask_config, cfg), cfg, ""
    else:
        convmask.config.add_convmask_config(cfg)
        name = node.removeprefix("MODEL.").lower()
        lines = _Lines(getattr(projects.load(name), f"add_{name}_config"), cfg)
        root, prefix = cfg.MODEL[node.removeprefix("MODEL.")], ""
    rows = []
    for key, default, meaning in lines.keys(root, prefix):
        if not meaning:
            raise ValueError(f"{lines.source}: no comment says what {key} means")
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        rows.append((f"`{key}`", f"`{shown}`", _cell(meaning)))
    return _table(("key", "default", "meaning"), rows)


def configs_table(folder: str, pattern: str = "*") -> str:
    """The table of the configs ``pattern`` in ``configs/<folder>``: what each is, and what it starts from."""
    rows = []
    for path in sorted((ROOT / "configs" / folder).glob(f"{pattern}.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in re.match(r"(?:#.*\n)*", text)[0].splitlines())  # type: ignore[index]
        base = _base(text)
        rows.append((f"`{path.name}`", f"`{base}`" if base else "", _cell(comment)))
    return _table(("config", "starts from", "what"), rows)


def _base(text: str) -> str:
    content = yaml.safe_load(text)
    return str(content.get("_BASE_", ""))


def updated(page: str) -> str:
    """A page with its tables made anew."""

    def block(match: re.Match[str]) -> str:
        begin, kind, what, end = match.groups()
        table = keys_table(what) if kind == "keys" else configs_table(*what.split())
        return f"{begin}\n{table}\n{end}"

    return BLOCK.sub(block, page)


def pages() -> list[Path]:
    """The pages that hold tables."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Brings the pages up to date, or says which are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    args = parser.parse_args(argv)
    stale = [path for path in pages() if updated(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date: python docs/tables.py' if args.check else 'updated'}")
        if not args.check:
            path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
