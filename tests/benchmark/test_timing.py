from __future__ import annotations

import itertools

import pytest
import torch

from convmask.benchmark import Spread, median_times, spread_of
from convmask.benchmark.timing import clock_of


def test_spread() -> None:
    assert spread_of([5, 1, 2, 4, 3]) == Spread(3, 2, 4, 3)
    assert spread_of([7.5]) == Spread(7.5, 7.5, 7.5, 7.5)


def test_functions_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls: list[str] = []
    seconds = {"a": itertools.chain([99, 98], [1, 5, 3]), "b": itertools.chain([99, 98], [20, 20, 10])}

    def call(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(seconds[name])

    monkeypatch.setattr("convmask.benchmark.timing.clock_of", lambda device: lambda: now)
    functions = {name: lambda name=name: call(name) for name in seconds}
    assert median_times(functions, 3, warmup=2) == {"a": 3, "b": 20}
    assert calls == ["a", "b"] * 5


def test_a_prepared_function_runs_before_it_is_timed() -> None:
    calls: list[int] = []
    assert median_times({"f": lambda: calls.append(1)}, 2, warmup=1, prepared=True).keys() == {"f"}
    assert len(calls) == 6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_clock_waits_for_the_device() -> None:
    now = clock_of("cuda")
    x = torch.ones(4096, 4096, device="cuda")
    event = torch.cuda.Event()
    now()
    for _ in range(20):
        x = x @ x
    event.record()
    now()
    assert event.query()
