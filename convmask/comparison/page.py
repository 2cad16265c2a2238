"""A comparison as a Markdown page and as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate

from convmask.comparison.curves import COLORS, draw_curves, read_losses
from convmask.data.images import read_image
from convmask.engine.budget import format_duration
from convmask.utils.files import write_atomically
from convmask.visualization import contact_sheet, save_image

# White, in the place of a picture that is not there.
_NO_PICTURE = np.full((8, 8, 3), 255, np.uint8)
_CLOCK_NAMES = {"wall": "by the clock", "cpu": "of the processor's time"}


@dataclass(frozen=True)
class Row:
    """A method of a comparison, with the records of its steps.

    Attributes:
        title: of the method.
        training: of :func:`convmask.comparison.training.train_within`.
        measured: of :func:`convmask.comparison.measure.measure`, or empty.
        folder: with ``metrics.json`` and ``pictures``.
    """

    title: str
    training: Mapping[str, Any]
    measured: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Comparison:
    """Everything that the page says.

    Attributes:
        title: of the page.
        settings: as a dict, see :class:`convmask.comparison.records.Settings`.
        rows: the methods.
        command: that made it.
        machine: lines about hardware and versions.
        notes: lines that go below the table.
        inputs: folder of the pictures of images and annotations.
        examples: indices of the images.
    """

    title: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    command: str
    machine: Sequence[str]
    notes: Sequence[str]
    inputs: Path
    examples: Sequence[int] = field(default_factory=list)


@dataclass(frozen=True)
class Column:
    """A column of the table: its head, its value in a row (None: not defined), how it is written, what is best."""

    head: str
    value: Callable[[Row], float | str | None]
    text: str = "{:.1f}"
    best: Callable[..., float] | None = None


@dataclass(frozen=True)
class Cell:
    """The text of a value, and whether it is the best of its column."""

    text: str
    best: bool = False


def _result(task: str, key: str) -> Callable[[Row], float | None]:
    return lambda row: row.training["results"].get(task, {}).get(key)


def _measured(*keys: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Any = row.measured
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return None if found is None else factor * float(found)

    return value


COLUMNS = (
    Column("method", lambda row: row.title, "{}"),
    Column("mask AP", _result("segm", "AP"), best=max),
    Column("AP50", _result("segm", "AP50"), best=max),
    Column("F1", _measured("f1", factor=100), best=max),
    Column("box AP", _result("bbox", "AP"), best=max),
    Column("PQ", _result("panoptic_seg", "PQ"), best=max),
    Column("mIoU", _result("sem_seg", "mIoU"), best=max),
    Column("training, min", lambda row: row.training["seconds"][row.training["settings"]["clock"]] / 60),
    Column("iterations", lambda row: row.training["iterations"], "{:.0f}"),
    Column("images an iteration", lambda row: row.training["images_per_iteration"], "{:.0f}"),
    Column("parameters, M", _measured("benchmark", "parameters", factor=1e-6), "{:.2f}", min),
    Column("GFLOPs", _measured("benchmark", "flops", factor=1e-9), "{:.2f}", min),
    Column("ms an image", _measured("benchmark", "total_ms", "median"), "{:.0f}", min),
    Column("memory, MiB", _measured("benchmark", "peak_memory_mib"), "{:.0f}", min),
)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[Cell]]]:
    """Heads and rows of the table; columns that no method has a value for are left out."""
    columns = [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]
    bests = {}
    for column in columns:
        texts = [column.text.format(value) for row in rows if (value := column.value(row)) is not None]
        if column.best and len(texts) > 1:
            bests[column.head] = column.best(float(text) for text in texts)

    def cell(column: Column, row: Row) -> Cell:
        value = column.value(row)
        text = "" if value is None else column.text.format(value)
        return Cell(text, bool(text) and column.head in bests and float(text) == bests[column.head])

    return [column.head for column in columns], [[cell(column, row) for column in columns] for row in rows]


def stage_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of each stage; empty where nothing was measured."""
    names = list(dict.fromkeys(name for row in rows for name in _stages(row)))
    body = [
        [row.title, *(f"{_stages(row)[name]:.1f}" if name in _stages(row) else "" for name in names)]
        for row in rows
        if _stages(row)
    ]
    return ["method", *names], body


def _stages(row: Row) -> Mapping[str, float]:
    """Medians."""
    return {name: spread["median"] for name, spread in row.measured.get("benchmark", {}).get("stages_ms", {}).items()}


def summary(comparison: Comparison) -> str:
    """One sentence about what was done."""
    budget = format_duration(comparison.settings["budget"])
    threads = " or ".join(str(number) for number in sorted({row.training["threads"] for row in comparison.rows}))
    return (
        f"Each method was trained from scratch for {budget} {_CLOCK_NAMES[comparison.settings['clock']]}, "
        f"on {threads} thread{'s' * (threads != '1')}, on {comparison.settings['data']}, with its quick config."
    )


def markdown(comparison: Comparison, sheet: str, curves: str, html: str) -> str:
    """The page in Markdown.

    Args:
        comparison: what it says.
        sheet: path of the picture of all methods, from the page.
        curves: path of the picture of the curves.
        html: path of the HTML page.
    """
    heads, rows = cells(comparison.rows)
    body = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in rows]
    parts = [
        f"# {comparison.title}",
        summary(comparison) + f" [The same as one HTML file]({html}).",
        _table(heads, body),
        "\n".join(f"- {note}" for note in comparison.notes),
    ]
    stage_heads, stage_rows = stage_table(comparison.rows)
    if stage_rows:
        parts += ["## Time of an image, by stage, in ms", _table(stage_heads, stage_rows)]
    if comparison.examples:
        parts += [
            "## The same images through every method",
            "Objects from the score on at which the method's F1 is highest.",
            f"![The same images through every method]({sheet})",
        ]
    parts += [
        "## Training curves",
        "Total losses, each relative to its own beginning: what they are made of differs, so their heights do not\n"
        "compare methods. A curve that still falls at the end had more to learn.",
        f"![Training curves]({curves})",
        "## How this page was made",
        f"```\n{comparison.command}\n```",
        "\n".join(f"- {line}" for line in comparison.machine),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    align = ["left"] + ["right"] * (len(heads) - 1)
    return tabulate(body, headers=heads, tablefmt="pipe", colalign=align, disable_numparse=True)


def html(comparison: Comparison) -> str:
    """The page as one HTML file: styles, pictures and curves are in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    heads, rows = cells(comparison.rows)
    names = stage_table(comparison.rows)[0][1:]
    colors = dict(zip(names, COLORS, strict=False))
    return environment.get_template("page.html.j2").render(
        title=comparison.title,
        summary=summary(comparison),
        table={"heads": heads, "rows": rows},
        notes=comparison.notes,
        stages=[{"name": name, "color": colors[name]} for name in names],
        bars=_bars(comparison.rows, colors),
        pictures=_picture_table(comparison),
        curves=curves_of(comparison),
        command=comparison.command,
        machine=comparison.machine,
    )


def curves_of(comparison: Comparison) -> str:
    """The SVG element of all training curves."""
    return draw_curves({row.title: read_losses(row.folder) for row in comparison.rows})


def _bars(rows: Sequence[Row], colors: Mapping[str, str]) -> list[dict[str, Any]]:
    longest = max((sum(_stages(row).values()) for row in rows), default=0.0)
    return [
        {
            "title": row.title,
            "text": f"{sum(_stages(row).values()):.0f} ms",
            "parts": [
                {"percent": round(100 * ms / longest, 2), "color": colors[name], "text": f"{name}: {ms:.1f} ms"}
                for name, ms in _stages(row).items()
            ],
        }
        for row in rows
        if _stages(row)
    ]


def picture_paths(comparison: Comparison) -> tuple[list[str], list[list[Path]]]:
    """Captions, and for each image the files of image, annotation and every method."""
    heads = ["image", "annotation", *(row.title for row in comparison.rows)]
    return heads, [
        [
            comparison.inputs / f"{index}_image.webp",
            comparison.inputs / f"{index}_truth.webp",
            *(row.folder / "pictures" / f"{index}.webp" for row in comparison.rows),
        ]
        for index in comparison.examples
    ]


def _picture_table(comparison: Comparison) -> dict[str, Any]:
    heads, rows = picture_paths(comparison)
    if not rows:
        return {}
    return {
        "heads": heads,
        "rows": [
            [{"data": _data_uri(path), "text": head} for head, path in zip(heads, row, strict=True)] for row in rows
        ],
    }


def _data_uri(path: Path) -> str:
    """The file as a URI that holds it; empty where it is not there."""
    if not path.is_file():
        return ""
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_pages(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes ``comparison.md`` with its pictures, and ``comparison.html``.

    Returns:
        the paths of the two.
    """
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    page, sheet, curves = folder / "comparison.html", pictures / "comparison.jpg", pictures / "comparison_curves.svg"
    heads, rows = picture_paths(comparison)
    if rows:
        panels = [[read_image(str(path), "RGB") if path.is_file() else _NO_PICTURE for path in row] for row in rows]
        save_image(sheet, contact_sheet(panels, heads, panel_height=200))
    write_atomically(curves, curves_of(comparison).encode())
    write_atomically(page, html(comparison).encode())
    text = markdown(comparison, f"images/{sheet.name}", f"images/{curves.name}", page.name)
    write_atomically(folder / "comparison.md", text.encode())
    return [folder / "comparison.md", page]
