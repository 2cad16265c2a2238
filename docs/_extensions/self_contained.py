"""Makes sure that the built site asks nobody for anything: it works offline, and reading it tells nobody."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# What a browser loads without being asked, by element: the attribute that names it.
LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
# Links of the head that name a page, and load nothing.
PAGES = {"author", "canonical", "copyright", "help", "index", "license", "next", "prev", "search"}
STYLE_URL = re.compile(r"""url\(\s*['"]?([^'")]+)['"]?\s*\)|@import\s+['"]([^'"]+)['"]""")


class _Loaded(HTMLParser):
    """Collects the addresses of a page that are loaded with it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.addresses += style_addresses(attributes.get("style", ""))
        if tag == "link" and PAGES & set(attributes.get("rel", "").lower().split()):
            return
        for name in LOADED.get(tag, ()):
            candidates = attributes.get(name, "").split(",") if name == "srcset" else [attributes.get(name, "")]
            self.addresses += [words[0] for words in map(str.split, candidates) if words]

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.addresses += style_addresses(data)


def style_addresses(style: str) -> list[str]:
    """Addresses that a style sheet loads."""
    return [first or second for first, second in STYLE_URL.findall(style)]


def loaded_addresses(path: Path) -> list[str]:
    """Addresses that a browser loads with a page (.html) or a style sheet (.css)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return style_addresses(text)
    parser = _Loaded()
    parser.feed(text)
    return parser.addresses


def problems(site: Path) -> list[str]:
    """What pages and style sheets below ``site`` load from elsewhere, or what is not there."""
    found = []
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        for address in loaded_addresses(path):
            parts = urlsplit(address)
            if parts.scheme == "data" or (not parts.scheme and not parts.netloc and not parts.path):
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{path.relative_to(site)} loads {address}")
            elif not (path.parent / unquote(parts.path)).is_file():
                found.append(f"{path.relative_to(site)} loads {address}, which is not there")
    return found


def check(app: Sphinx, exception: Exception | None) -> None:
    """Fails the build where something is loaded from elsewhere."""
    if exception is None and app.builder.format == "html":
        found = problems(Path(app.outdir))
        if found:
            raise ExtensionError("the site is not self-contained:\n" + "\n".join(found[:20]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the check."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
