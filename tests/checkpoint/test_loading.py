"""Every format is read; nothing in a file is executed; every bad file gives one CheckpointError that names it."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convmask.checkpoint import CheckpointError, load_file

from .models import mxnet_bytes

ARRAYS = {
    "weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "steps": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "flags": np.array([True, False]),
    "bytes": np.arange(256, dtype=np.uint8),
}
MXNET_ARRAYS = {"arg:w": ARRAYS["weight"], "aux:b": ARRAYS["bytes"], "arg:d": ARRAYS["fortran"]}


class Attack:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def torch_bytes(value: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def safetensors_bytes() -> bytes:
    safetensors = pytest.importorskip("safetensors.torch", reason="the optional package safetensors is not installed")
    return safetensors.save({"weight": torch.arange(6.0).reshape(2, 3)})


def npz_bytes(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def example(kind: str) -> bytes:
    tensors = {"model": OrderedDict(weight=torch.arange(6.0).reshape(2, 3)), "iteration": 3}
    makers = {
        "zip.pth": lambda: torch_bytes(tensors),
        "legacy.pth": lambda: torch_bytes(tensors, zipped=False),
        "zoo.pkl": lambda: pickle.dumps({"model": ARRAYS, "__author__": "zoo"}, protocol=2),
        "new.pkl": lambda: pickle.dumps({"model": ARRAYS}, protocol=5),
        "a.npz": lambda: npz_bytes(weight=ARRAYS["weight"]),
        "a.params": lambda: mxnet_bytes(MXNET_ARRAYS),
        "a.safetensors": safetensors_bytes,
    }
    return makers[kind]()


KINDS = ["zip.pth", "legacy.pth", "zoo.pkl", "new.pkl", "a.npz", "a.params", "a.safetensors"]


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_of_arrays(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "a.pkl", pickle.dumps({"model": OrderedDict(ARRAYS), "scale": np.float32(2)}, protocol))
    loaded = load_file(path)
    assert loaded["scale"] == 2 and list(loaded["model"]) == list(ARRAYS)
    for name, array in ARRAYS.items():
        found = loaded["model"][name]
        assert found.dtype == array.dtype and found.flags.writeable
        np.testing.assert_array_equal(found, array)


def test_zoo_pickle_of_python_2_and_old_numpy(tmp_path: Path) -> None:
    # strings of Python 2 hold the bytes; numpy.core is the module's name before numpy 2
    array = np.array([[1.5, -2.25]], dtype=">f4")
    data = array.tobytes()
    opcodes = (
        b"\x80\x02}q\x01U\x05blobsq\x02}q\x03U\x07conv1_wq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
        b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87R(K\x01K\x01K\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(data)]) + data + b"tbss."
    )
    loaded = load_file(write(tmp_path / "old.pkl", opcodes))["blobs"]["conv1_w"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, [[1.5, -2.25]])


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_with_training_state(tmp_path: Path, zipped: bool) -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    extra = {
        "milestones": Counter([3, 3]),
        "rng": np.arange(5, dtype=np.uint32),
        "best": np.float64(0.5),
        "nested": [(1, None)],
    }
    data = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra}
    loaded = load_file(write(tmp_path / "a.pth", torch_bytes(data, zipped)))
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert loaded["model"]._metadata[""] == {"version": 1}
    assert torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], model.weight.grad)
    assert loaded["milestones"] == Counter([3, 3]) and loaded["best"] == 0.5 and loaded["nested"] == [(1, None)]
    np.testing.assert_array_equal(loaded["rng"], extra["rng"])


def test_npz_and_safetensors(tmp_path: Path) -> None:
    loaded = load_file(write(tmp_path / "a.npz", npz_bytes(**ARRAYS)))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
    tensors = load_file(write(tmp_path / "a.safetensors", safetensors_bytes()))
    assert torch.equal(tensors["weight"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_mxnet(tmp_path: Path, version: int) -> None:
    loaded = load_file(write(tmp_path / "a-0000.params", mxnet_bytes(MXNET_ARRAYS, version)))
    assert loaded.keys() == MXNET_ARRAYS.keys()
    for name, array in MXNET_ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_mxnet_bfloat16_and_scalar(tmp_path: Path) -> None:
    header = struct.pack("<QQQ", 0x112, 0, 2)
    bfloat16 = struct.pack("<Iiiqiii", 0xF993FAC9, 0, 1, 2, 1, 0, 12) + struct.pack("<HH", 0x3FC0, 0xC000)
    scalar = struct.pack("<Iiiiii", 0xF993FACA, 0, 0, 1, 0, 0) + struct.pack("<f", 0.25)
    names = struct.pack("<QQ1sQ1s", 2, 1, b"a", 1, b"b")
    loaded = load_file(write(tmp_path / "a.params", header + bfloat16 + scalar + names))
    np.testing.assert_array_equal(loaded["a"], np.array([1.5, -2.0], np.float32))
    assert loaded["b"].shape == () and loaded["b"] == 0.25


@pytest.mark.parametrize("extension", ["pkl", "pth"])
@pytest.mark.parametrize("zipped", [None, True, False])
def test_code_is_refused(tmp_path: Path, extension: str, zipped: bool | None) -> None:
    marker = tmp_path / "executed"
    for value in ({"model": Attack(marker)}, [Attack(marker)], Attack(marker)):
        data = pickle.dumps(value) if zipped is None else torch_bytes(value, zipped)
        path = write(tmp_path / f"a.{extension}", data)
        with pytest.raises(CheckpointError, match=r"a\.\w+: .*(posix|nt)\.system"):
            load_file(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "builtins\ngetattr", "numpy\nload", "torch.storage\n_load_from_bytes", "numpy\nndarray.tofile"],
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="names"):
        load_file(write(tmp_path / "a.pkl", b"\x80\x02c" + name.encode() + b"\nU\x03abc\x85R."))


def test_what_others_declared_safe_is_not_admitted(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Path])
    try:
        declared = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match="pathlib"):
            load_file(write(tmp_path / "a.pth", torch_bytes({"model": {}, "where": Path("a")})))
        assert set(torch.serialization.get_safe_globals()) == declared
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_legacy_files_are_not_tried_as_tar_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch does so for real files before it reads them as legacy ones, and unpacks what the archive holds
    opened = []

    def refuse(*arguments: Any, **_: Any) -> None:
        opened.append(arguments)
        raise tarfile.TarError

    path = write(tmp_path / "a.pth", example("legacy.pth"))
    monkeypatch.setattr(tarfile, "open", refuse)
    torch.load(path, weights_only=True)
    tried_by_torch = len(opened)
    assert load_file(path)["iteration"] == 3
    assert len(opened) == tried_by_torch


def test_huge_declarations_take_no_memory(tmp_path: Path) -> None:
    huge = 1 << 50
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    number = b"\x8a\x08" + struct.pack("<q", huge)
    pickles = {
        "shape in the call": b"\x80\x02}U\x01w" + reconstruct + number + b"\x85U\x01b\x87Rs.",
        "shape in the state": b"\x80\x02}U\x01w"
        + reconstruct
        + b"K\x00\x85U\x01b\x87R(K\x01"
        + number
        + b"\x85"
        + dtype
        + b"\x89U\x04aaaatbs.",
        "bytes": b"\x80\x02}U\x01wcbuiltins\nbytes\n" + number + b"\x85Rs.",
        "memo": b"\x80\x02}r\xff\xff\xff\xfe.",
        "length": b"\x80\x04\x8e" + struct.pack("<Q", huge) + b"a.",
    }
    header = struct.pack("<QQQ", 0x112, 0, 1)
    params = {
        "count": struct.pack("<QQQ", 0x112, 0, huge),
        "array": header + struct.pack("<Iiiqqiii", 0xF993FAC9, 0, 2, huge, huge, 1, 0, 0),
        "dimensions": header + struct.pack("<Iii", 0xF993FAC9, 0, 1 << 30),
        "negative": header + struct.pack("<Iiiqiii", 0xF993FAC9, 0, 1, -5, 1, 0, 0),
        "sparse": header + struct.pack("<Ii", 0xF993FAC9, 2) + bytes(64),
        "dtype": header + struct.pack("<Iiiqiii", 0xF993FAC9, 0, 1, 1, 1, 0, 77) + bytes(64),
    }
    files = [(f"{name}.pkl", data) for name, data in pickles.items()]
    files += [(f"{name}.params", data) for name, data in params.items()]
    files.append(("view.pth", torch_bytes({"model": {"w": torch.zeros(1).expand(1 << 20, 1 << 20)}})))
    files.append(("meta.pth", torch_bytes({"model": {"w": torch.zeros(1 << 20, 1 << 20, device="meta")}})))
    for name, data in files:
        with pytest.raises(CheckpointError, match=name):
            load_file(write(tmp_path / name, data))


def test_archives_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convmask.checkpoint.loading._HARMLESS_SIZE", 1 << 16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, w=np.zeros(1 << 20, np.float32))
    with pytest.raises(CheckpointError, match="unpack"):
        load_file(write(tmp_path / "a.npz", buffer.getvalue()))


def test_repeated_data_is_bounded(tmp_path: Path) -> None:
    # one string of a megabyte, encoded and used as an array again and again
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    repeated = b"\x80\x02(" + text + b"q\x010" + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 100 + b"l."
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_file(write(tmp_path / "a.pkl", repeated))


def test_nested_containers_and_cycles(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nested"):
        load_file(write(tmp_path / "deep.pkl", b"\x80\x02}U\x01w" + b"]" * 100_000 + b"a" * 99_999 + b"s."))
    doubling: list[Any] = []
    for _ in range(64):
        doubling = [doubling, doubling]
    cycle: dict[str, Any] = {"a": doubling}
    cycle["self"] = cycle
    loaded = load_file(write(tmp_path / "cycle.pkl", pickle.dumps(cycle)))
    assert loaded["self"] is loaded


class Disguised:
    """Pickles as an OrderedDict whose methods are hidden by attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ([("w", 1.5)],), {"items": "no method", "keys": 3, "_metadata": {"": {"version": 2}}}


@pytest.mark.parametrize("extension", ["pkl", "pth"])
def test_methods_of_an_ordered_dict_cannot_be_replaced(tmp_path: Path, extension: str) -> None:
    value = {"model": Disguised()}
    path = write(tmp_path / "a.pth", pickle.dumps(value) if extension == "pkl" else torch_bytes(value))
    assert list(load_file(path)["model"].items()) == [("w", 1.5)]


@pytest.mark.parametrize("kind", KINDS)
def test_truncation(tmp_path: Path, kind: str) -> None:
    data = example(kind)
    assert load_file(write(tmp_path / kind, data))
    lengths = {*range(0, min(len(data), 80)), *range(0, len(data), max(1, len(data) // 60)), len(data) - 1}
    for length in sorted(lengths):
        with pytest.raises(CheckpointError, match=kind):
            load_file(write(tmp_path / kind, data[:length]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(example(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = load_file(write(tmp_path / kind, bytes(content)))
    except CheckpointError as error:
        assert kind in str(error)
    else:
        # a flipped bit of a weight goes unnoticed
        assert isinstance(loaded, dict)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from(
        [b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", struct.pack("<QQ", 0x112, 0), b"\x10" + bytes(7) + b"{"]
    ),
    content=st.binary(max_size=300),
    extension=st.sampled_from(["pth", "pkl", "npz", "params", "safetensors"]),
)
def test_random_bytes(tmp_path: Path, prefix: bytes, content: bytes, extension: str) -> None:
    try:
        assert isinstance(load_file(write(tmp_path / f"a.{extension}", prefix + content)), dict)
    except CheckpointError as error:
        assert f"a.{extension}" in str(error)


def test_messages_name_the_reason(tmp_path: Path) -> None:
    cases = {
        "empty.pth": (b"", "is empty"),
        "page.pkl.pth": (b"\n<!DOCTYPE html><html>404", "web page"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "text.pth": (b"hello, this is text", "no known checkpoint format"),
        "list.pkl": (pickle.dumps([1, 2]), "list, not a dictionary"),
        "object.npz": (npz_bytes(a=np.array([None])), "allow_pickle=False"),
    }
    for name, (data, reason) in cases.items():
        with pytest.raises(CheckpointError, match=f"{name}: .*{reason}"):
            load_file(write(tmp_path / name, data))
    with pytest.raises(CheckpointError, match=r"absent\.pth: there is no such file"):
        load_file(str(tmp_path / "absent.pth"))
    with pytest.raises(CheckpointError, match="is a folder"):
        load_file(str(tmp_path))
    with pytest.raises(CheckpointError, match="catalog://nonsense: cannot be fetched"):
        load_file("catalog://nonsense")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_file(write(tmp_path / "a.pth", buffer.getvalue()))


def test_missing_safetensors_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors", struct.pack("<Q", 2) + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load_file(path)
