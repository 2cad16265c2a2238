"""The tables of docs/model_zoo.md, made from what is recorded beside the configs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from convmask.engine.errors import ConfigError
from convmask.model_zoo.listing import Model, list_models, metrics_text, published_text

# <!-- models: PanopticFPN -->, a table, <!-- end -->: the folder of configs that the table is of
_BLOCK = re.compile(r"(<!-- models: (?P<folder>\w+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
_QUICK = ("PQ", "PQ things", "PQ stuff", "mask AP", "mask AP50", "mIoU")


def updated(page: str) -> str:
    """The page with every table between ``<!-- models: FOLDER -->`` and ``<!-- end -->`` made anew.

    Raises:
        ConfigError: the page has no such table, or names a folder without configs.
    """
    if not _BLOCK.search(page):
        raise ConfigError("the page has no table between <!-- models: FOLDER --> and <!-- end -->")

    def made(block: re.Match[str]) -> str:
        models = [m for m in list_models() if m.name.startswith(f"{block['folder']}/")]
        if not models:
            raise ConfigError(f"the page has a table of configs/{block['folder']}, where there are none")
        table = _trained_table(models) if block["folder"] == "quick" else _published_table(models)
        return f"{block[1]}{table}{block[4]}"

    return _BLOCK.sub(made, page)


def _published_table(models: Sequence[Model]) -> str:
    headers = ["config", "task", "published", "trained by us"]
    rows = [[f"`{m.name}`", m.task, published_text(m), metrics_text(m.trained)] for m in models]
    return _markdown(headers, rows)


def _trained_table(models: Sequence[Model]) -> str:
    headers = ["config", "iterations x images", "time", *_QUICK]
    rows = []
    for m in models:
        t = m.trained
        numbers = [f"{t[key]:.1f}" if key in t else "" for key in _QUICK]
        schedule = f"{t['iterations']} x {t['images']}" if t else ""
        rows.append([f"`{m.name}`", schedule, t.get("time", ""), *numbers])
    return _markdown(headers, rows)


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Cells are not padded: a new number changes one line.
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("|  |", "| |").replace("|  |", "| |")
