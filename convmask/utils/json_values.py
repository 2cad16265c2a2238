"""Values that json can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def without_nan(results: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers, such as evaluators give, as plain floats; None for NaN and infinity, which json does not have."""
    clean: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            clean[key] = without_nan(value)
        else:
            number = float(value)
            clean[key] = number if math.isfinite(number) else None
    return clean
