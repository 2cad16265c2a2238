"""The dense part of every method is one graph for torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from convmask.benchmark.model import ModelOptions, compile_dense_parts, running

from .networks import NETWORKS, dense_part, narrow_model, noise


def assert_equal(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Everything that two calls gave, of whatever structure."""
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)


VARIANTS = ("knet_semantic", "mask_rcnn")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in VARIANTS)) for n in NETWORKS])
def test_the_dense_part_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = narrow_model(name)
    function = dense_part(name, model)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    with torch.no_grad():
        # attention has a fused form of its own in eager mode
        assert_equal(compiled(images), function(images), 1e-4 if "knet" in name else 0.0)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_parts_predict_the_same_at_every_size(name: str) -> None:
    torch._dynamo.reset()
    batches = [noise((64, 96)), noise((96, 64), (64, 64)), noise((128, 96))]
    model = narrow_model(name)
    # K-Net's matrix products are put together in another order.
    tolerance = 1e-4 if name.startswith("knet") else 0.0
    with running(ModelOptions(), "cpu"):
        expected = [model(batch) for batch in batches]
        assert "backbone" in compile_dense_parts(model, "eager", fullgraph=True)
        for batch, wanted in zip(batches, expected, strict=True):
            for found, output in zip(model(batch), wanted, strict=True):
                assert found.keys() == output.keys()
                for key in {"sem_seg", "panoptic_seg"} & found.keys():
                    assert_equal(found[key], output[key], tolerance)
                if "instances" in found:
                    fields = (x["instances"].get_fields() for x in (found, output))
                    ours, theirs = ({k: getattr(v, "tensor", v) for k, v in f.items()} for f in fields)
                    assert_equal(ours, theirs, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embed_mask"])
def test_generated_code_computes_the_same(name: str) -> None:
    """By inductor. One method, since the compiler takes half a minute for each."""
    torch._dynamo.reset()
    model = narrow_model(name)
    function = dense_part(name, model)
    compiled = torch.compile(function, fullgraph=True)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_equal(compiled(images), function(images), 1e-4)
