from __future__ import annotations

import pytest
import torch

from convmask.losses import lovasz_hinge


def by_definition(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One mask, with loops: errors from the largest, each times what the Jaccard loss gains."""
    errors = [1 - z * (1 if y else -1) for z, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    total, before = 0.0, 0.0
    foreground = int(targets.sum())
    hit, extra = foreground, 0
    for i in order:
        hit, extra = (hit - 1, extra) if targets[i] else (hit, extra + 1)
        jaccard = 1 - hit / (foreground + extra)
        total += max(errors[i], 0) * (jaccard - before)
        before = jaccard
    return torch.tensor(total, dtype=logits.dtype)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_the_definition(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, 30, generator=generator, dtype=torch.float64)
    targets = torch.rand(5, 30, generator=generator) < share
    expected = torch.stack([by_definition(z, y) for z, y in zip(logits, targets, strict=True)])
    torch.testing.assert_close(lovasz_hinge(logits, targets), expected, rtol=1e-12, atol=1e-12)


def test_pixels_that_do_not_count() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 12, generator=generator, requires_grad=True)
    targets = torch.rand(2, 12, generator=generator) < 0.5
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 7:], valid[1] = False, False
    found = lovasz_hinge(logits, targets, valid)
    torch.testing.assert_close(found[:1], lovasz_hinge(logits[:1, :7], targets[:1, :7]))
    assert found[1] == 0
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~valid].any()


def test_a_perfect_mask_and_none() -> None:
    targets = torch.tensor([[True, False, True]])
    assert lovasz_hinge(torch.tensor([[5.0, -5.0, 1.0]]), targets).item() == 0
    assert lovasz_hinge(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).tolist() == [0, 0]
