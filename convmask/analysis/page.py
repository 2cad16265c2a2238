"""An analysis as tables, and as a folder with a page that needs nothing from outside."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from convmask.analysis.comparison import Change, KindComparison
from convmask.analysis.pictures import LEGEND, picture
from convmask.analysis.run import KindAnalysis, Progress, Row, RunAnalysis
from convmask.utils.files import write_atomically
from convmask.visualization import save_image

_STYLE = """
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.6em 0 1.6em }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
figure { margin: 0 0 1.6em } img { max-width: 100% } figcaption { color: #555 }
.better { color: #00734f } .worse { color: #b33000 }
"""


@dataclass(frozen=True)
class Table:
    """Rows under a title. Numbers of type float are percentages.

    Attributes:
        signed: the last column is a change.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    signed: bool = False

    def cells(self, row: Sequence[Any]) -> list[str]:
        """The values of a row as text."""
        texts = [_text(value) for value in row]
        if self.signed and isinstance(row[-1], float) and not math.isnan(row[-1]):
            texts[-1] = f"{row[-1]:+.1f}"
        return texts


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.1f}"
    return str(value)


def analysis_tables(analysis: KindAnalysis) -> list[Table]:
    """Totals, classes, sizes, and the most frequent confusions."""
    title = analysis.title
    totals = Table(f"{title}: totals", list(analysis.totals), [list(analysis.totals.values())])
    tables = [totals, _of_rows(f"{title}: by class", analysis.by_class)]
    sizes = [{"size": row["name"], "pixels": _pixels(row), **_measures(row)} for row in analysis.by_size]
    tables.append(_of_rows(f"{title}: by size (COCO's, and equal parts of the dataset)", sizes))
    at = "" if analysis.threshold is None else f", scores from {analysis.threshold:.2f} on"
    tables.append(_found_table(f"{title}: what became of each class (IoU 0.5{at})", analysis))
    rows = [list(row) for row in analysis.confusion.most_frequent()]
    if rows:
        tables.append(Table(f"{title}: most frequent confusions", ["true class", "taken for", "times"], rows))
    return tables


def _measures(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("name", "low", "high")}


def _pixels(row: Row) -> str:
    low, high = math.ceil(row["low"]), math.floor(row["high"])
    return f"from {low}" if high >= 1e9 else f"{low} to {high}"


def _of_rows(title: str, rows: Sequence[Row]) -> Table:
    columns = list(rows[0]) if rows else []
    return Table(title, columns, [[row[column] for column in columns] for row in rows])


def _found_table(title: str, analysis: KindAnalysis) -> Table:
    counts = analysis.confusion.counts
    rows = []
    for index, name in enumerate(analysis.confusion.names):
        right, missed, false = counts[index, index], counts[index, -1], counts[-1, index]
        rows.append([name, int(right), int(counts[index, :-1].sum() - right), int(missed), int(false)])
    return Table(title, ["class", "right", "wrong class", "missed", "false positives"], rows)


def confusion_table(analysis: KindAnalysis) -> Table:
    """The whole matrix."""
    names = analysis.confusion.names
    rows = [[name, *row] for name, row in zip([*names, "(nothing)"], analysis.confusion.counts.tolist(), strict=True)]
    return Table(f"{analysis.title}: true class (rows) and predicted class", ["", *names, "(missed)"], rows)


def comparison_tables(comparison: KindComparison) -> list[Table]:
    """Totals, classes and sizes before and after; classes in order of their change."""
    parts = {
        "totals": comparison.totals,
        f"{comparison.measure} by class": sorted(comparison.by_class, key=_by_difference),
        f"{comparison.measure} by size": comparison.by_size,
    }
    return [
        Table(
            f"{comparison.title}: {title}",
            ["", "before", "after", "change"],
            [[change.name, change.before, change.after, change.difference] for change in changes],
            signed=True,
        )
        for title, changes in parts.items()
    ]


def _by_difference(change: Change) -> float:
    return math.inf if math.isnan(change.difference) else change.difference


def image_counts(comparison: KindComparison) -> str:
    """How many images got better and worse, in words."""
    changes = list(comparison.images.values())
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return f"{better} of {len(changes)} images got better, {worse} worse"


def write_report(
    folder: str,
    runs: Sequence[RunAnalysis],
    names: Sequence[str],
    comparison: Mapping[str, KindComparison] | None = None,
    *,
    num_pictures: int = 12,
    progress: Progress = lambda items, _: items,
) -> str:
    """Writes ``index.html``, ``results.json`` and ``pictures/*.jpg``.

    Args:
        folder: made if it is not there.
        runs: the run; or the one before and the one after.
        names: of the runs.
        comparison: of two runs.
        num_pictures: of each kind of results: the worst images, or those of the greatest change.
        progress: wraps the images that are drawn.

    Returns:
        The path of the page.

    Raises:
        DatasetError: an image cannot be read.
        OSError: the folder cannot be written to.
    """
    os.makedirs(folder, exist_ok=True)
    dataset = runs[-1].results.dataset
    title = f"{' and '.join(names)} on {dataset.name}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    content: dict[str, Any] = {"dataset": dataset.name, "runs": {}}
    for change in (comparison or {}).values():
        parts += [f"<h2>{change.title}: before and after</h2>", f"<p>{image_counts(change)}.</p>"]
        parts += [_html_table(table) for table in comparison_tables(change)]
    for kind in comparison or runs[-1].kinds:
        heading = (comparison or runs[-1].kinds)[kind].title
        parts.append(f"<h2>{heading}: {'images of the greatest change' if comparison else 'worst images'}</h2>")
        parts.append(f"<p>{html.escape(LEGEND)}</p>")
        parts += _figures(folder, runs, names, kind, comparison, num_pictures, progress)
    for run, name in zip(runs, names, strict=True):
        content["runs"][name] = {kind: analysis.as_json() for kind, analysis in run.kinds.items()}
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(run.results.folder)}</p>")
        for analysis in run.kinds.values():
            tables = [*analysis_tables(analysis), confusion_table(analysis)]
            parts += [_html_table(table) for table in tables]
    if comparison:
        content["comparison"] = {kind: change.as_json() for kind, change in comparison.items()}
    write_atomically(os.path.join(folder, "results.json"), json.dumps(content, allow_nan=False).encode())
    page = os.path.join(folder, "index.html")
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    write_atomically(page, "\n".join([head, f"<style>{_STYLE}</style>", *parts, "</html>\n"]).encode())
    return page


def _figures(
    folder: str,
    runs: Sequence[RunAnalysis],
    names: Sequence[str],
    kind: str,
    comparison: Mapping[str, KindComparison] | None,
    limit: int,
    progress: Progress,
) -> list[str]:
    chosen = comparison[kind].changed_images(limit) if comparison else runs[-1].kinds[kind].worst_images(limit)
    figures = []
    for rank, image_id in enumerate(progress(chosen, "Drawing"), start=1):
        name = f"{kind}_{rank:02d}_{_file_name(image_id)}.jpg"
        save_image(os.path.join(folder, "pictures", name), picture(runs, names, kind, image_id))
        scores = [run.kinds[kind].images[image_id] for run in runs]
        words = [
            f"quality {100 * score.quality:.1f}: {score.right} right, {score.confused} of a wrong class, "
            f"{score.false} false, {score.missed} missed"
            for score in scores
        ]
        caption = html.escape(f"{image_id}: {'; then '.join(words)}")
        source = html.escape(f"pictures/{quote(name)}")
        figures.append(f'<figure><img src="{source}" alt=""><figcaption>{caption}</figcaption></figure>')
    return figures


def _file_name(image_id: Hashable) -> str:
    return re.sub(r"[^\w.-]", "_", str(image_id))[:80]


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in table.columns)
    body = []
    for row in table.rows:
        cells = [html.escape(cell) for cell in table.cells(row)]
        kinds = [""] * len(cells)
        if table.signed and isinstance(row[-1], float) and row[-1]:
            kinds[-1] = ' class="better"' if row[-1] > 0 else ' class="worse"'
        body.append(
            "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
        )
    return f"<h3>{html.escape(table.title)}</h3><table><tr>{head}</tr>{''.join(body)}</table>"
