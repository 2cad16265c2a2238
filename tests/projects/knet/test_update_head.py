"""The parts of a round against plain references, in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.projects.knet.products import assemble, cut_out
from convmask.projects.knet.update_head import KernelUpdateHead, KernelUpdator, Round, group_weights

sizes = st.integers(1, 7)


@settings(deadline=None, max_examples=30)
@given(images=st.integers(1, 3), kernels=sizes, channels=sizes, height=sizes, width=sizes, seed=st.integers(0, 1000))
def test_products(images: int, kernels: int, channels: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    # both forms
    channels *= 1 if seed % 2 else 50
    weights = torch.rand(images, kernels, height, width, dtype=torch.float64)
    features = torch.randn(images, channels, height, width, dtype=torch.float64)
    vectors = torch.randn(images, kernels, channels, dtype=torch.float64)
    group, logits = assemble(weights, features), cut_out(vectors, features)
    torch.testing.assert_close(group, torch.einsum("nqhw,nchw->nqc", weights, features))
    for image in range(images):
        convolved = F.conv2d(features[image : image + 1], vectors[image][:, :, None, None])[0]
        torch.testing.assert_close(logits[image], convolved)


def test_sums_are_in_single_precision_under_autocast() -> None:
    weights, features = torch.ones(1, 1, 64, 64), torch.full((1, 1, 64, 64), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assemble(weights, (features * 1.0078125).bfloat16())
    assert found.dtype == torch.float32 and found.item() == 4096 * 1.0078125


def updated(updator: KernelUpdator, group: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """One kernel of the updator's width, equation by equation."""
    half = updator.channels
    p, q = updator.dynamic_layer(group), updator.input_layer(kernel)
    gate = q[:half] * p[:half]
    gate_in = torch.sigmoid(updator.input_norm_in(updator.input_gate(gate)))
    gate_up = torch.sigmoid(updator.norm_in(updator.update_gate(gate)))
    out = gate_up * updator.norm_out(p[half:]) + gate_in * updator.input_norm_out(q[half:])
    return torch.relu(updator.fc_norm(updator.fc_layer(out)))


@pytest.mark.parametrize("pieces", [1, 2])
def test_updator_kernel_by_kernel(pieces: int) -> None:
    torch.manual_seed(0)
    updator = KernelUpdator(8).double()
    group, kernels = torch.randn(2, 3, 8 * pieces).double(), torch.randn(2, 3, 8 * pieces).double()
    found = updator(group, kernels)
    for image in range(2):
        for kernel in range(3):
            for part in range(pieces):
                cut = slice(8 * part, 8 * part + 8)
                expected = updated(updator, group[image, kernel, cut], kernels[image, kernel, cut])
                torch.testing.assert_close(found[image, kernel, cut], expected)


def test_without_gates_nothing_is_multiplied() -> None:
    updator = KernelUpdator(8, gates=False).double()
    group, kernels = torch.randn(1, 2, 8).double(), torch.randn(1, 2, 8).double()
    summed = updator.norm_out(updator.dynamic_layer(group)) + updator.input_norm_out(updator.input_layer(kernels))
    torch.testing.assert_close(updator(group, kernels), torch.relu(updator.fc_norm(updator.fc_layer(summed))))


def test_group_weights() -> None:
    logits = torch.tensor([-1.0, 0.0, 1e-6, 3.0]).reshape(1, 1, 2, 2)
    assert group_weights(logits, "hard").flatten().tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(group_weights(logits, "soft"), logits.sigmoid())
    assert group_weights(logits, "none").flatten().tolist() == [0.25] * 4
    several = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(group_weights(several, "softmax").sum(dim=1), torch.ones(2, 3, 3))


def test_a_round_resizes_masks_of_another_size() -> None:
    update = KernelUpdateHead(channels=8, num_classes=3, num_heads=2, ffn_channels=16).eval()
    features, kernels = torch.randn(1, 8, 6, 10), torch.randn(1, 4, 8)
    masks = torch.randn(1, 4, 3, 5)
    resized = F.interpolate(masks, size=(6, 10), mode="bilinear", align_corners=False)
    for found, expected in zip(
        update(features, Round(kernels, masks)), update(features, Round(kernels, resized)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_round_does_not_depend_on_the_order_of_kernels() -> None:
    update = KernelUpdateHead(channels=8, num_classes=3, num_heads=2, ffn_channels=16).eval()
    features, before = torch.randn(1, 8, 6, 6), Round(torch.randn(1, 5, 8), torch.randn(1, 5, 6, 6))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = update(features, Round(before.kernels[:, order], before.mask_logits[:, order]))
    for found, expected in zip(shuffled, update(features, before), strict=True):
        torch.testing.assert_close(found, expected[:, order], rtol=1e-4, atol=1e-5)


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        KernelUpdateHead(channels=8, num_heads=3)
    with pytest.raises(ValueError, match="6 channels of the kernel updator"):
        KernelUpdateHead(channels=8, num_heads=2, updator_channels=6)
