"""The parts that programs are made of, against plain references, and in ONNX with sizes that vary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from convmask.export import ExportError, ExportWrapper
from convmask.export.masks import paste, paste_whole
from convmask.export.panoptic import merge
from convmask.export.program import check_requirements, export_program, onnx_bytes, onnx_runner
from convmask.export.selection import ABSENT, best, boxes_around, survivors, valid_first
from convmask.ops import panoptic_merge


def boxes_of(count: int, height: float, width: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 1], dim=1)


def test_the_best_of_few_and_of_equal_ones() -> None:
    values, indices = best(torch.tensor([0.5, 0.7, 0.5, ABSENT]), 6)
    assert indices.tolist() == [1, 0, 2, 0, 0, 0]
    assert values[:3].tolist() == pytest.approx([0.7, 0.5, 0.5]) and (values[3:] == ABSENT).all()
    assert best(torch.full((100,), 0.25), 7)[1].tolist() == list(range(7))


def test_survivors_are_those_of_torchvision() -> None:
    boxes, scores = boxes_of(300, 60, 90), torch.rand(300, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(300) % 7
    kept = survivors(boxes, scores, groups, 7, 0.4)
    assert set(kept.nonzero()[:, 0].tolist()) == set(batched_nms(boxes, scores, groups, 0.4).tolist())
    scores[::2] = ABSENT
    kept = survivors(boxes, scores, groups, 7, 0.4)
    there = torch.arange(1, 300, 2)
    expected = there[batched_nms(boxes[there], scores[there], groups[there], 0.4)]
    assert set(kept.nonzero()[:, 0].tolist()) == set(expected.tolist())


def test_valid_rows_come_first_in_their_order() -> None:
    found = valid_first({"valid": torch.tensor([False, True, False, True]), "classes": torch.arange(4)})
    assert found["valid"].tolist() == [True, True, False, False]
    assert found["classes"][:2].tolist() == [1, 3]


def test_boxes_around_masks() -> None:
    masks = torch.zeros(3, 8, 9, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 7, 0] = True
    assert boxes_around(masks).tolist() == [[3, 2, 9, 5], [0, 7, 1, 8], [0, 0, 0, 0]]


def test_pasting_is_detectron2s() -> None:
    masks, boxes = torch.rand(20, 14, 14, generator=torch.Generator().manual_seed(2)), boxes_of(20, 50, 70)
    expected = paste_masks_in_image(masks, boxes, (50, 70), threshold=0.5)
    wrong = (paste(masks, boxes, 50, 70) >= 0.5) != expected
    assert wrong.sum() <= 1e-4 * expected.sum()


def test_pasting_whole_boxes_is_interpolation() -> None:
    masks = torch.rand(6, 9, 9, generator=torch.Generator().manual_seed(3))
    # beyond the image at either end, one pixel, and none
    boxes = [[3, 4, 30, 20], [0, 0, 40, 30], [-5, -2, 10, 40], [7, 7, 8, 8], [5, 5, 5, 9], [20, 10, 60, 28]]
    expected = torch.zeros(6, 30, 40, dtype=torch.bool)
    for target, mask, (x1, y1, x2, y2) in zip(expected, masks, boxes, strict=True):
        if x2 > x1:
            size = (y2 - y1, x2 - x1)
            whole = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] >= 0.4
            part = whole[max(-y1, 0) : 30 - y1, max(-x1, 0) : 40 - x1]
            target[max(y1, 0) : max(y1, 0) + part.shape[0], max(x1, 0) : max(x1, 0) + part.shape[1]] = part
    found = paste_whole(masks, torch.tensor(boxes).float(), 30, 40, 0.4)
    assert (found != expected).sum() <= 1


def scene(height: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks of instances, falling scores, and labels 0 to 3."""
    boxes = boxes_of(12, height, width, seed)
    masks = paste_whole(torch.ones(12, 2, 2), boxes.round(), height, width, 0.5)
    masks[3] = False
    labels = (torch.arange(height)[:, None] * 4 // height).expand(height, width).clone()
    labels[-1, 0] = 3
    return masks, torch.linspace(0.9, 0.2, 12), labels


@pytest.mark.parametrize("limit", [0, 1, 500])
def test_merging_is_that_of_the_operator(limit: int) -> None:
    for seed in range(3):
        masks, scores, labels = scene(40, 60, seed)
        options = {"overlap_threshold": 0.5, "stuff_area_limit": limit}
        ids, segments = panoptic_merge(
            masks, scores, torch.arange(12), labels, score_threshold=0.4, things_label=0, **options
        )
        found = merge(masks, scores >= 0.4, labels, num_stuff=5, **options)
        assert torch.equal(found["panoptic_seg"], ids)
        things = {x["instance_id"]: x["id"] for x in segments if x["isthing"]}
        stuff = {x["category_id"]: x["id"] for x in segments if not x["isthing"]}
        assert {row: id_ for row, id_ in enumerate(found["thing_ids"].tolist()) if id_} == things
        assert {row: id_ for row, id_ in enumerate(found["stuff_ids"].tolist()) if id_} == stuff
        assert things and segments


class Identity(nn.Module):
    """What a wrapper asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(3))
        self.register_buffer("pixel_std", torch.ones(3))
        self.backbone = nn.Identity()
        self.backbone.size_divisibility = 0
        self.backbone.output_shape = dict


class Parts(ExportWrapper):
    """Every part that has an operator of its own in ONNX, from the first pixels of the image."""

    def __init__(self) -> None:
        super().__init__(Identity())
        self.outputs = dict.fromkeys(("kept", "values", "boxes", "panoptic_seg", "thing_ids", "stuff_ids"), "")

    def predict(self, images: torch.Tensor, size: Any) -> dict[str, torch.Tensor]:
        numbers = images[0, :, :5, :24].flatten()[:120].view(20, 6) / 255
        boxes = torch.cat([numbers[:, :2] * 30, numbers[:, :2] * 30 + numbers[:, 2:4] * 30 + 2], dim=1)
        kept = survivors(boxes, numbers[:, 4].contiguous(), torch.arange(20) % 3, 3, 0.3)
        values, rows = best(torch.where(kept, numbers[:, 4].round(decimals=1), ABSENT), 24)
        masks = paste((numbers[:, 4:, None] + numbers[:, None, 4:]) / 2, boxes, *size)[rows] >= 0.3
        labels = (images[0, 0] / 64).long()
        merged = merge(masks, values > 0.1, labels, num_stuff=4, overlap_threshold=0.5, stuff_area_limit=20)
        return {"kept": kept, "values": values.clamp(min=-1), "boxes": boxes_around(masks), **merged}


def test_parts_in_onnx() -> None:
    try:
        check_requirements(["onnx"], running=True)
    except ExportError as error:
        pytest.skip(str(error))
    wrapper = Parts()
    names = list(wrapper.outputs)
    program = export_program(wrapper, (64, 96), dynamic=True)
    run = onnx_runner(onnx_bytes(program, names), names)
    for seed, size in enumerate([(64, 96), (128, 64)]):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 255
        expected = wrapper(image)
        found, traced = run(image), program.module()(image)
        assert expected["thing_ids"].any() and expected["stuff_ids"].any()
        for name in names:
            np.testing.assert_allclose(found[name], expected[name].numpy(), atol=1e-5, err_msg=name)
            np.testing.assert_allclose(traced[name].numpy(), expected[name].numpy(), atol=1e-5, err_msg=name)
