"""Datasets: registration, validation, built-in sets, and what feeds them to a model."""

from __future__ import annotations

import importlib
import importlib.util

from convmask.data import builtin as builtin

if importlib.util.find_spec("convmask.data.synthetic"):
    importlib.import_module("convmask.data.synthetic")
