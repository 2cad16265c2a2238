"""Datasets: registration, validation, built-in sets, and what feeds them to a model."""

from __future__ import annotations

from convmask.data import builtin as builtin
from convmask.data import synthetic as synthetic
