"""Semantic models against recorded outputs of the original release (two images, narrow R50-D8 with an FCN head)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convmask.projects.knet.checkpoint import convert_semantic
from convmask.projects.knet.update_head import Round

Record = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def record(golden: Any) -> Record:
    return golden("knet_semantic")


@pytest.fixture
def model(record: Record, released_model: Callable[[Record, str], nn.Module]) -> nn.Module:
    return released_model(record, "knet_semantic_fcn_R_50_80k")


@pytest.fixture
def batch(record: Record, recorded_batch: Callable[[Record], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return recorded_batch(record)


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_rounds(record: Record, model: nn.Module, batch: list[dict[str, Any]]) -> None:
    features = model.eval().backbone(model.preprocess_image(batch).tensor)
    close(features["res4"], record["eval/backbone/c4"])
    close(features["res5"], record["eval/backbone/c5"])
    taken, rounds = model.sem_seg_head.predict(features)
    close(taken, record["eval/init/features"])
    names = ("init", "s0", "s1", "s2")
    this: Round
    for name, this in zip(names, rounds, strict=True):
        close(this.mask_logits, record[f"eval/{name}/seg_logits"])
        close(this.kernels, record[f"eval/{name}/kernels"])


def test_label_maps(record: Record, model: nn.Module, batch: list[dict[str, Any]]) -> None:
    for index, result in enumerate(model.eval()(batch)):
        np.testing.assert_array_equal(result["sem_seg"].argmax(dim=0).numpy(), record[f"eval/sem_seg/{index}"])


def test_losses_and_gradients(record: Record, model: nn.Module, batch: list[dict[str, Any]]) -> None:
    found = model.train()(batch)
    expected = {key.removeprefix("loss/"): value for key, value in record.items() if key.startswith("loss/")}
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-4), name
    sum(found.values()).backward()
    norms = json.loads(str(record["grad_norms"]))
    released = list(norms)
    names = convert_semantic({name: torch.full((1, 1), index) for index, name in enumerate(released)})
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == names.keys()
    for name, index in names.items():
        assert gradients[name] == pytest.approx(norms[released[int(index)]], rel=2e-3, abs=1e-5), name
