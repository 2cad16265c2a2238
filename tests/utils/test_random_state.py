from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from convmask.checkpoint import load_file
from convmask.utils.random_state import get_random_state, preserved_random_state, seeded, set_random_state


def draw() -> tuple[float, float, float, float]:
    # The second normal number of a pair is kept by Python's and numpy's generators.
    return random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(()).item()


def test_a_state_is_restored_even_from_a_checkpoint(tmp_path: Path) -> None:
    draw()
    torch.save({"state": get_random_state()}, tmp_path / "state.pth")
    expected = [draw() for _ in range(3)]
    set_random_state(load_file(str(tmp_path / "state.pth"))["state"])
    assert [draw() for _ in range(3)] == expected


def test_what_is_drawn_inside_does_not_count() -> None:
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    with preserved_random_state():
        draw()
    assert draw() == expected


def test_a_seed_is_in_force_inside_only() -> None:
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    with seeded(3, 1, 4):
        first = draw()
    assert draw() == expected
    with seeded(3, 1, 4):
        assert draw() == first
    for other in ((3, 1, 5), (3, 2, 4), (4, 1, 4), (2**63, 1, 4)):
        with seeded(*other):
            assert not set(draw()) & set(first)
