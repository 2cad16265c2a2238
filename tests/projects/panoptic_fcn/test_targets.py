"""Targets against a plain implementation that follows the release: ``benchmarks/panoptic_fcn_release_targets.py``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.projects.panoptic_fcn.resize import add_labels, paste_rows, reduce_rows
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


@pytest.fixture(scope="module")
def release(repository: Path) -> ModuleType:
    """The plain implementation, which is no part of a package."""
    path = repository / "benchmarks" / "panoptic_fcn_release_targets.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # where dataclasses look for the annotations
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@given(
    sizes=st.lists(st.tuples(st.integers(41, 96), st.integers(41, 96)), min_size=1, max_size=3),
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_targets_are_the_releases(
    release: ModuleType, sizes: list[tuple[int, int]], counts: list[int], seed: int
) -> None:
    """Batches of images of several sizes, with and without instances. No mask vanishes, no centre is beyond its level:
    there the release differs, as its own tests below say."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [random_image(size, count, generator) for size, count in zip(sizes, counts, strict=False)]
    padded, common = (96, 96), (24, 24)
    found = targets_of(inputs, padded)
    plain = release.ReleaseTargets(num_classes=5, num_regions=4, scales=SCALES).batch(
        [x["instances"] for x in inputs],
        [x["sem_seg"] for x in inputs],
        padded=padded,
        common=common,
        levels=[(x.shape[2], x.shape[3]) for x in found.centers],
    )
    for index, image in enumerate(plain):
        for level, expected in enumerate(image):
            close = {"atol": 1e-5, "rtol": 0}
            torch.testing.assert_close(found.centers[level][index], expected.centers, **close)
            torch.testing.assert_close(found.regions[level][index], expected.regions, **close)
            member = found.members[level]
            member = member[found.objects.images[member] == index]
            assert torch.equal(found.objects.classes[member], expected.classes[expected.valid])
            torch.testing.assert_close(found.objects.masks[member], expected.masks[expected.valid], **close)
            present = (expected.regions > 0).flatten(1).any(dim=1)
            torch.testing.assert_close(
                found.semantic[index, present], expected.region_shares[expected.region_valid], **close
            )


def random_image(size: tuple[int, int], count: int, generator: torch.Generator) -> dict[str, Any]:
    """Boxes with holes, and patches of labels, some without one."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    masks = torch.zeros(count, *size, dtype=torch.bool)
    for mask in masks:
        y, x = draw(0, size[0] - 4), draw(0, size[1] - 4)
        window = mask[y : y + draw(4, 80), x : x + draw(4, 80)]
        window |= torch.rand(window.shape, generator=generator) < 0.9
        window[:4, :4] = True
    instances = Instances(size, gt_masks=BitMasks(masks), gt_boxes=BitMasks(masks).get_bounding_boxes())
    instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
    # label 3 never occurs
    sem_seg = torch.randint(0, 4, (size[0] // 9 + 1, size[1] // 9 + 1), generator=generator)
    sem_seg[sem_seg == 3] = 255
    sem_seg = sem_seg.repeat_interleave(9, 0).repeat_interleave(9, 1)[: size[0], : size[1]]
    return {"instances": instances, "sem_seg": sem_seg.contiguous()}


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)), reduced=st.tuples(st.integers(1, 20), st.integers(1, 20))
)
@settings(max_examples=25, deadline=None)
def test_reduction_is_interpolation(size: tuple[int, int], reduced: tuple[int, int]) -> None:
    torch.manual_seed(0)
    masks = torch.rand(3, *size) > 0.5
    expected = F.interpolate(masks[None].float(), size=reduced, mode="bilinear", align_corners=False)[0]
    masks[2] = False
    expected[2] = 0
    found = torch.zeros(3, reduced[0] + 2, reduced[1] + 1)
    paste_rows(reduce_rows(masks, *reduced), found)
    torch.testing.assert_close(found, F.pad(expected, (0, 1, 0, 2)), atol=1e-5, rtol=0)
    labels = torch.randint(0, 4, size)
    one_hot = F.one_hot(labels, 4).permute(2, 0, 1)[None].float()
    expected = F.interpolate(one_hot, size=reduced, mode="bilinear", align_corners=False)[0]
    found = torch.zeros(3, reduced[0] + 2, reduced[1] + 1)
    add_labels(labels - 1, *reduced, found)
    torch.testing.assert_close(found, F.pad(expected[1:], (0, 1, 0, 2)), atol=1e-5, rtol=0)


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
