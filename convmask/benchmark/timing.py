"""Timing with warm-up and synchronisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from convmask.inference.stages import TRANSFER, StageClock, observed, unclaimed_stage

Batch = Sequence[dict[str, Any]]


class Spread(NamedTuple):
    """A quantity that was measured several times.

    Attributes:
        median: of the measurements, as are the quartiles.
        lower: quartile.
        upper: quartile.
        mean: of the measurements; means of stages add up to the mean of the whole.
    """

    median: float
    lower: float
    upper: float
    mean: float


def spread_of(values: Sequence[float]) -> Spread:
    """Of at least one measurement."""
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, lower, upper, statistics.fmean(values))


def clock_of(device: str) -> Callable[[], float]:
    """Seconds; on CUDA all work that was given to the device is waited for."""
    return partial(_synchronised, torch.device(device)) if device.startswith("cuda") else time.perf_counter


def _synchronised(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


def median_times(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    *,
    warmup: int = 1,
    prepared: bool = False,
) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a disturbance hits all alike.

    Args:
        functions: what to call, by name.
        repeats: measurements of each.
        device: which is waited for.
        warmup: turns that do not count.
        prepared: in each turn a function runs twice and the second time counts: the first finds caches and memory as
            another function left them.
    """
    now = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            if prepared:
                function()
            start = now()
            function()
            if turn >= warmup:
                times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class StageTimes(NamedTuple):
    """Milliseconds of a call.

    Attributes:
        stages: of each stage of :mod:`convmask.inference.stages`.
        stages_total: of the same calls: what their stages add up to.
        total: of calls that are not observed: on a GPU without a wait at the end of every stage.
        first: of the very first call, which compiles what is to be compiled.
    """

    stages: dict[str, Spread]
    stages_total: Spread
    total: Spread
    first: float


def time_stages(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    warmup: int = 3,
    repeats: int = 20,
    now: Callable[[], float] | None = None,
    progress: Callable[[], None] | None = None,
) -> StageTimes:
    """Times calls of a model and the transfer of their results to the CPU.

    Each batch in its turn is predicted twice: once undisturbed, once split into stages. Warm-up sees every batch.

    Args:
        model: in evaluation mode; the caller sees to ``no_grad`` and autocasting.
        batches: of Detectron2's dicts.
        device: of the model.
        warmup: calls at least that do not count.
        repeats: calls that count.
        now: seconds; by default :func:`clock_of` the device.
        progress: called after every call that counts.
    """
    now = now or clock_of(device)
    start = now()
    _to_cpu(model(batches[0]))
    first = now() - start
    for number in range(1, max(warmup, len(batches))):
        _to_cpu(model(batches[number % len(batches)]))
    totals: list[float] = []
    clocks: list[StageClock] = []
    for number in range(repeats):
        batch = batches[number % len(batches)]
        start = now()
        _to_cpu(model(batch))
        totals.append(now() - start)
        clocks.append(_observe(model, batch, now))
        if progress:
            progress()
    names = list(dict.fromkeys(name for clock in clocks for name in clock.seconds))
    return StageTimes(
        {name: _milliseconds([clock.seconds.get(name, 0.0) for clock in clocks]) for name in names},
        _milliseconds([sum(clock.seconds.values()) for clock in clocks]),
        _milliseconds(totals),
        1000 * first,
    )


def _observe(model: nn.Module, batch: Batch, now: Callable[[], float]) -> StageClock:
    clock = StageClock(now)
    with observed(model, clock):
        with clock.stage(unclaimed_stage(model)):
            outputs = model(batch)
        with clock.stage(TRANSFER):
            _to_cpu(outputs)
    return clock


def _milliseconds(seconds: Sequence[float]) -> Spread:
    return spread_of([1000 * value for value in seconds])


def _to_cpu(outputs: Any) -> Any:
    """Predictions in Detectron2's format on the CPU."""
    if isinstance(outputs, dict):
        return {name: _to_cpu(value) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return [_to_cpu(value) for value in outputs]
    return outputs.to("cpu") if hasattr(outputs, "to") else outputs
