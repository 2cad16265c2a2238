"""What a model costs: parameters, FLOPs, activations, memory, and the time of each stage; and tools to measure them."""

from __future__ import annotations

from convmask.benchmark.counts import count, count_config, faint_image, image_size
from convmask.benchmark.machine import describe_machine, processor
from convmask.benchmark.memory import extra_memory, in_fresh_process
from convmask.benchmark.model import ModelOptions, benchmark_config, check_options
from convmask.benchmark.report import table_of
from convmask.benchmark.timing import Spread, median_times, spread_of, time_stages

__all__ = [
    "ModelOptions",
    "Spread",
    "benchmark_config",
    "check_options",
    "count",
    "count_config",
    "describe_machine",
    "extra_memory",
    "faint_image",
    "image_size",
    "in_fresh_process",
    "median_times",
    "processor",
    "spread_of",
    "table_of",
    "time_stages",
]
