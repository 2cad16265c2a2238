from __future__ import annotations

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from convmask.losses import dice_loss, soft_focal_loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1.0, 0.0), (0.6, 1.5)])
def test_focal_loss_of_hard_targets_is_torchvisions(alpha: float, gamma: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 50), torch.randint(0, 2, (3, 50)).float()
    expected = sigmoid_focal_loss(logits, targets, alpha, gamma)
    torch.testing.assert_close(soft_focal_loss(logits, targets, alpha=alpha, gamma=gamma), expected)


def test_focal_loss_of_a_soft_target() -> None:
    logit, target = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.3, dtype=torch.float64)
    expected = torch.log(torch.tensor(2.0, dtype=torch.float64)) * 0.25 * (0.25 * 0.3 + 0.75 * 0.7)
    torch.testing.assert_close(soft_focal_loss(logit, target), expected[None])


def test_dice_loss_by_hand() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 1] = torch.tensor([50.0, 50.0, -50.0, -50.0])
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(dice_loss(logits, targets), torch.tensor([[1 - 2 * 1.0 / 3.0, 0.0]]))


def test_pixels_that_do_not_count() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 10), torch.rand(2, 10)
    valid = torch.ones(2, 10)
    valid[:, 6:] = 0
    torch.testing.assert_close(dice_loss(logits, targets, valid), dice_loss(logits[..., :6], targets[:, :6]))


def test_no_masks_and_empty_masks() -> None:
    assert dice_loss(torch.zeros(0, 7, 5), torch.zeros(0, 5)).shape == (0, 7)
    assert dice_loss(torch.full((1, 1, 5), -200.0), torch.zeros(1, 5)).item() == 1
