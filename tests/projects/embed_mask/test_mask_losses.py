"""The mask and smooth losses, against loops over objects and the formulas as written, in double precision."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks, Instances
from torch.nn import functional as F

from convmask.losses import lovasz_hinge
from convmask.projects.embed_mask.losses import MaskLossOptions, mask_losses, object_proposals
from convmask.projects.embed_mask.targets import Positives, mask_targets

STRIDE = 4


@pytest.mark.parametrize("margins", [1, 3])
def test_an_object_is_the_mean_of_its_positives(margins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    proposals = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    spread = torch.rand(9, margins, generator=generator, dtype=torch.float64)
    positives = Positives(torch.tensor([0, 0, 0, 2, 3, 3]), torch.tensor([1, 4, 5, 0, 2, 8]))
    found = object_proposals(proposals, spread, positives)
    assert found.objects.tolist() == [0, 2, 3]
    expected = torch.zeros((), dtype=torch.float64)
    for row, own in enumerate(([1, 4, 5], [0], [2, 8])):
        torch.testing.assert_close(found.embeddings[row], proposals[own].mean(0))
        torch.testing.assert_close(found.margins[row], spread[own].mean(0))
        for vectors in (proposals[own], spread[own]):
            expected = expected + (vectors - vectors.mean(0)).square().sum()
    torch.testing.assert_close(found.deviations, expected)


@pytest.mark.parametrize("kind", ["lovasz", "bce"])
@pytest.mark.parametrize("padding", [0.1, -1.0])
@pytest.mark.parametrize("margins", [1, 3])
def test_the_mask_loss_of_each_object(kind: str, padding: float, margins: int) -> None:
    """Boxes of different sizes, one of them in the last column, of which the padded loss sees nothing."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 10, 12, generator=generator, dtype=torch.float64)
    centers = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    spread = 0.1 + torch.rand(4, margins, generator=generator, dtype=torch.float64)
    positives = Positives(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 3]))
    masks = torch.zeros(4, 38, 47, dtype=torch.bool)
    masks[0, 2:30, 3:20], masks[1, 0:9, 5:40], masks[2, 3:9, 3:9], masks[3, 20:22, 46:] = True, True, True, True
    instances = Instances((38, 47), gt_masks=BitMasks(masks))
    boxes = BitMasks(masks).get_bounding_boxes().tensor - torch.tensor([0.0, 0.0, 1.0, 1.0])
    options = MaskLossOptions(mask_loss=kind, box_padding=padding)
    found = mask_losses(pixels, object_proposals(centers, spread, positives), instances, boxes, STRIDE, options)
    targets = mask_targets(masks, (10, 12), STRIDE)
    expected = []
    for k in positives.objects.tolist():
        squares = (pixels - centers[k][:, None, None]).square()
        probability = torch.exp(-(spread[k].view(-1, 1, 1) * squares).sum(0))
        logits = probability.log() - (1 - probability).log()
        seen = torch.ones(10, 12, dtype=torch.bool)
        if padding >= 0:
            x1, y1, x2, y2 = (boxes[k].double() / STRIDE).tolist()
            right, below = padding * (x2 - x1) + 1, padding * (y2 - y1) + 1
            x, y = torch.arange(12), torch.arange(10)[:, None]
            seen = (x >= x1 - right) & (x < min(x2 + right, 11)) & (y >= y1 - below) & (y < min(y2 + below, 9))
        if not seen.any():
            expected.append(pixels.new_zeros(()))
        elif kind == "lovasz":
            expected.append(lovasz_hinge(logits[seen][None], targets[k][seen][None])[0])
        else:
            expected.append(F.binary_cross_entropy_with_logits(logits[seen], targets[k][seen].double()))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
