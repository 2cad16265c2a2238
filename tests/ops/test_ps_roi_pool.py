from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmask.ops import ps_roi_pool, ps_roi_pool_reference
from convmask.ops.ps_roi_pool import ps_roi_pool_backward_reference

from .operator_tester import ErrorCase, OperatorTester

Golden = Callable[[str], dict[str, np.ndarray]]

# For an input of 96 x 80 pixels: whole, half-integer, at every border, over it, outside, inverted, a point, not finite.
ROIS = [
    (0, 0, 0, 79, 95),
    (0, 16, 32, 47, 63),
    (0, 10.5, 11.5, 40.5, 61.5),
    (0, -10.5, -0.5, 20.5, 30),
    (0, 60, 70, 120, 130),
    (0, 0, 40, 8, 95),
    (0, 70, 0, 79, 20),
    (0, 200, 10, 300, 50),
    (0, -90, -80, -40, -20),
    (0, 50, 60, 20, 10),
    (0, 33, 44, 33, 44),
    (0, 79, 95, 79, 95),
    (0, 7.7, 20.1, 7.9, 80.3),
]


def draw_rois(generator: torch.Generator, images: int, count: int = 4) -> Tensor:
    random = torch.rand(count, 4, generator=generator, dtype=torch.float64) * 110 - 10
    rois = torch.cat([torch.tensor(ROIS, dtype=torch.float64)[:, 1:], random])
    return torch.cat([(torch.arange(len(rois)) % images)[:, None].double(), rois], dim=1)


def draw_maps(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TestPSRoIPool(OperatorTester):
    operator = "ps_roi_pool"
    reference = staticmethod(ps_roi_pool_reference)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # noqa: RUF012
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        yield draw_maps(generator, 2, 4, 3, 3), draw_rois(generator, 2), 2, 3, 1 / 32, True  # 3 bins in 2 cells
        yield draw_maps(generator, 1, 4, 3, 3), draw_rois(generator, 1), 2, 2, 1 / 32, False
        yield draw_maps(generator, 1, 2, 3, 2), draw_rois(generator, 1), 1, 2, 1 / 32, True

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        maps = torch.ones(1, 9, 4, 4, dtype=torch.float64)
        yield maps, torch.zeros(0, 5, dtype=torch.float64), 3, 6, 1 / 16, True
        yield maps[:, :0], torch.zeros(2, 5, dtype=torch.float64), 3, 6, 1 / 16, True
        yield maps[:0], torch.zeros(0, 5, dtype=torch.float64), 3, 6, 1 / 16, False
        yield maps[:, :, :0], torch.zeros(1, 5, dtype=torch.float64), 3, 6, 1 / 16, True

    def error_cases(self) -> dict[str, ErrorCase]:
        maps, rois = torch.zeros(1, 9, 4, 4), torch.zeros(2, 5)
        wrong: list[tuple[str, dict[str, Any], type[Exception]]] = [
            ("maps", {"maps": maps[0]}, ValueError),
            ("maps", {"maps": maps.long()}, TypeError),
            ("rois", {"rois": rois[:, :4]}, ValueError),
            ("rois", {"rois": rois.long()}, TypeError),
            ("rois", {"rois": rois.to("meta")}, ValueError),
            ("rois", {"rois": rois + 1}, Exception),
            ("rois", {"rois": rois * float("nan")}, Exception),
            ("group_size", {"group_size": 2}, ValueError),
            ("group_size", {"group_size": 0}, ValueError),
            ("output_size", {"output_size": 2}, ValueError),
        ]
        cases = {}
        for index, (name, change, exception) in enumerate(wrong):
            values = {"maps": maps, "rois": rois, "group_size": 3, "output_size": 6} | change
            call = partial(ps_roi_pool, values.pop("maps"), values.pop("rois"), **values)
            cases[f"function {name} {index}"] = ErrorCase(call, exception, name)
            if change.get("rois", rois).device.type == "cpu":
                values = {"maps": maps, "rois": rois, "group_size": 3, "output_size": 6} | change
                raw = partial(torch.ops.convmask.ps_roi_pool, *values.values(), 1 / 16, True)
                cases[f"operator {name} {index}"] = ErrorCase(raw, Exception, name)
        return cases


class TestPSRoIPoolBackward(OperatorTester):
    operator = "ps_roi_pool_backward"
    reference = staticmethod(ps_roi_pool_backward_reference)
    dtypes = (torch.float64, torch.float32, torch.float16)
    tolerances = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2}  # noqa: RUF012
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        rois = draw_rois(generator, 2)
        yield draw_maps(generator, len(rois), 1, 3, 3), rois, 2, 3, 3, 2, 1 / 32, True
        rois = draw_rois(generator, 1)
        yield draw_maps(generator, len(rois), 2, 2, 2), rois, 1, 3, 2, 1, 1 / 32, False

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        gradient, rois = torch.ones(0, 2, 6, 6, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64)
        yield gradient, rois, 1, 4, 4, 3, 1 / 16, True
        yield gradient, rois, 0, 4, 4, 3, 1 / 16, True

    def error_cases(self) -> dict[str, ErrorCase]:
        gradient, rois = torch.ones(2, 2, 6, 6), torch.zeros(2, 5)
        wrong = [
            ("gradient", gradient[:1], rois, 3),
            ("gradient", gradient[..., :5], rois, 3),
            ("gradient", gradient.long(), rois, 3),
            ("rois", gradient, rois.long(), 3),
            ("rois", gradient, rois - 1, 3),
            ("group_size", gradient, rois, 7),
        ]
        cases = {}
        for index, (name, first, second, group) in enumerate(wrong):
            call = partial(torch.ops.convmask.ps_roi_pool_backward, first, second, 1, 4, 4, group, 1 / 16, True)
            cases[f"{name} {index}"] = ErrorCase(call, Exception, name)
        return cases


def pool_one_by_one(maps: np.ndarray, rois: np.ndarray, group: int, size: int, scale: float) -> np.ndarray:
    """The release's rule with loops; the RoI's arithmetic in float32."""
    channels, height, width = maps.shape[1:]
    result = np.zeros((len(rois), channels // group**2, size, size))
    for r, (image, *edges) in enumerate(rois.astype(np.float32)):
        half_away = [math.copysign(math.floor(abs(e) + 0.5), e) for e in edges]
        x1, y1, x2, y2 = (np.float32(e) * np.float32(scale) for e in np.add(half_away, [0, 0, 1, 1]))
        steps = [max(np.float32(e), np.float32(0.1)) / np.float32(size) for e in (x2 - x1, y2 - y1)]
        for p in range(size):
            for q in range(size):
                rows = range(
                    max(math.floor(np.float32(p) * steps[1] + y1), 0),
                    min(math.ceil(np.float32(p + 1) * steps[1] + y1), height),
                )
                columns = range(
                    max(math.floor(np.float32(q) * steps[0] + x1), 0),
                    min(math.ceil(np.float32(q + 1) * steps[0] + x1), width),
                )
                cells = [(y, x) for y in rows for x in columns]
                for d in range(result.shape[1]):
                    channel = (d * group + p * group // size) * group + q * group // size
                    values = [maps[int(image), channel, y, x] for y, x in cells]
                    result[r, d, p, q] = np.mean(values) if values else 0
    return result


@settings(max_examples=25, deadline=None)
@given(
    edges=st.lists(st.tuples(*[st.integers(-80, 320)] * 4), min_size=1, max_size=3),
    group=st.integers(1, 4),
    more=st.integers(0, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([1 / 16, 1 / 8, 0.1]),
)
def test_equals_loops_over_bins(
    edges: list[tuple[int, ...]], group: int, more: int, size: tuple[int, int], scale: float
) -> None:
    rois = np.array([(i % 2, *edge) for i, edge in enumerate(edges)], np.float64)
    rois[:, 1:] /= 2
    maps = np.random.default_rng(0).normal(size=(2, 2 * group**2, *size))
    expected = pool_one_by_one(maps, rois, group, group + more, scale)
    actual = ps_roi_pool(
        torch.from_numpy(maps),
        torch.from_numpy(rois),
        group_size=group,
        output_size=group + more,
        spatial_scale=scale,
    )
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def cases_of(record: dict[str, np.ndarray], prefix: str) -> list[str]:
    return sorted({key.split("/")[1] for key in record if key.startswith(f"{prefix}/")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_mxnet(golden: Golden, dtype: torch.dtype) -> None:
    record = golden("fcis_ops")
    for case in cases_of(record, "psroi"):
        of = {key: record[f"psroi/{case}/{key}"] for key in ("data", "rois", "out", "grad_out", "grad_in")}
        attributes = json.loads(str(record[f"psroi/{case}/attrs"]))
        maps = torch.from_numpy(of["data"]).to(dtype).requires_grad_()
        pooled = ps_roi_pool(
            maps,
            torch.from_numpy(of["rois"]),
            group_size=attributes["group_size"],
            output_size=attributes["pooled_size"],
            spatial_scale=attributes["spatial_scale"],
        )
        np.testing.assert_allclose(pooled.detach(), of["out"], atol=1e-6, err_msg=case)
        pooled.backward(torch.from_numpy(of["grad_out"]).to(dtype))
        np.testing.assert_allclose(maps.grad, of["grad_in"], atol=2e-5, err_msg=case)


def test_golden_chainercv(golden: Golden) -> None:
    record = golden("fcis_ops")
    for case in cases_of(record, "chainer_psroi"):
        of = {name.split("/")[2]: value for name, value in record.items() if name.startswith(f"chainer_psroi/{case}/")}
        attributes = json.loads(str(of["attrs"]))
        rois = np.concatenate([of["roi_index"][:, None], of["rois_yx"][:, [1, 0, 3, 2]]], axis=1).astype(np.float32)
        maps = torch.from_numpy(of["data"]).requires_grad_()
        options = {
            "group_size": attributes["group_size"],
            "output_size": attributes["outsize"][1],
            "spatial_scale": attributes["spatial_scale"],
        }
        pooled = ps_roi_pool(maps, torch.from_numpy(rois), rounded=False, **options)
        np.testing.assert_allclose(pooled.detach(), of["out"], atol=1e-6, err_msg=case)
        pooled.backward(torch.from_numpy(of["grad_out"]))
        np.testing.assert_allclose(maps.grad, of["grad_in"], atol=2e-5, err_msg=case)
        if "mxnet_rois" in of:
            both = ps_roi_pool(maps, torch.from_numpy(of["mxnet_rois"]), **options)
            np.testing.assert_allclose(both.detach(), of["out"], atol=1e-6)


def test_rois_that_are_not_finite_are_empty() -> None:
    rois = torch.tensor([[0.0, float("nan"), 0, 9, 9], [0, 0, float("inf"), 9, float("inf")]])
    assert not ps_roi_pool(torch.ones(1, 4, 5, 5), rois, group_size=2, output_size=4).any()
