"""Targets, costs, assignments and losses against loops over pairs and pixels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from detectron2.structures import Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.projects.knet import losses
from convmask.projects.knet.assignment import CostOptions, cost_matrix, solve
from convmask.projects.knet.targets import ImageTargets, make_targets, reduce_masks
from convmask.projects.knet.update_head import Round


@settings(deadline=None, max_examples=40)
@given(
    number=st.integers(0, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    stride=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_reduced_masks_are_those_of_interpolation(number: int, height: int, width: int, stride: int, seed: int) -> None:
    torch.manual_seed(seed)
    masks = torch.rand(number, height, width) > 0.5
    padded = -(-height // 32) * 32, -(-width // 32) * 32
    found = reduce_masks(masks, padded, stride)
    full = F.pad(masks.float(), (0, padded[1] - width, 0, padded[0] - height))
    size = padded[0] // stride, padded[1] // stride
    assert found.shape == (number, *size)
    if number:
        torch.testing.assert_close(found, F.interpolate(full[None], size=size, mode="bilinear")[0])


def test_targets_of_polygons_and_of_stuff() -> None:
    square = [torch.tensor([4.0, 4, 12, 4, 12, 12, 4, 12]).numpy()]
    instances = Instances((32, 32), gt_masks=PolygonMasks([square]), gt_classes=torch.tensor([3]))
    sem_seg = torch.zeros(32, 32, dtype=torch.int64)
    sem_seg[16:], sem_seg[24:, 16:] = 2, 255
    inputs = [{"image": torch.zeros(3, 32, 32), "instances": instances, "sem_seg": sem_seg}]
    (target,) = make_targets(inputs, (32, 32), 4, torch.device("cpu"), num_thing_classes=5, num_stuff_classes=2)
    assert target.classes.tolist() == [3] and target.stuff_classes.tolist() == [1]
    assert target.masks.sum() == 4 and (target.masks[0, 1:3, 1:3] == 1).all()
    assert target.stuff_masks.sum() == 8 * 4 - 2 * 4


def scalar_cost(
    logit: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, label: int, options: CostOptions
) -> float:
    p, t = logit.sigmoid().flatten().tolist(), mask.flatten().tolist()
    agreement = sum(a * b + (1 - a) * (1 - b) for a, b in zip(p, t, strict=True)) / len(p)
    squares = sum(a * a for a in p) + 1e-3 + sum(b * b for b in t) + 1e-3
    dice = 2 * sum(a * b for a, b in zip(p, t, strict=True)) / squares
    s = scores[label].sigmoid().item()
    positive = -math.log(s + 1e-12) * 0.25 * (1 - s) ** 2
    negative = -math.log(1 - s + 1e-12) * 0.75 * s**2
    return options.class_weight * (positive - negative) - options.mask_weight * agreement - options.dice_weight * dice


@pytest.mark.parametrize("objects", [0, 1, 3, 6])
def test_costs_pair_by_pair_and_the_best_assignment(objects: int) -> None:
    torch.manual_seed(objects)
    kernels, num_classes = 4, 3
    logits, scores = torch.randn(kernels, 5, 6).double(), torch.randn(kernels, num_classes).double()
    masks, classes = torch.rand(objects, 5, 6).double(), torch.randint(0, num_classes, (objects,))
    options = CostOptions(class_weight=2.0, mask_weight=1.5, dice_weight=3.0)
    cost = cost_matrix(logits, scores, masks, classes, options)
    for k, t in itertools.product(range(kernels), range(objects)):
        expected = scalar_cost(logits[k], scores[k], masks[t], int(classes[t]), options)
        assert cost[k, t].item() == pytest.approx(expected, rel=1e-9)
    (assigned,) = solve([cost])
    pairs = [(k, int(t)) for k, t in enumerate(assigned) if t >= 0]
    assert len(pairs) == min(kernels, objects) == len({t for _, t in pairs})
    total = sum(cost[k, t].item() for k, t in pairs)
    few, many = sorted((kernels, objects))
    square = cost if kernels <= objects else cost.T
    best = min(
        sum(square[i, j].item() for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(many), few)
    )
    assert total == pytest.approx(best)


def test_costs_that_are_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        solve([torch.zeros(2, 2), torch.tensor([[math.nan]])])


def random_case(seed: int) -> tuple[Round, list[ImageTargets], tuple[int, int]]:
    """Two images, 4 thing kernels and 3 thing classes, 2 stuff classes."""
    torch.manual_seed(seed)
    targets = []
    for objects, stuff in ((2, [0, 1]), (3, [1])):
        masks = (torch.rand(objects, 6, 8) * 4).floor() / 4
        masks[masks < 0.5] = 0
        stuff_masks = (torch.rand(len(stuff), 6, 8) > 0.5).float()
        targets.append(ImageTargets(masks, torch.randint(0, 3, (objects,)), stuff_masks, torch.tensor(stuff)))
    return Round(torch.randn(2, 6, 8), torch.randn(2, 6, 6, 8), torch.randn(2, 6, 5)), targets, (3, 2)


@pytest.mark.parametrize("seed", range(3))
def test_rank_and_dense_targets_pixel_by_pixel(seed: int) -> None:
    before, targets, counts = random_case(seed)
    assigned = losses.assign(before, targets, counts, CostOptions())
    dense = losses.seg_target(targets, assigned, counts, (6, 8))
    logits = torch.randn(2, 6, 6, 8)
    total = 0.0
    for image, target in enumerate(targets):
        order = assigned.assigned[image]
        for y, x in itertools.product(range(6), range(8)):
            owner, label = -1, 5
            for kernel, thing in enumerate(order.tolist()):
                if thing >= 0 and target.masks[thing, y, x] > 0:
                    owner, label = kernel, int(target.classes[thing])
            stuff_label = 5
            for mask, stuff in zip(target.stuff_masks, target.stuff_classes.tolist(), strict=True):
                if mask[y, x] > 0:
                    owner, stuff_label = 4 + stuff, 3 + stuff
            assert dense[image, y, x] == (label if label < 5 else stuff_label)
            if owner >= 0:
                total += -logits[image, :, y, x].log_softmax(0)[owner].item()
    found = losses.rank_loss(logits, assigned.positive, assigned.masks)
    assert found.item() == pytest.approx(total / (2 * 6 * 8), rel=1e-5)


def test_positives_and_their_masks_are_in_one_order() -> None:
    before, targets, counts = random_case(0)
    assigned = losses.assign(before, targets, counts, CostOptions())
    rows = assigned.positive.nonzero().tolist()
    assert len(rows) == len(assigned.masks) == 2 + 2 + 3 + 1
    for (image, kernel), mask in zip(rows, assigned.masks, strict=True):
        target = targets[image]
        if kernel < 4:
            expected = target.masks[assigned.assigned[image, kernel]]
            assert assigned.labels[image, kernel] == target.classes[assigned.assigned[image, kernel]]
        else:
            expected = target.stuff_masks[target.stuff_classes.tolist().index(kernel - 4)]
            assert assigned.labels[image, kernel] == 3 + kernel - 4
        assert torch.equal(mask, expected)


def test_class_weights() -> None:
    weights = losses.class_weights(5, (3, 2), torch.device("cpu"))
    assert weights.tolist() == [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_dice_loss_of_perfect_and_of_disjoint_masks() -> None:
    targets = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    logits = torch.where(targets > 0, 30.0, -30.0)
    torch.testing.assert_close(losses.dice_loss(logits, targets), torch.zeros(2), atol=2e-3, rtol=0)
    torch.testing.assert_close(losses.dice_loss(-logits, targets), torch.ones(2))
