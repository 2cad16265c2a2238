from __future__ import annotations

import json

import numpy as np

from convmask.utils.json_values import without_nan


def test_nan_becomes_null() -> None:
    results = {"segm": {"AP": np.float64(3.5), "APl": float("nan")}, "time": float("inf"), "images": 4}
    text = json.dumps(without_nan(results), allow_nan=False)
    assert json.loads(text) == {"segm": {"AP": 3.5, "APl": None}, "time": None, "images": 4.0}
