from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmask.ops import inside_outside_assemble, inside_outside_assemble_reference, ps_roi_pool
from convmask.ops.inside_outside_assemble import inside_outside_assemble_backward_reference

from .operator_tester import DEVICES, ErrorCase, OperatorTester, require_gradients
from .test_ps_roi_pool import draw_maps, draw_rois

Golden = Callable[[str], dict[str, np.ndarray]]


def draw(generator: torch.Generator, images: int, k: int, classes: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return draw_maps(generator, images, k, k, 2, classes, *size), draw_rois(generator, images)


def labels_for(rois: Tensor, classes: int) -> Tensor:
    """Every class, and two numbers that are none."""
    return torch.arange(len(rois)) % (classes + 2) - 1


class TestInsideOutsideAssemble(OperatorTester):
    operator = "inside_outside_assemble"
    reference = staticmethod(inside_outside_assemble_reference)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # noqa: RUF012
    differentiable = (0,)

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        maps, rois = draw(generator, 2, 2, 2, (3, 2))
        yield maps, rois, None, 2, 1 / 32, True, 1
        maps, rois = draw(generator, 1, 1, 6, (2, 2))  # more classes than a narrow vector has
        yield maps, rois, None, 2, 1 / 48, False, 0
        maps, rois = draw(generator, 1, 2, 2, (3, 2))
        yield maps, rois, labels_for(rois, 2), 3, 1 / 32, True, 1  # 3 bins in 2 cells

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        maps = torch.ones(1, 2, 2, 2, 3, 4, 4, dtype=torch.float64)
        yield maps, torch.zeros(0, 5, dtype=torch.float64), None, 4, 1 / 16, True, 1
        yield maps[:0], torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), 4, 1 / 16, True, 1
        yield maps[..., :0], torch.zeros(2, 5, dtype=torch.float64), torch.tensor([1, 2]), 4, 1 / 16, True, 1

    def error_cases(self) -> dict[str, ErrorCase]:
        maps, rois, labels = torch.zeros(1, 2, 2, 2, 3, 4, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
        wrong: list[tuple[str, dict[str, Any], type[Exception]]] = [
            ("maps", {"maps": maps[0]}, ValueError),
            ("maps", {"maps": maps[:, :1]}, ValueError),
            ("maps", {"maps": maps[:, :, :, :1]}, ValueError),
            ("maps", {"maps": maps.long()}, TypeError),
            ("rois", {"rois": rois[:, :4]}, ValueError),
            ("rois", {"rois": rois.long()}, TypeError),
            ("rois", {"rois": rois + 1}, Exception),
            ("labels", {"labels": labels[:1]}, ValueError),
            ("labels", {"labels": labels.int()}, TypeError),
            ("labels", {"labels": labels.to("meta")}, ValueError),
            ("output_size", {"output_size": 1}, ValueError),
            ("first_class", {"labels": None, "first_class": 3}, ValueError),
        ]
        cases = {}
        good = {"maps": maps, "rois": rois, "labels": labels, "output_size": 4, "first_class": 1}
        for index, (name, change, exception) in enumerate(wrong):
            values = good | change
            cases[f"function {name} {index}"] = ErrorCase(partial(inside_outside_assemble, **values), exception, name)
            if all(v.device.type == "cpu" for v in values.values() if isinstance(v, Tensor)):
                *tensors, size, first = values.values()
                raw = partial(torch.ops.convmask.inside_outside_assemble, *tensors, size, 1 / 16, True, first)
                cases[f"operator {name} {index}"] = ErrorCase(raw, Exception, name)
        return cases


class TestInsideOutsideAssembleBackward(OperatorTester):
    operator = "inside_outside_assemble_backward"
    reference = staticmethod(inside_outside_assemble_backward_reference)
    dtypes = (torch.float64, torch.float32)
    tolerances = {torch.float64: 1e-12, torch.float32: 2e-5}  # noqa: RUF012

    def samples(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for images, k, classes, size, output in (
            (2, 2, 3, (3, 2), 4),
            (1, 1, 21, (6, 5), 3),
            (1, 2, 81, (4, 3), 5),  # every width of the vectors
        ):
            maps, rois = draw(generator, images, k, classes, size)
            gradients = draw_maps(generator, len(rois), classes), draw_maps(generator, len(rois), 2, output, output)
            gradients[0][::3] = 0
            gradients[1][::2] = 0
            yield *gradients, maps, rois, labels_for(rois, classes), output, 1 / 16, True

    def empty_samples(self) -> Iterator[tuple[Any, ...]]:
        maps = torch.ones(1, 2, 2, 2, 3, 4, 4, dtype=torch.float64)
        none = torch.zeros(0, 5, dtype=torch.float64)
        yield none[:, :3], maps.new_zeros(0, 2, 4, 4), maps, none, torch.zeros(0, dtype=torch.int64), 4, 1 / 16, True

    def error_cases(self) -> dict[str, ErrorCase]:
        maps, rois, classes = torch.zeros(1, 2, 2, 2, 3, 4, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
        scores, masks = torch.zeros(2, 3), torch.zeros(2, 2, 4, 4)
        wrong = [
            ("score_gradient", scores[:, :2], masks, maps, rois),
            ("mask_gradient", scores, masks[:, :1], maps, rois),
            ("maps", scores, masks, maps[0], rois),
            ("rois", scores, masks, maps, rois + 2),
        ]
        operator = torch.ops.convmask.inside_outside_assemble_backward
        return {
            f"{name} {index}": ErrorCase(partial(operator, *tensors, classes, 4, 1 / 16, True), Exception, name)
            for index, (name, *tensors) in enumerate(wrong)
        }

    @pytest.mark.parametrize("device", DEVICES, indirect=True)
    def test_gradients(self, device: torch.device) -> None:
        """There is no second derivative, and asking for one is an error."""
        args = self.cases(device, torch.float64)[0]
        result = self.call(tuple(require_gradients(args, (0, 1))))
        with pytest.raises(NotImplementedError, match="no gradient"):
            result.sum().backward()


def unfused(
    maps: Tensor, rois: Tensor, labels: Tensor | None, output_size: int, first_class: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the pooling operator."""
    images, k, _, _, classes, height, width = maps.shape
    channels = maps.permute(0, 4, 3, 1, 2, 5, 6).reshape(images, classes * 2 * k * k, height, width)
    pooled = ps_roi_pool(channels, rois, group_size=k, output_size=output_size, spatial_scale=1 / 32)
    pooled = pooled.unflatten(1, (classes, 2))
    scores = pooled.amax(dim=2).mean(dim=(2, 3))
    chosen = scores[:, first_class:].argmax(dim=1) + first_class if labels is None else labels
    return scores, pooled[torch.arange(len(rois)), chosen], chosen


def in_layout(maps: Tensor, layout: str) -> Tensor:
    """The same values, in memory as a convolution leaves them, or as a batch of products does."""
    order = {"channels first": None, "channels last": (0, 5, 6, 1, 2, 3, 4), "positions": (1, 2, 0, 5, 6, 3, 4)}[layout]
    if order is None:
        return maps.contiguous()
    back = [order.index(dim) for dim in range(7)]
    return maps.permute(order).contiguous().permute(back)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 3),
    more=st.integers(0, 3),
    classes=st.sampled_from([1, 2, 5, 16, 21, 65, 81]),
    layout=st.sampled_from(["channels first", "channels last", "positions"]),
    labelled=st.booleans(),
)
def test_equals_the_unfused_steps(seed: int, k: int, more: int, classes: int, layout: str, labelled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps, rois = draw(generator, 2, k, classes, (4, 3))
    labels = torch.randint(classes, (len(rois),), generator=generator) if labelled else None
    first = 0 if classes == 1 else 1
    expected_input = maps.clone().requires_grad_()
    actual_input = in_layout(maps, layout).requires_grad_()
    expected = unfused(expected_input, rois, labels, k + more, first)
    options = {"output_size": k + more, "spatial_scale": 1 / 32, "first_class": first}
    actual = inside_outside_assemble(actual_input, rois, labels, **options)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected[:2]]
    for results, target in ((expected, expected_input), (actual, actual_input)):
        sum((x * w).sum() for x, w in zip(results[:2], weights, strict=True)).backward()
        assert target.grad is not None
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual_input.grad, expected_input.grad, rtol=1e-10, atol=1e-10)


def released_order(maps: np.ndarray, k: int) -> Tensor:
    """(N, 2 C k k, H, W) in the release's channel order as a view of the operator's shape."""
    tensor = torch.from_numpy(maps)
    classes = tensor.shape[1] // (2 * k * k)
    return tensor.unflatten(1, (classes, 2, k, k)).permute(0, 3, 4, 2, 1, 5, 6)


@pytest.mark.parametrize("layout", ["release", "channels last"])
def test_golden(golden: Golden, layout: str) -> None:
    record = {k.removeprefix("compose/c5/"): v for k, v in golden("fcis_ops").items() if k.startswith("compose/c5/")}
    maps = released_order(record["score_maps"], 7)
    if layout != "release":
        maps = in_layout(maps, layout)
    maps.requires_grad_()
    rois, labels = torch.from_numpy(record["rois"]), torch.from_numpy(record["label"])
    scores, logits, classes = inside_outside_assemble(maps, rois)
    np.testing.assert_allclose(scores.detach(), record["cls_score"], atol=1e-6)
    np.testing.assert_allclose(scores.softmax(1).detach(), record["cls_prob"], atol=1e-6)
    np.testing.assert_allclose(logits.softmax(1).detach(), record["mask_prob"], atol=1e-6)
    assert classes.tolist() == record["picked_class"].tolist()
    scores, logits, _ = inside_outside_assemble(maps, rois, labels)
    np.testing.assert_allclose(logits.detach(), record["mask_score_label"], atol=1e-6)
    gradients = torch.from_numpy(record["grad_cls_score"]), torch.from_numpy(record["grad_mask_score"])
    torch.autograd.backward((scores, logits), gradients)
    expected = released_order(record["grad_score_maps"], 7)
    np.testing.assert_allclose(maps.grad, expected, atol=1e-5)


def test_equal_values_give_the_gradient_to_the_outside() -> None:
    maps = torch.zeros(1, 1, 1, 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    scores, _, _ = inside_outside_assemble(maps, torch.tensor([[0.0, 0, 0, 40, 40]]), output_size=2)
    scores.sum().backward()
    assert maps.grad is not None
    assert maps.grad[0, 0, 0, 0].any()
    assert not maps.grad[0, 0, 0, 1].any()


def test_many_classes_and_rois_equal_the_reference() -> None:
    """The shapes of COCO, fewer RoIs and cells: all vector widths, several tasks of RoIs."""
    generator = torch.Generator().manual_seed(2)
    maps = in_layout(draw_maps(generator, 1, 7, 7, 2, 81, 8, 9).float(), "channels last")
    rois = draw_rois(generator, 1, count=40).float()
    for labels in (None, labels_for(rois, 81)):
        args = maps, rois, labels, 21, 1 / 12, True, 1
        actual = torch.ops.convmask.inside_outside_assemble(*args)
        for a, e in zip(actual, inside_outside_assemble_reference(*args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
