"""Records of :func:`convmask.benchmark.benchmark_config` as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from convmask.benchmark.machine import in_a_line
from convmask.benchmark.model import run_name
from convmask.inference.stages import REST, STAGES

Record = Mapping[str, Any]


def table_of(records: Sequence[Record]) -> str:
    """A row for each record, and below it the machine and what to know about the numbers.

    Args:
        records: each also has ``name``, the first column.
    """
    stages = [name for name in (*STAGES, REST) if any(name in record["stages_ms"] for record in records)]
    headers = ["config", "run", "params, 10^6", "FLOPs, 10^9", "activations, 10^6", "image"]
    headers += [*stages, "total, ms", "quartiles", "images/s", "peak, MiB"]
    rows = [_row(record, stages) for record in records]
    align = ["left" if name in ("config", "run") else "right" for name in headers]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)
    return "\n".join([table, "", *notes(records)])


def _row(record: Record, stages: Sequence[str]) -> list[str]:
    total = record["total_ms"]
    return [
        record["name"],
        run_name(record),
        _number(record["parameters"], 1e6, 2),
        _number(record["flops"], 1e9, 2),
        _number(record["activations"], 1e6, 2),
        " x ".join(map(str, record["size"])),
        *(f"{record['stages_ms'][name]['median']:.1f}" if name in record["stages_ms"] else "" for name in stages),
        f"{total['median']:.1f}",
        f"{total['lower']:.1f} to {total['upper']:.1f}",
        f"{record['images_per_second']:.1f}",
        _number(record["peak_memory_mib"], 1, 0),
    ]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def notes(records: Sequence[Record]) -> list[str]:
    """What a reader has to know: the machine, what was repeated, and which models had random weights."""
    machines = {in_a_line({**record["machine"], "time": ""}).rstrip("; "): None for record in records}
    times = sorted(str(record["machine"]["time"]) for record in records)
    repeats = sorted({(record["repeats"], record["images"]) for record in records})
    calls = " and ".join(f"{repeat} calls on {images} image{'s' * (images > 1)}" for repeat, images in repeats)
    lines = [
        *machines,
        f"{times[0]} to {times[-1]}.",
        f"Milliseconds a call: medians of {calls}, and as many others for the stages.",
    ]
    random = dict.fromkeys(record["name"] for record in records if not record["weights"])
    if random:
        every = all(not record["weights"] for record in records)
        which = "All weights are random" if every else f"Random weights: {', '.join(random)}"
        lines.append(f"{which}: `postprocess` says nothing about a trained model.")
    return lines
