"""Targets and losses by hand and against plain forms."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks, Instances
from torch.nn import functional as F

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
    kept = log_odds(exponents.detach(), 0.1).sigmoid()
    torch.testing.assert_close(kept[[0, 1, -2, -1]], torch.tensor([0.9, 0.9, 0.1, 0.1]))
