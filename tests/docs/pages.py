"""The pages of the project, and what is in them: blocks of code, commands, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"", "bash", "python", "yaml", "json", "text"}
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"<!-- (not run|given): ([^>]+) -->\s*\Z")
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
PROGRAMS = ("python", ".venv/bin/python", "make", "pip", "torchrun")


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
        page: relative to the root.
        line: of its fence, counted from 1.
        language: "" where the fence names none.
        text: without the fences.
        not_run: why it cannot be run here; "" where it can.
        given: what it needs from the test, in words; "" for nothing.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str = ""
    given: str = ""

    @property
    def file_name(self) -> str:
        """The file that the block is, by its first line, a comment with a name (and arguments); or ""."""
        first = re.match(r"# ([\w./-]+\.(?:py|yaml))( [A-Z].*)?\n", self.text)
        return first.group(1) if first else ""

    @property
    def takes_arguments(self) -> bool:
        """Whether it is a program that is called with arguments: ``# draw.py PHOTO OUTPUT``."""
        return bool(re.match(r"# [\w./-]+\.py [A-Z]", self.text))


def pages() -> list[str]:
    """All pages, relative to the root."""
    found = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("projects/*/README.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = read(page) if text is None else text
    for match in FENCE.finditer(text):
        mark = MARK.search(text, 0, match.start())
        reasons = {mark.group(1).replace(" ", "_"): mark.group(2)} if mark else {}
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], match["text"], **reasons)


def is_shell(block: Block) -> bool:
    """Whether it holds commands: by its language, or, without one, by a line that begins with a program."""
    lines = [strip_environment(line.strip().removeprefix("$ ")) for line in block.text.splitlines()]
    return block.language == "bash" or (
        block.language == "" and any(line.split(" ", 1)[0] in PROGRAMS for line in lines)
    )


def strip_environment(command: str) -> str:
    """A command without the variables that are set before it."""
    return re.sub(r"^(?:[A-Za-z_]\w*=\S*\s+)+", "", command)


def without_code(text: str) -> str:
    """A page's prose: without fenced blocks, comments and code in the line."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def inline_code(text: str) -> list[str]:
    """Code in the lines of a page, each on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def links(page: str) -> list[str]:
    """Targets of links and pictures of a page that lie in the clone, with their anchors."""
    text = re.sub(r"`[^`]*`", "code", FENCE.sub("", read(page)))
    return [target for target in LINK.findall(text) if not re.match(r"\w+://|mailto:", target)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", read(page)), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        name, number = slug, 0
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found
