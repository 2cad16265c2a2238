"""The sidebar, read from the plain lists of links in docs/index.md, and a start page at the top of the site.

A ``toctree`` would be shown as code on GitHub. So each section of the index is one: its title, and the pages that its
list links to. A page of docs/ that nobody listed is still found, below "More".
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#:]+\.(?:md|rst))\)")
REDIRECT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={page}">
<title>ConvMask</title>
</head>
<body><a href="{page}">ConvMask's documentation</a></body>
</html>
"""


def sections(index: str, folder: str) -> dict[str, dict[str, str]]:
    """Section -> page -> the text of its link, in the order of the page.

    Args:
        index: Markdown; only items of lists are read.
        folder: of the page, from which its links start.
    """
    found: dict[str, dict[str, str]] = {}
    title = ""
    for line in index.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ").strip()
        elif line.lstrip().startswith("- "):
            for text, path in LINK.findall(line):
                page = posixpath.normpath(posixpath.join(folder, path))
                found.setdefault(title, {})[posixpath.splitext(page)[0]] = text
    return found


def toctrees(index: str, root_doc: str, pages: set[str]) -> str:
    """Hidden toctrees of the index's sections, and one of the pages that no section has."""
    known = sections(index, posixpath.dirname(root_doc))
    listed = {page for section in known.values() for page in section} | {root_doc}
    rest = dict.fromkeys(sorted(pages - listed), "")
    parts = []
    for title, links in {**known, "More": rest}.items():
        entries = [f"{text} </{page}>" if text else f"/{page}" for page, text in links.items()]
        if entries:
            parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *entries, "```"]))
    return "\n\n".join(parts)


def add_toctrees(app: Sphinx, docname: str, source: list[str]) -> None:
    """Appends the toctrees to the index as Sphinx reads it."""
    if docname == app.config.root_doc:
        source[0] += "\n\n" + toctrees(source[0], docname, set(app.env.found_docs)) + "\n"


def read_index_again(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> set[str]:
    """The index depends on which pages there are."""
    return {app.config.root_doc} if added or removed else set()


def write_start_page(app: Sphinx, exception: Exception | None) -> None:
    """Leads from the top of the site to the index."""
    if exception is None and app.builder.format == "html" and "/" in app.config.root_doc:
        page = f"{app.config.root_doc}.html"
        Path(app.outdir, "index.html").write_text(REDIRECT.format(page=page), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the functions above."""
    app.connect("source-read", add_toctrees)
    app.connect("env-get-outdated", read_index_again)
    app.connect("build-finished", write_start_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
