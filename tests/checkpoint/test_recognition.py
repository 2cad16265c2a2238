"""Files are recognised by their keys, unwrapped and converted; what has no place is reported."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from convmask.checkpoint import (
    Checkpointer,
    CheckpointError,
    read_checkpoint,
    recognise,
    register_converter,
    rename_keys,
)
from convmask.checkpoint.recognition import _CONVERTERS, State

from .models import Detector, equal_states, mxnet_bytes, randomise, resnet

WEIGHTS = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}


@pytest.fixture(autouse=True)
def own_converters() -> Iterator[None]:
    """Removes what a test registers."""
    before = dict(_CONVERTERS)
    yield
    _CONVERTERS.clear()
    _CONVERTERS.update(before)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "meta": {"CLASSES": ("a",)}},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"state": {}}},
        lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"ema_model": {name: value + 1 for name, value in state.items()}, "model": state, "iteration": 5},
        lambda state: {"model": {name: value.numpy() for name, value in state.items()}, "__author__": "zoo"},
        lambda state: {"model": {name: value.numpy().astype(">f4") for name, value in state.items()}},
        lambda state: {f"arg:{name}": value.numpy() for name, value in state.items()},
        lambda state: {**state, "epoch": 3},
    ],
)
def test_unwrapping(wrap: object) -> None:
    checkpoint = recognise(wrap(WEIGHTS), "f")  # type: ignore[operator]
    assert equal_states(checkpoint.state, WEIGHTS)
    assert not {"model", "state_dict"} & checkpoint.rest.keys()


def test_average_alone_is_taken_and_the_rest_is_kept() -> None:
    checkpoint = recognise({"ema_model": WEIGHTS, "iteration": 5}, "f")
    assert equal_states(checkpoint.state, WEIGHTS) and checkpoint.rest == {"iteration": 5}


def test_versions_of_modules_follow_their_names() -> None:
    state = OrderedDict((f"module.{name}", value) for name, value in WEIGHTS.items())
    state._metadata = {"": {"version": 1}, "module": {"version": 1}, "module.a": {"version": 2}}  # type: ignore[attr-defined]
    found = recognise({"model": state}, "f").state
    assert found._metadata == {"module": {"version": 1}, "a": {"version": 2}}  # type: ignore[attr-defined]


def test_files_without_weights() -> None:
    for contents in ({}, {"model": {}}, {"model": {"a": 1, 3: torch.ones(1)}}, {"epoch": 3}, {"model": 3}):
        with pytest.raises(CheckpointError, match=r"f\.pth: holds no weights"):
            recognise(contents, "f.pth")  # type: ignore[arg-type]


def test_entries_that_are_no_arrays_are_named() -> None:
    checkpoint = recognise({"model": {**WEIGHTS, "a._extra_state": {"x": 1}, "names": np.array(["s"])}}, "f")
    assert checkpoint.state.keys() == WEIGHTS.keys() and checkpoint.ignored == ["a._extra_state", "names"]


def test_registered_converter_comes_first_and_what_it_leaves_is_reported() -> None:
    @register_converter(
        "Some method", matches=lambda state: "conv1.weight" in state, hint="BGR", config=lambda _: "x.yaml"
    )
    def convert(state: State) -> State:
        state.pop("known.useless")
        return rename_keys(state, [(r"conv(\d)\.(.+)", r"layer.\1.\2")])

    weights = {"conv1.weight": torch.ones(1), "bn1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(1)}
    checkpoint = recognise({**weights, "known.useless": torch.ones(1), "other": torch.ones(1)}, "f")
    assert checkpoint.state.keys() == {"layer.1.weight"}
    assert checkpoint.unused == ["bn1.weight", "layer1.0.conv1.weight", "other"]
    assert (checkpoint.kind, checkpoint.hint, checkpoint.config) == ("Some method weights", "BGR", "x.yaml")
    with pytest.raises(ValueError, match="'Some method' exists"):
        register_converter("Some method", matches=lambda _: True)(convert)


def test_converter_that_fails_names_the_file() -> None:
    @register_converter("Fragile", matches=lambda state: "fragile" in state)
    def convert(state: State) -> State:
        return {"w": state["absent"]}

    with pytest.raises(CheckpointError, match=r"f: looks like Fragile, but cannot be converted: KeyError\('absent'\)"):
        recognise({"fragile": torch.ones(1)}, "f")


def test_renaming_two_entries_alike() -> None:
    with pytest.raises(ValueError, match="stand for c"):
        rename_keys({"a": torch.ones(1), "b": torch.ones(1)}, [("[ab]", "c")])


def test_torchvision_resnet_gives_torchvisions_features(tmp_path: Path) -> None:
    source = randomise(torchvision.models.resnet50(weights=None)).eval()
    torch.save(source.state_dict(), tmp_path / "r50.pth")
    model = resnet("BN", depth=(3, 4, 6, 3), width=64).eval()
    Checkpointer(model, policy="strict").load(str(tmp_path / "r50.pth"))
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model(image)
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        for index in range(1, 5):
            x = getattr(source, f"layer{index}")(x)
            assert (features[f"res{index + 1}"] - x).abs().max() <= 1e-4 * x.abs().max().clamp(min=1)


def test_torchvision_resnet_18_names() -> None:
    checkpoint = recognise(torchvision.models.resnet18(weights=None).state_dict(), "f")
    assert checkpoint.kind == "torchvision ResNet weights" and checkpoint.relative and not checkpoint.unused
    assert {
        "stem.conv1.norm.running_var",
        "res3.0.shortcut.norm.weight",
        "res5.1.conv2.weight",
    } <= checkpoint.state.keys()
    assert not any(name.startswith(("fc", "layer")) for name in checkpoint.state)


def test_torchvision_swin_keeps_its_names() -> None:
    source = torchvision.models.swin_t(weights=None).state_dict()
    checkpoint = recognise(dict(source), "f")
    kept = {name for name in source if not name.startswith(("head.", "norm."))}
    assert checkpoint.state.keys() == kept and not checkpoint.unused and "Swin" in checkpoint.kind
    assert checkpoint.relative


def to_caffe2(state: State) -> dict[str, np.ndarray]:
    """Detectron2's names of a ResNet as Caffe2 wrote them, batch norm folded into scale and bias."""
    renamed = {}
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        layer = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1").replace(".norm.", "_bn.")
        for ours, theirs in (
            ("shortcut", "branch1"),
            ("conv1", "branch2a"),
            ("conv2", "branch2b"),
            ("conv3", "branch2c"),
        ):
            layer = layer if "stem" in name else layer.replace(f".{ours}", f"_{theirs}")
        layer = layer.replace(".weight", "_s" if "norm" in name else "_w").replace(".bias", "_b").replace(".", "_")
        renamed[layer] = value.numpy()
    return renamed


@pytest.mark.parametrize("blobs", [True, False])
def test_caffe2_pickle(tmp_path: Path, blobs: bool) -> None:
    source = randomise(resnet("FrozenBN"))
    weights: dict[str, object] = {**to_caffe2(source.state_dict())}
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_bn_b", "res5_0_branch1_w"} <= weights.keys()
    weights |= {"conv1_w_momentum": np.ones(1), "fc1000_w": np.ones((10, 4)), "pred_b": np.ones(4), "lr": np.float32(1)}
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps({"blobs": weights, "cfg": "text"} if blobs else weights, protocol=2))
    model = Detector(norm="FrozenBN")
    Checkpointer(model).load(str(path))
    found = model.backbone.bottom_up.state_dict()
    for name, value in source.state_dict().items():
        if not name.endswith(("running_mean", "running_var")):
            assert torch.equal(found[name], value), name
    # the folded scale and bias act alone: mean 0, variance 1 (Detectron2 takes the epsilon off or not)
    assert found["stem.conv1.norm.running_mean"].abs().max() == 0
    assert (found["stem.conv1.norm.running_var"] - 1).abs().max() < 1e-4


def test_caffe2_affine_layers_do_not_fit_batch_norm(tmp_path: Path) -> None:
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps(to_caffe2(randomise(resnet("FrozenBN")).state_dict()), protocol=2))
    with pytest.raises(CheckpointError, match=r"(?s)another backbone.*conv1\.norm\.running_mean.*must be FrozenBN"):
        Checkpointer(Detector(norm="BN")).load(str(path))


def test_zoo_backbone_with_matching_heuristics(tmp_path: Path) -> None:
    source = randomise(resnet("BN")).state_dict()
    arrays = {name: value.numpy() for name, value in source.items()}
    path = tmp_path / "r.pkl"
    path.write_bytes(
        pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}, protocol=2)
    )
    model = Detector(norm="BN")
    rest = Checkpointer(model).load(str(path))
    assert equal_states(model.backbone.bottom_up.state_dict(), source) and rest == {"__author__": "torchvision"}
    # the same weights without the mark need the query that Detectron2 knows
    torch.save({"model": source}, tmp_path / "r.pth")
    model = Detector(norm="BN")
    Checkpointer(model).load(f"{tmp_path}/r.pth?matching_heuristics=True")
    assert equal_states(model.backbone.bottom_up.state_dict(), source)
    with pytest.raises(CheckpointError, match="nothing that fits"):
        Checkpointer(model).load(f"{tmp_path}/r.pth")


_TO_MXNET = {"running_mean": "moving_mean", "running_var": "moving_var", "weight": "gamma", "bias": "beta"}


def to_mxnet(state: State, caffe_names: bool) -> dict[str, np.ndarray]:
    """Detectron2's names of a ResNet as MXNet's two families of resnet_v1 have them."""
    renamed = {}
    branches = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        parts = name.split(".")
        norm = "norm" in parts
        kind = _TO_MXNET[parts[-1]] if norm else "weight"
        prefix = "aux:" if kind.startswith("moving") else "arg:"
        if parts[0] == "stem":
            layer = ("bn_conv1" if norm else "conv1") if caffe_names else ("bn0" if norm else "conv0")
        elif caffe_names:
            block = "a" if parts[1] == "0" else f"b{parts[1]}" if parts[0] == "res4" else "abcdef"[int(parts[1])]
            layer = f"{'bn' if norm else 'res'}{parts[0][-1]}{block}_{branches[parts[2]]}"
        else:
            layer = f"stage{int(parts[0][-1]) - 1}_unit{int(parts[1]) + 1}_"
            plain = {"shortcut": "sc" if norm else "conv1sc"}
            layer += plain.get(parts[2], parts[2].replace("conv", "bn") if norm else parts[2])
        renamed[f"{prefix}{layer}_{kind}"] = value.numpy()
    return renamed


@pytest.mark.parametrize("caffe_names", [True, False])
def test_mxnet_resnet(tmp_path: Path, caffe_names: bool) -> None:
    source = randomise(resnet("FrozenBN", depth=(1, 2, 3, 1), stride_in_1x1=True)).state_dict()
    arrays = to_mxnet(source, caffe_names)
    classifier = "fc1000" if caffe_names else "fc1"
    arrays |= {
        f"arg:{classifier}_weight": np.ones((10, 4), np.float32),
        f"arg:{classifier}_bias": np.ones(10, np.float32),
    }
    (tmp_path / "resnet-0000.params").write_bytes(mxnet_bytes(arrays))
    model = Detector(norm="FrozenBN", depth=(1, 2, 3, 1), stride_in_1x1=True)
    Checkpointer(model).load(str(tmp_path / "resnet-0000.params"))
    assert equal_states(model.backbone.bottom_up.state_dict(), source)
    assert "MXNet resnet_v1" in read_checkpoint(str(tmp_path / "resnet-0000.params")).kind


def test_mxnet_pre_activation_resnet_is_not_taken_for_resnet_v1() -> None:
    state = {"conv0_weight": torch.ones(1), "stage1_unit1_conv1_weight": torch.ones(1), "bn_data_gamma": torch.ones(1)}
    assert "MXNet" not in recognise(state, "f").kind
