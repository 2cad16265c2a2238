from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.layers import SemanticFPN


def shapes(first: int, last: int, channels: int = 8) -> dict[str, ShapeSpec]:
    return {f"p{level}": ShapeSpec(channels=channels, stride=2**level) for level in range(first, last + 1)}


def random_features(
    input_shape: dict[str, ShapeSpec], height: int, width: int, batch: int = 2
) -> dict[str, torch.Tensor]:
    """Sizes rounded up, as strided convolutions give them."""
    return {
        name: torch.randn(batch, s.channels, -(-height // s.stride), -(-width // s.stride))
        for name, s in input_shape.items()
    }


def test_default_has_detectron2s_parameters_and_output() -> None:
    input_shape = shapes(2, 5)
    torch.manual_seed(0)
    theirs = SemSegFPNHead(input_shape, num_classes=3, conv_dims=32, common_stride=4, norm="GN")
    torch.manual_seed(0)
    ours = SemanticFPN(input_shape, conv_dims=32)
    expected = {name: value for name, value in theirs.state_dict().items() if not name.startswith("predictor")}
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    features = random_features(input_shape, 64, 96)
    torch.testing.assert_close(theirs.predictor(ours(features)), theirs.layers(features), rtol=0, atol=0)


@settings(max_examples=15, deadline=None)
@given(
    first=st.integers(2, 4),
    levels=st.integers(1, 4),
    common=st.sampled_from([4, 8]),
    aggregation=st.sampled_from(["sum", "concat"]),
    convs=st.integers(1, 2),
    norm=st.sampled_from(["GN", "BN", ""]),
    height=st.integers(33, 140),
    width=st.integers(33, 140),
)
def test_any_pyramid_gives_the_common_stride(
    first: int, levels: int, common: int, aggregation: str, convs: int, norm: str, height: int, width: int
) -> None:
    input_shape = shapes(first, first + levels - 1)
    branch = SemanticFPN(
        input_shape, conv_dims=64, common_stride=common, norm=norm, aggregation=aggregation, convs_per_stage=convs
    ).eval()
    features = random_features(input_shape, height, width, batch=1)
    out = branch(features)
    finest = features[f"p{first}"].shape[-2:]
    if 2**first >= common:
        expected = tuple(size * 2**first // common for size in finest)
    else:
        expected = tuple(-(-size // (common // 2**first)) for size in finest)
    assert out.shape == (1, branch.out_channels, *expected)
    assert branch.out_channels == 64 * (levels if aggregation == "concat" else 1)
    biases = [name for name, _ in branch.named_parameters() if name.endswith(".bias") and "norm" not in name]
    assert bool(biases) == (norm == "")


def test_two_convolutions_per_stage() -> None:
    one, two = (SemanticFPN(shapes(2, 5), conv_dims=32, convs_per_stage=n) for n in (1, 2))
    added = sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in one.parameters())
    # one 3x3 convolution of 32 channels and its norm more in each of the 1 + 1 + 2 + 3 stages
    assert added == 7 * (32 * 32 * 9 + 2 * 32)
    for upsampled in (one, two):
        kinds = [type(layer).__name__ for layer in upsampled.p4]
        assert kinds.count("Upsample") == 2
    assert [type(layer).__name__ for layer in two.p3] == ["Conv2d", "Conv2d", "Upsample"]


def test_levels_finer_and_coarser_than_the_common_stride() -> None:
    # K-Net's localisation FPN: stride 8, a last convolution after the upsampling
    branch = SemanticFPN(shapes(2, 5), conv_dims=32, common_stride=8, conv_after_upsampling=True)
    convs = {name: sum(type(x).__name__ == "Conv2d" for x in branch.get_submodule(name)) for name in branch.in_features}
    assert convs == {"p2": 1, "p3": 1, "p4": 2, "p5": 3}
    assert branch.p2[0].stride == (2, 2)
    assert branch(random_features(shapes(2, 5), 64, 64)).shape == (2, 32, 8, 8)


def test_concatenation_keeps_the_levels_apart() -> None:
    input_shape = shapes(2, 3)
    branch = SemanticFPN(input_shape, conv_dims=32, aggregation="concat").eval()
    features = random_features(input_shape, 32, 32)
    before = branch(features)
    features["p3"] = features["p3"] + 1
    after = branch(features)
    torch.testing.assert_close(before[:, :32], after[:, :32], rtol=0, atol=0)
    assert not torch.allclose(before[:, 32:], after[:, 32:])


def test_gradients_reach_every_parameter() -> None:
    branch = SemanticFPN(shapes(3, 7), conv_dims=32, convs_per_stage=2)
    # sizes that are no multiples of the largest stride: coarse levels are cut
    branch(random_features(shapes(3, 7), 100, 168)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": {}}, "no input feature"),
        ({"aggregation": "mean"}, "'mean' is not one of sum, concat"),
        ({"convs_per_stage": 0}, r"convs_per_stage \(0\)"),
        ({"input_shape": {"p2": ShapeSpec(channels=8, stride=6)}}, r"stride of p2 \(6\)"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticFPN(**{"input_shape": shapes(2, 5), **arguments})
