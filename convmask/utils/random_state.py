"""The state of the global random generators of Python, numpy and PyTorch: stored, restored, or set for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]


def get_random_state() -> RandomState:
    """The state of every generator of this process, in plain values and tensors that a checkpoint may hold.

    Of CUDA generators only that of the current device, the one that a training process uses, is part of it.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: RandomState = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: RandomState) -> None:
    """Restores what :func:`get_random_state` returned, here or in an earlier process."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, position, has_gauss, numpy_gauss = state["numpy"]
    np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards as they were before."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, the generators on the CPU are seeded by ``key`` alone; afterwards they are as they were before.

    Args:
        key: non-negative integers. Keys that differ anywhere give unrelated random numbers.
    """
    words = np.random.SeedSequence(key).generate_state(8)
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(words[:4].tobytes())
    np.random.seed(words)
    # Not torch.manual_seed, which would seed the CUDA generators too.
    torch.default_generator.manual_seed(int(words[4]) << 31 | int(words[5]) >> 1)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
