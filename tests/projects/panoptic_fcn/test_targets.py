"""Targets against loops over instances that follow the release's rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.projects.panoptic_fcn.resize import reduce_labels, reduce_masks
from convmask.projects.panoptic_fcn.targets import TargetOptions, Targets, gaussian_radius, make_targets

SCALES = ((1, 32), (16, 64), (32, 2048))
OPTIONS = TargetOptions(num_classes=5, num_regions=4, scales=SCALES)


def targets_of(inputs: list[dict[str, Any]], padded: tuple[int, int], options: TargetOptions = OPTIONS) -> Targets:
    return make_targets(
        [x["instances"] for x in inputs],
        [x["sem_seg"] for x in inputs],
        padded=padded,
        common=(padded[0] // 4, padded[1] // 4),
        levels=[(padded[0] // stride, padded[1] // stride) for stride in (8, 16, 32)],
        options=options,
    )


def plain_centers(
    inputs: list[dict[str, Any]], padded: tuple[int, int], size: tuple[int, int], level: int
) -> np.ndarray:
    """The release's Gaussians, one instance and one pixel after the other."""
    result = np.zeros((len(inputs), 5, *size), np.float32)
    least, greatest = SCALES[level]
    for image, x in enumerate(inputs):
        instances = x["instances"]
        height, width = instances.image_size
        for index in range(len(instances)):
            mask = instances.gt_masks.tensor[index][None, None].float()
            reduced = F.interpolate(mask, size=(int(height / 4 + 0.5), int(width / 4 + 0.5)), mode="bilinear")[0, 0]
            rows, columns = (reduced > 0).nonzero(as_tuple=True)
            box = instances.gt_boxes.tensor[index].tolist()
            w, h = box[2] - box[0], box[3] - box[1]
            if not len(rows) or not least <= math.sqrt(w * h) <= greatest:
                continue
            cy = int(rows.double().mean() * size[0] / (padded[0] // 4))
            cx = int(columns.double().mean() * size[1] / (padded[1] // 4))
            s, p = w * size[1] / padded[1] + h * size[0] / padded[0], w * h * size[0] * size[1] / padded[0] / padded[1]
            radius = max(int((math.sqrt((1.4 * s) ** 2 + 16 * 0.7 * 0.3 * p) - 1.4 * s) / 2), 0)
            sigma = (2 * radius + 1) / 3
            for y in range(max(cy - radius, 0), min(cy + radius + 1, size[0])):
                for z in range(max(cx - radius, 0), min(cx + radius + 1, size[1])):
                    value = math.exp(-((y - cy) ** 2 + (z - cx) ** 2) / (2 * sigma**2))
                    cell = result[image, int(instances.gt_classes[index])]
                    cell[y, z] = max(cell[y, z], value)
    return result


@given(size=st.tuples(st.integers(41, 90), st.integers(41, 90)), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_centers_are_the_releases(size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = []
    for count in (4, 0, 7):
        masks = torch.zeros(count, *size, dtype=torch.bool)
        for mask in masks:
            y, x = int(torch.randint(0, size[0] - 4, ())), int(torch.randint(0, size[1] - 4, ()))
            mask[y : y + int(torch.randint(2, 80, ())), x : x + int(torch.randint(2, 80, ()))] = True
        instances = Instances(size, gt_masks=BitMasks(masks), gt_boxes=BitMasks(masks).get_bounding_boxes())
        instances.gt_classes = torch.randint(0, 5, (count,))
        inputs.append({"instances": instances, "sem_seg": torch.zeros(size, dtype=torch.int64)})
    padded = (96, 96)
    targets = targets_of(inputs, padded)
    for level, found in enumerate(targets.centers):
        expected = plain_centers(inputs, padded, (found.shape[2], found.shape[3]), level)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)), reduced=st.tuples(st.integers(1, 20), st.integers(1, 20))
)
@settings(max_examples=25, deadline=None)
def test_reduction_is_interpolation(size: tuple[int, int], reduced: tuple[int, int]) -> None:
    torch.manual_seed(0)
    masks = torch.rand(3, *size) > 0.5
    expected = F.interpolate(masks[None].float(), size=reduced, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(reduce_masks(masks, *reduced), expected, atol=1e-5, rtol=0)
    labels = torch.randint(0, 4, size)
    one_hot = F.one_hot(labels, 4).permute(2, 0, 1)[None].float()
    expected = F.interpolate(one_hot, size=reduced, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(reduce_labels(labels, *reduced, num_labels=3), expected, atol=1e-5, rtol=0)


def test_radius_of_squares() -> None:
    sides = torch.tensor([[1.0, 1.0], [10.0, 10.0], [40.0, 40.0], [0.0, 0.0]])
    assert gaussian_radius(sides, 0.7).tolist() == [int(0.2733 * a) for a in (1, 10, 40, 0)]


def test_regions_and_unlabelled_pixels(random_inputs: Callable[..., Any]) -> None:
    inputs = random_inputs((1,))
    targets = targets_of(inputs, (64, 96))
    sem_seg = inputs[0]["sem_seg"]
    one_hot = F.one_hot(sem_seg.clamp(max=4), 5)[..., :4].permute(2, 0, 1)[None].float()
    expected = F.interpolate(one_hot, size=(16, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(targets.semantic, F.pad(expected, (0, 4)), atol=1e-5, rtol=0)
    for found in targets.regions:
        shares = F.interpolate(targets.semantic, size=found.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(found, torch.where(shares >= 0.5, shares, 0.0))
    assert targets.valid is None
    ignoring = targets_of(inputs, (64, 96), TargetOptions(5, 4, scales=SCALES, ignored_as_negative=False))
    assert ignoring.valid is not None
    assert not ignoring.valid[:, :, 20:].any()
    torch.testing.assert_close(ignoring.valid, ignoring.semantic.sum(dim=1))


def test_regions_without_things(random_inputs: Callable[..., Any]) -> None:
    inputs = random_inputs((1,))
    every = targets_of(inputs, (64, 96))
    stuff = targets_of(inputs, (64, 96), TargetOptions(5, 3, with_things=False, scales=SCALES))
    torch.testing.assert_close(stuff.semantic, every.semantic[:, 1:])


def test_centers_of_boxes(random_inputs: Callable[..., Any]) -> None:
    inputs = random_inputs((3,))
    targets = targets_of(inputs, (64, 96), TargetOptions(5, 4, center="box", scales=SCALES))
    boxes: Boxes = inputs[0]["instances"].gt_boxes
    torch.testing.assert_close(targets.objects.points, boxes.get_centers() / 4)


def test_an_instance_that_vanishes_has_no_target(random_inputs: Callable[..., Any]) -> None:
    """The release draws it into the corner at (0, 0)."""
    inputs = random_inputs((1,))
    masks = inputs[0]["instances"].gt_masks.tensor
    masks[:] = False
    # bilinear reduction by 4 reads the pixels 1 and 2 of each 4
    masks[0, 32, 32] = True
    inputs[0]["instances"].gt_boxes = Boxes(torch.tensor([[32.0, 32.0, 33.0, 33.0]]))
    targets = targets_of(inputs, (64, 96))
    assert len(targets.objects.classes) == 0
    assert not any(x.any() for x in targets.centers)


def test_more_instances_than_the_release_takes(random_inputs: Callable[..., Any]) -> None:
    inputs = random_inputs((150,))
    targets = targets_of(inputs, (64, 96))
    assert len(targets.objects.classes) == 150
    assert sum(len(x) for x in targets.members) >= 150


@pytest.mark.parametrize(("key", "message"), [("instances", "NUM_CLASSES is 5"), ("sem_seg", "STUFF.NUM_CLASSES is 4")])
def test_labels_out_of_range_are_named(random_inputs: Callable[..., Any], key: str, message: str) -> None:
    inputs = random_inputs((2,))
    if key == "instances":
        inputs[0]["instances"].gt_classes[1] = 5
    else:
        inputs[0]["sem_seg"][20, 20] = 9
    with pytest.raises(ValueError, match=message):
        targets_of(inputs, (64, 96))
