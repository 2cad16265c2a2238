"""The built site: a sidebar from the plain index, and nothing that is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .pages import ROOT

pytest.importorskip("sphinx")


def extension(name: str) -> ModuleType:
    path = ROOT / "docs" / "_extensions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"documentation_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sidebar_follows_the_lists_of_the_index() -> None:
    index = "# T\n\n[no](no.md)\n\n## One\n\n- [A](a.md): x\n- [B](../b/README.md)\n\n## Two\n\n- [Web](https://x.org/y.md)\n"
    found = extension("navigation").toctrees(index, "docs/index", {"docs/index", "docs/a", "b/README", "docs/new"})
    first, more = found.split("\n\n```")
    assert first.splitlines() == [
        *("```{toctree}", ":hidden:", ":caption: One", "", "A </docs/a>", "B </b/README>", "```"),
    ]
    assert more.splitlines()[1:] == [":hidden:", ":caption: More", "", "/docs/new", "```"]


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.org/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.org/x.css">',
        '<link rel="preconnect" href="https://fonts.org">',
        '<img src="http://x.org/a.png">',
        '<img srcset="a.png 1x, https://x.org/b.png 2x">',
        "<style>@import 'https://x.org/a.css';</style>",
        '<p style="background: url(https://x.org/a.png)">',
        '<iframe src="https://x.org"></iframe>',
        '<img src="absent.png">',
    ],
)
def test_what_is_loaded_from_elsewhere_is_noticed(html: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "index.html").write_text(html)
    assert len(extension("self_contained").problems(tmp_path)) == 1


def test_links_and_own_files_are_no_problem(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "style.css").write_text(
        "a { background: url('a.png') } b { background: url(data:image/png;base64,AA) }"
    )
    (tmp_path / "index.html").write_text(
        '<a href="https://x.org">x</a><img src="a.png?v=1"><link rel="next" href="https://x.org/next">'
        '<link rel="stylesheet" href="style.css"><script>1</script>'
    )
    assert extension("self_contained").problems(tmp_path) == []


@pytest.mark.slow
def test_pages_open_in_a_browser_without_a_request_to_anybody(tmp_path: Path, chromium: Any) -> None:
    """Two pages, which take seconds to build; ``make docs`` builds and checks all."""
    few = "docs/index.md,docs/config.md,README.md"
    command = [sys.executable, "-m", "sphinx", "-q", "-c", "docs", "-D", f"include_patterns={few}", "-b", "html"]
    subprocess.run(
        [*command, ".", str(tmp_path / "site")], cwd=ROOT, check=True, timeout=300, stderr=subprocess.DEVNULL
    )
    requests: list[str] = []
    page = chromium.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "site" / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")
    assert page.locator(".sidebar-tree .caption").first.inner_text().strip().lower() == "start"
    page.get_by_role("link", name="Configuration").first.click()
    page.wait_for_url("**/docs/config.html")
    assert page.locator("table").count() >= 1
    assert requests
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
