"""Targets, losses and pasting by hand and against plain forms."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.inference.windows import paste_windows
from convmask.projects.embed_mask.fcos_losses import box_loss, centerness_targets
from convmask.projects.embed_mask.fcos_targets import TargetOptions, make_locations, make_targets
from convmask.projects.embed_mask.inference import mask_cells
from convmask.projects.embed_mask.losses import log_odds
from convmask.projects.embed_mask.targets import mask_targets, select_positives, training_cells


def one_object(x1: int, y1: int, x2: int, y2: int, size: tuple[int, int] = (64, 64)) -> Instances:
    masks = torch.zeros(1, *size, dtype=torch.bool)
    masks[0, y1:y2, x1:x2] = True
    instances = Instances(size, gt_masks=BitMasks(masks), gt_boxes=BitMasks(masks).get_bounding_boxes())
    instances.gt_classes = torch.tensor([2])
    return instances


def assigned(instances: Instances, **options: object) -> tuple[list[list[float]], torch.Tensor]:
    locations = make_locations([(8, 8), (4, 4)], [8, 16], torch.device("cpu"))
    arguments = {"num_classes": 3, "sizes_of_interest": (24,), **options}
    targets = make_targets([instances], locations, TargetOptions(**arguments))
    positive = targets.classes[0] >= 0
    assert (targets.classes[0][positive] == 2).all()
    return locations.points[positive].tolist(), targets.distances[0][positive]


def test_positives_lie_around_the_centre() -> None:
    points, distances = assigned(one_object(8, 8, 33, 33))
    # the centre is (20, 20), within 12 pixels of it
    assert points == [[x, y] for y in (12.0, 20.0, 28.0) for x in (12.0, 20.0, 28.0)]
    assert distances[0].tolist() == [4.0, 4.0, 20.0, 20.0]


def test_the_whole_box_without_centre_sampling_and_levels_by_size() -> None:
    points, _ = assigned(one_object(2, 2, 43, 43), center_radius=0.0)
    fine = [p for p in points if p[0] % 16 != 8 or p[1] % 16 != 8]
    # the greatest distance is at most 24 on the finer level
    assert all(max(x - 2, y - 2, 42 - x, 42 - y) <= 24 for x, y in fine)
    assert len(points) > len(fine) > 0


def test_positives_lie_on_the_mask() -> None:
    instances = one_object(8, 8, 33, 33)
    instances.gt_masks.tensor[0, 16:, :] = False
    points, _ = assigned(instances)
    assert points
    assert all(y < 16 for _, y in points)
    assert len(assigned(instances, sample_in_mask=False)[0]) == 9


def test_corners_that_exclude_the_last_pixel() -> None:
    assert assigned(one_object(8, 8, 33, 33), inclusive=False)[1][0].tolist() == [4.0, 4.0, 21.0, 21.0]


def test_the_smaller_object_takes_a_location() -> None:
    both = Instances.cat([one_object(0, 0, 41, 41), one_object(12, 12, 29, 29)])
    locations = make_locations([(8, 8)], [8], torch.device("cpu"))
    targets = make_targets([both], locations, TargetOptions(num_classes=3, sizes_of_interest=()))
    assert targets.objects[0].view(8, 8)[2, 2] == 1


def test_box_losses_by_hand() -> None:
    found, wanted = torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[2.0, 2, 2, 2]])
    iou = torch.tensor([5 / 17])
    torch.testing.assert_close(box_loss(found, wanted, "linear_iou"), 1 - iou)
    torch.testing.assert_close(box_loss(found, wanted, "iou"), -iou.log())
    torch.testing.assert_close(box_loss(found, wanted, "giou"), 1 - iou)
    apart = torch.tensor([[4.0, 0, 0, 2]]), torch.tensor([[0.0, 0, 4, 2]])
    torch.testing.assert_close(box_loss(*apart, "giou"), 1 - torch.tensor([1 / 17]), atol=1e-5, rtol=0)
    torch.testing.assert_close(centerness_targets(torch.tensor([[1.0, 2, 4, 2]])), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"BOX_LOSS 'l1' is not one of giou"):
        box_loss(found, wanted, "l1")


def test_which_locations_stand_for_an_object() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [20.0, 20, 29, 29], [50.0, 50, 59, 59]])
    near = boxes[0] + torch.tensor([0.0, 0, 2, 0])
    poor = boxes[1] + torch.tensor([9.0, 0, 9, 0])
    predicted = torch.stack([near, boxes[0], poor, boxes[0], poor])
    objects = torch.tensor([0, 0, 1, -1, 1])
    mean = select_positives(objects, predicted, boxes, proposals="mean", threshold=0.5, inclusive=True)
    assert mean.objects.tolist() == [0, 0, 1, 1]
    assert mean.locations.tolist() == [0, 1, 2, 4]
    best = select_positives(objects, predicted, boxes, proposals="best", threshold=0.5, inclusive=True)
    assert best.objects.tolist() == [0, 1]
    assert best.locations.tolist() == [1, 2]


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_mask_targets_are_reduced_masks_above_zero(stride: int) -> None:
    masks = torch.rand(3, 37, 50, generator=torch.Generator().manual_seed(0)) > 0.7
    padded = F.pad(masks, (0, 14, 0, 27)).float()
    expected = F.interpolate(padded[None], scale_factor=1 / stride, mode="bilinear", align_corners=False)[0] > 0
    assert torch.equal(mask_targets(masks, (64 // stride, 64 // stride), stride), expected)


def test_cells_of_training_and_inference() -> None:
    boxes = torch.tensor([[10.0, 6.0, 29.0, 200.0]])
    assert training_cells(boxes, (16, 16), 4, 0.1).tolist() == [[2, 0, 9, 15]]
    assert training_cells(boxes, (16, 16), 4, -1.0).tolist() == [[0, 0, 16, 16]]
    assert mask_cells(boxes, 4, "near").tolist() == [[2, 1, 9, 51]]
    assert mask_cells(boxes, 4, "wide").tolist() == [[0, -1, 9, 52]]


def test_log_odds_at_either_end() -> None:
    exponents = torch.tensor([0.0, 1e-5, 0.7, 30.0, 500.0], requires_grad=True)
    found = log_odds(exponents, 0.0)
    exact = exponents.detach().double()
    expected = -exact - torch.log(-torch.expm1(-exact.clamp(min=1e-6)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    found.sum().backward()
    assert torch.isfinite(exponents.grad).all()
    assert log_odds(exponents.detach(), 1e-9)[-1].item() == pytest.approx(-20.723, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    scaled=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_windows_are_pasted_as_whole_maps_are_scaled(seed: int, size: tuple[int, int], scaled: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randint(s, (4,), generator=generator) for s in size[::-1]], 1)
    last = torch.minimum(first + torch.randint(0, 8, (4, 2), generator=generator), torch.tensor(size[::-1]))
    windows = torch.cat([first, last], 1)
    areas = (last - first).prod(1)
    offsets = torch.cat([areas.new_zeros(1), areas.cumsum(0)])
    values = torch.rand(int(areas.sum()), generator=generator, dtype=torch.float64)
    maps = torch.zeros(4, *size, dtype=torch.float64)
    for k, (x1, y1, x2, y2) in enumerate(windows.tolist()):
        maps[k, y1:y2, x1:x2] = values[offsets[k] : offsets[k + 1]].view(y2 - y1, x2 - x1)
    expected = F.interpolate(maps[None], size=scaled, mode="bilinear", align_corners=False)[0]
    output = (max(scaled[0] - 2, 1), max(scaled[1] - 1, 1))
    expected = expected[:, : output[0], : output[1]]
    found = paste_windows(values, offsets, windows, size=size, scaled=scaled, output=output, fill=0.0, threshold=0.4321)
    assert not ((found != (expected > 0.4321)) & ((expected - 0.4321).abs() > 1e-9)).any()


def test_pasting_refuses_what_it_cannot_do() -> None:
    empty = torch.zeros(0), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"fill is 1\.0, above"):
        paste_windows(*empty, size=(4, 4), scaled=(8, 8), output=(8, 8), fill=1.0, threshold=0.5)
    with pytest.raises(ValueError, match="output is"):
        paste_windows(*empty, size=(4, 4), scaled=(8, 8), output=(9, 8), fill=0.0, threshold=0.5)
