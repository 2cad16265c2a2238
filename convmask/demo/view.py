"""A result of the viewer as pictures, a legend, and rows of a table: all that follows a moved score threshold."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from convmask.demo.models import Result
from convmask.visualization.draw import default_scale, draw_segments
from convmask.visualization.segments import Segment

COLUMNS = ("model", "class", "score", "pixels", "share", "box (x, y, width, height)")
# Colours of a class's objects in its swatch.
_STRIPES = 4


def confident(segments: Sequence[Segment], threshold: float) -> list[Segment]:
    """Without objects of a lower score; stuff and what has no score stays."""
    return [x for x in segments if not x.is_thing or x.score is None or x.score >= threshold]


def picture(image: np.ndarray, segments: Sequence[Segment], threshold: float) -> np.ndarray:
    """The segments on their image (H, W, 3) BGR; the picture is RGB, small images are enlarged."""
    scale = default_scale(*image.shape[:2])
    return draw_segments(np.ascontiguousarray(image[:, :, ::-1]), confident(segments, threshold), scale)


def rows(name: str, result: Result, threshold: float, size: tuple[int, int]) -> list[tuple[str, ...]]:
    """A row (see ``COLUMNS``) for each object; for each region where the model gives no objects.

    Args:
        name: of the model.
        result: of it.
        threshold: objects with a lower score are left out.
        size: (height, width) of the image.
    """
    table: list[tuple[str, ...]] = []
    for segment in confident(result.objects if result.objects is not None else result.regions or [], threshold):
        pixels = int(segment.mask.sum())
        height, width = segment.mask.shape
        score = "" if segment.score is None else f"{segment.score:.3f}"
        share = f"{100 * pixels / (size[0] * size[1]):.1f} %"
        box = (segment.left, segment.top, width, height)
        table.append((name, segment.name, score, str(pixels), share, ", ".join(map(str, box))))
    return table


def table_html(table: Sequence[Sequence[str]]) -> str:
    """Rows of :func:`rows` as an HTML table, or a sentence where there are none."""
    if not table:
        return '<p class="none">No objects.</p>'
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    return f'<table class="objects"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def figure_html(pixels: np.ndarray, caption: str, *, photo: bool = False) -> str:
    """A picture (H, W, 3) RGB with its caption as HTML that needs no further file; a click enlarges it.

    Args:
        pixels: of the picture.
        caption: plain text.
        photo: JPEG, which is smaller, in place of PNG.
    """
    encoded = io.BytesIO()
    if photo:
        Image.fromarray(pixels).save(encoded, "JPEG", quality=92, subsampling=0)
    else:
        Image.fromarray(pixels).save(encoded, "PNG")
    data = f"data:image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(encoded.getvalue()).decode()}"
    text = html.escape(caption)
    image = f'<img src="{data}" alt="{text}" width="{pixels.shape[1]}" height="{pixels.shape[0]}">'
    box = f'<input type="checkbox" aria-label="enlarge: {text}">'
    return f'<figure class="picture"><label>{box}{image}</label><figcaption>{text}</figcaption></figure>'


def gallery_html(pictures: Mapping[str, np.ndarray]) -> str:
    """Pictures by their captions, see :func:`figure_html`; empty where there are none."""
    figures = "".join(figure_html(pixels, caption) for caption, pixels in pictures.items())
    return f'<div class="gallery">{figures}</div>' if figures else ""


def summary(result: Result, threshold: float) -> str:
    """How many objects and segments, and how long it took, in one line."""
    parts = []
    if result.objects is not None:
        count = len(confident(result.objects, threshold))
        parts.append("1 object" if count == 1 else f"{count} objects")
    if result.regions is not None:
        count = len(confident(result.regions, threshold))
        parts.append("1 region" if count == 1 else f"{count} regions")
    return ", ".join([*parts, f"{1000 * result.seconds:.0f} ms"])


def legend(segments: Sequence[Segment], threshold: float, size: tuple[int, int]) -> str:
    """Colours, names, numbers and shares of the classes as HTML, things first, large ones before small ones."""
    classes: dict[tuple[bool, str], list[Segment]] = {}
    for segment in confident(segments, threshold):
        classes.setdefault((segment.is_thing, segment.name), []).append(segment)

    def area(members: Sequence[Segment]) -> int:
        return sum(int(segment.mask.sum()) for segment in members)

    items = []
    for (is_thing, name), members in sorted(classes.items(), key=lambda item: (not item[0][0], -area(item[1]))):
        count = f" &times; {len(members)}" if is_thing else ""
        share = 100 * area(members) / (size[0] * size[1])
        items.append(
            f'<li><span class="swatch" style="background: {_swatch(members)}"></span>{html.escape(name)}{count}'
            f'<span class="share">{share:.1f} %</span></li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _swatch(members: Sequence[Segment]) -> str:
    """One colour, or stripes of those of the first objects, as CSS."""
    colors = list(dict.fromkeys(f"rgb{segment.color}" for segment in members))[:_STRIPES]
    if len(colors) == 1:
        return colors[0]
    step = 100 / len(colors)
    stops = (f"{color} {i * step:.0f}% {(i + 1) * step:.0f}%" for i, color in enumerate(colors))
    return f"linear-gradient(90deg, {', '.join(stops)})"
