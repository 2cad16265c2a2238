"""Datasets: registration, validation, built-in sets, and what feeds them to a model."""

from __future__ import annotations

import importlib
import importlib.util

if importlib.util.find_spec("convmask.data.synthetic"):
    importlib.import_module("convmask.data.synthetic")
