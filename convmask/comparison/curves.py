"""Training curves of several methods in one picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def read_losses(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and total losses, each the median of 20 iterations, from Detectron2's ``metrics.json``.

    Lines that are no json, such as the last one of a training that was killed, are left out.
    """
    iterations, losses = [], []
    path = folder / "metrics.json"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "total_loss" in entry:
            iterations.append(entry["iteration"] + 1)
            losses.append(entry["total_loss"])
    return np.array(iterations), np.array(losses)


def relative_losses(losses: Sequence[float] | np.ndarray, window: int = 5) -> np.ndarray:
    """Losses as a share of the first one, each the mean of itself and up to ``window`` - 1 before it."""
    values = np.asarray(losses, dtype=float) / max(float(losses[0]), 1e-12)
    sums = np.concatenate([[0.0], values.cumsum()])
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(stops - window, 0)
    return (sums[stops] - sums[starts]) / (stops - starts)


def draw_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """An SVG element of losses over the share of the budget.

    Each method has losses of its own, so they are drawn relative to their beginning: the slope at the end says
    whether a method had more to learn, the height nothing about which is better.

    Args:
        curves: title to iterations and losses of :func:`read_losses`; methods without any are left out.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for (title, (iterations, losses)), color in zip(curves.items(), COLORS, strict=False):
        if len(losses):
            axes.plot(100 * iterations / iterations[-1], relative_losses(losses), label=title, color=color, lw=1.5)
    axes.set(xlabel="share of the training, %", ylabel="loss / loss at the start", xlim=(0, 100), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, ncols=2)
    buffer = io.StringIO()
    # Without date and with fixed identifiers: the same curves give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "convmask"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
