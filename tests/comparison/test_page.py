from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convmask.comparison.curves import read_losses, relative_losses
from convmask.comparison.page import Comparison, Row, cells, curves_of, html, markdown, write_pages
from convmask.data.images import read_image
from convmask.visualization import save_image


def a_row(folder: Path, title: str, ap: float, **results: Any) -> Row:
    training = {
        "settings": {"data": "nuclei", "budget": 1500.0, "clock": "cpu"},
        "threads": 1,
        "iterations": 40,
        "images_per_iteration": 2,
        "seconds": {"wall": 12.0, "cpu": 10.0},
        "results": {"segm": {"AP": ap, "AP50": 2 * ap}, **results},
    }
    measured = {
        "threshold": 0.4,
        "f1": ap / 50,
        "benchmark": {
            "parameters": 2_500_000,
            "flops": 3e9,
            "total_ms": {"median": 30.0},
            "peak_memory_mib": 90.0,
            "stages_ms": {"backbone": {"median": 20.0}, "heads": {"median": 10.0}},
        },
    }
    path = folder / title
    (path / "pictures").mkdir(parents=True)
    lines = [{"iteration": i, "total_loss": 8.0 / (1 + i)} for i in (0, 19, 39)]
    (path / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"iteration": 5')
    save_image(path / "pictures" / "3.webp", np.full((64, 64, 3), 200, np.uint8))
    return Row(title, training, measured, path)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    rows = [
        a_row(tmp_path, "First <b>", 30.0, panoptic_seg={"PQ": 50.0}),
        a_row(tmp_path, "Second", 40.0, panoptic_seg={"PQ": None}),
    ]
    for name in ("image", "truth"):
        save_image(tmp_path / "inputs" / f"3_{name}.webp", np.full((64, 48, 3), 90, np.uint8))
    return Comparison(
        title="Two methods",
        settings=rows[0].training["settings"],
        rows=rows,
        command="make compare BUDGET=25m",
        machine=["a processor"],
        notes=["a note"],
        inputs=tmp_path / "inputs",
        examples=[3],
    )


def test_table_marks_the_best_and_leaves_out_what_nobody_has(comparison: Comparison) -> None:
    heads, rows = cells(comparison.rows)
    table = [dict(zip(heads, row, strict=True)) for row in rows]
    assert "mIoU" not in heads
    assert [row["mask AP"].text for row in table] == ["30.0", "40.0"]
    assert [row["mask AP"].best for row in table] == [False, True]
    assert [row["PQ"].text for row in table] == ["50.0", ""]
    assert not any(row["PQ"].best for row in table), "one value alone is not the best of several"
    assert [row["F1"].text for row in table] == ["60.0", "80.0"]
    assert [row["iterations"].best for row in table] == [False, False]


class Loaded(HTMLParser):
    """What a page loads, and the depth of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_html_loads_nothing_from_elsewhere(comparison: Comparison) -> None:
    text = html(comparison)
    page = Loaded()
    page.feed(text)
    assert page.tags.count("img") == 4
    assert all(source.startswith(("data:", "#")) for source in page.sources), page.sources
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "First &lt;b&gt;" in text and "First <b>" not in text.split("<svg")[0]


def test_markdown_names_files_that_are_written(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_pages(comparison, tmp_path / "page")
    assert [path.name for path in paths] == ["comparison.md", "comparison.html"]
    text = paths[0].read_text()
    named = re.findall(r"\]\(([^)]+)\)", text)
    assert len(named) == 3 and all((tmp_path / "page" / name).is_file() for name in named)
    assert "for 25m of the processor's time, on 1 thread" in text
    sheet = read_image(str(tmp_path / "page" / "images" / "comparison.jpg"), "RGB")
    assert sheet.shape[1] > 4 * 150  # image, annotation, two methods


def test_a_picture_that_is_missing_leaves_its_place_empty(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "Second" / "pictures" / "3.webp").unlink()
    assert html(comparison).count("<img") == 3
    assert html(comparison).count("<figure>") == 4


def test_markdown_without_measurements_or_pictures(comparison: Comparison) -> None:
    row = comparison.rows[0]
    bare = Comparison(**{**vars(comparison), "rows": [Row(row.title, row.training, {}, row.folder)], "examples": []})
    text = markdown(bare, "a.jpg", "b.svg", "c.html")
    assert "by stage" not in text and "a.jpg" not in text and "GFLOPs" not in text.splitlines()[4]
    assert "by stage" not in html(bare)


def test_the_same_curves_give_the_same_file(comparison: Comparison) -> None:
    assert curves_of(comparison) == curves_of(comparison)


def test_losses_relative_to_the_first() -> None:
    losses = np.random.default_rng(0).uniform(1, 5, 30)
    expected = [np.mean(losses[max(i - 4, 0) : i + 1]) / losses[0] for i in range(30)]
    np.testing.assert_allclose(relative_losses(losses), expected)


def test_losses_of_a_run_that_was_killed(comparison: Comparison, tmp_path: Path) -> None:
    iterations, losses = read_losses(comparison.rows[0].folder)
    assert iterations.tolist() == [1, 20, 40] and losses[0] == 8.0
    assert [len(part) for part in read_losses(tmp_path)] == [0, 0]


def test_page_in_a_browser(comparison: Comparison, tmp_path: Path, chromium: Any) -> None:
    write_pages(comparison, tmp_path / "page")
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "page" / "comparison.html").as_uri())
    assert all(url.startswith(("file:", "data:")) for url in requests), requests
    assert not complaints
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("table tbody tr").count() == 2
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert read_image(str(tmp_path / "page.png"), "RGB").std() > 5
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
