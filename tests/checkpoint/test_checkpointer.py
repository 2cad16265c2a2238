"""The two policies, resuming, and saving that cannot destroy a file."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from convmask.checkpoint import Checkpointer, CheckpointError, load_file

from .models import Detector, equal_states, randomise

Policies = pytest.mark.parametrize("policy", ["strict", "finetune"])


def save(path: Path, model: nn.Module, **rest: Any) -> str:
    torch.save({"model": model.state_dict(), **rest}, path)
    return str(path)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, logger="fvcore.common.checkpoint")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@Policies
def test_round_trip(tmp_path: Path, policy: Any) -> None:
    source = randomise(Detector())
    Checkpointer(source, str(tmp_path)).save("model_final", iteration=7)
    model = Detector()
    rest = Checkpointer(model, policy=policy).load(str(tmp_path / "model_final.pth"))
    assert equal_states(model.state_dict(), source.state_dict())
    assert rest == {"iteration": 7, "__author__": "ConvMask", "meta_architecture": "Detector"}
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]
    other = Detector()
    DetectionCheckpointer(other).load(str(tmp_path / "model_final.pth"))
    assert equal_states(other.state_dict(), source.state_dict())


@Policies
def test_detectron2_and_wrapped_files(tmp_path: Path, policy: Any) -> None:
    source = randomise(Detector())
    DetectionCheckpointer(source, str(tmp_path)).save("detectron2")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "wrapped.pth")
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    # what older Detectron2 stored as well
    arrays["pixel_mean"] = source.pixel_mean.numpy()
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = arrays["pixel_mean"]
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol=2))
    for name in ("detectron2.pth", "wrapped.pth", "zoo.pkl"):
        model = Detector()
        Checkpointer(model, policy=policy).load(str(tmp_path / name))
        assert equal_states(model.state_dict(), source.state_dict()), name


def test_other_pixel_mean_is_pointed_out(tmp_path: Path, logged: Callable[[], str]) -> None:
    state = {**randomise(Detector()).state_dict(), "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)}
    torch.save({"model": state}, tmp_path / "a.pth")
    Checkpointer(Detector(), policy="strict").load(str(tmp_path / "a.pth"))
    assert "another channel order or scale" in logged()


def test_other_number_of_classes(tmp_path: Path, logged: Callable[[], str]) -> None:
    path = save(tmp_path / "coco.pth", randomise(Detector(classes=80)))
    model = randomise(Detector(classes=5), seed=1)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=r"(?s)coco\.pth: .*number of classes.*\(81, 4\) in the file, \(6, 4\) in the model"
    ):
        Checkpointer(model, policy="strict").load(path)
    assert equal_states(model.state_dict(), before)
    Checkpointer(model).load(path)
    table = logged()
    assert "starts afresh" in table and "roi_heads.cls_score.weight" in table and "(81, 4) in the file" in table
    assert "roi_heads.conv" not in table
    assert torch.equal(model.roi_heads.cls_score.weight, before["roi_heads.cls_score.weight"])
    assert not torch.equal(model.roi_heads.conv.weight, before["roi_heads.conv.weight"])


def test_the_config_beside_a_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "coco.pth", randomise(Detector(classes=80)))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=f"The config that fits it: {tmp_path}/config.yaml"):
        Checkpointer(Detector(classes=5), policy="strict").load(path)
    # that folder's config is this run's own by then
    with pytest.raises(CheckpointError) as error:
        Checkpointer(Detector(classes=5), str(tmp_path), policy="strict").load(path)
    assert "config.yaml" not in str(error.value)


def test_other_method(tmp_path: Path, logged: Callable[[], str]) -> None:
    path = save(tmp_path / "a.pth", randomise(Detector(head="position_head")))
    model = randomise(Detector(), seed=1)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="another method, with position_head and without roi_heads"):
        Checkpointer(model, policy="strict").load(path)
    assert equal_states(model.state_dict(), before)
    Checkpointer(model).load(path)
    report = logged()
    assert "roi_heads" in report and "absent in the file" in report
    assert "Not used" in report and "position_head" in report
    assert not torch.equal(model.backbone.fpn_lateral5.weight, before["backbone.fpn_lateral5.weight"])


@Policies
def test_other_architecture(tmp_path: Path, policy: Any) -> None:
    path = save(tmp_path / "a.pth", nn.Sequential(nn.Linear(2, 2)), meta_architecture="Other")
    with pytest.raises(CheckpointError, match=r"(?s)not one tensor fits.*a checkpoint of Other"):
        Checkpointer(Detector(), policy=policy).load(path)


@Policies
@pytest.mark.parametrize(
    ("there", "here", "what"),
    [
        ({"depth": (1, 1, 1, 1)}, {"depth": (1, 1, 2, 1)}, "res4.1"),
        ({"depth": (1, 1, 2, 1)}, {"depth": (1, 1, 1, 1)}, "res4.1"),
        ({"width": 4}, {"width": 8}, r"res2.0.conv1.weight: \(4, 4, 1, 1\)"),
        ({"norm": ""}, {"norm": "BN"}, "norm"),
        ({"norm": "BN"}, {"norm": ""}, "norm"),
        ({"norm": "BN"}, {"norm": partial(nn.GroupNorm, 4)}, "running_mean"),
    ],
)
def test_other_backbone_is_an_error_of_both_policies(
    tmp_path: Path, policy: Any, there: dict[str, Any], here: dict[str, Any], what: str
) -> None:
    path = save(tmp_path / "a.pth", randomise(Detector(**there)))
    model = randomise(Detector(**here), seed=1)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=f"(?s)a.pth: .*{what}"):
        Checkpointer(model, policy=policy).load(path)
    assert equal_states(model.state_dict(), before)


def test_stages_that_the_model_cuts_off_are_fine(tmp_path: Path) -> None:
    source = randomise(Detector(depth=(1, 1, 1, 1)))
    model = Detector(depth=(1, 1, 1))
    Checkpointer(model).load(save(tmp_path / "a.pth", source))
    assert torch.equal(model.backbone.bottom_up.res4[0].conv1.weight, source.backbone.bottom_up.res4[0].conv1.weight)


def test_offsets_of_deformable_layers_may_start_afresh(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", randomise(Detector()))
    model = Detector()
    model.backbone.bottom_up.res5[0].conv2_offset = nn.Conv2d(4, 18, 3)
    Checkpointer(model).load(path)
    with pytest.raises(CheckpointError, match="conv2_offset"):
        Checkpointer(model, policy="strict").load(path)


def test_shared_parameters_may_be_stored_once(tmp_path: Path) -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
    model.second.weight = model.first.weight
    state = {name: value for name, value in model.state_dict().items() if name != "second.weight"}
    torch.save({"model": state}, tmp_path / "a.pth")
    Checkpointer(model, policy="strict").load(str(tmp_path / "a.pth"))


def test_unmatched_keys_are_reported(tmp_path: Path, logged: Callable[[], str]) -> None:
    state = {**Detector().state_dict(), "surplus.weight": torch.ones(3)}
    torch.save({"model": state}, tmp_path / "a.pth")
    Checkpointer(Detector()).load(str(tmp_path / "a.pth"))
    assert "Not used" in logged() and "surplus" in logged()
    with pytest.raises(CheckpointError, match="with surplus"):
        Checkpointer(Detector(), policy="strict").load(str(tmp_path / "a.pth"))


def test_training_state_is_restored_on_resuming_only(tmp_path: Path) -> None:
    def training(classes: int = 3) -> tuple[Checkpointer, torch.optim.Optimizer]:
        model = Detector(classes)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return Checkpointer(model, str(tmp_path), optimizer=optimizer), optimizer

    checkpointer, optimizer = training()
    for parameter in checkpointer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpointer.save("model_0000004", iteration=4)

    resumed, optimizer = training()
    assert resumed.resume_or_load("nowhere.pth", resume=True)["iteration"] == 4
    assert all("momentum_buffer" in state for state in optimizer.state_dict()["state"].values())
    fresh, optimizer = training()
    fresh.resume_or_load(str(tmp_path / "model_0000004.pth"), resume=False)
    assert not optimizer.state_dict()["state"]
    # fine-tuning admits other classes, resuming does not, whatever the policy
    other, _ = training(classes=5)
    assert other.policy == "finetune"
    other.resume_or_load(str(tmp_path / "model_0000004.pth"), resume=False)
    with pytest.raises(CheckpointError, match="number of classes"):
        other.resume_or_load("", resume=True)


def test_training_state_of_another_run(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", Detector(), optimizer={"param_groups": []})
    model = Detector()
    checkpointer = Checkpointer(model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(CheckpointError, match=r"a\.pth: its optimizer does not belong"):
        checkpointer.load(path)


def test_last_checkpoint_that_names_nothing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(Detector(), str(tmp_path))
    tag = tmp_path / "last_checkpoint"
    for content, reason in ((b"", "is empty"), (b"\xff\xfe", "does not hold the name"), (b"gone.pth", "no such file")):
        tag.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            checkpointer.resume_or_load("", resume=True)


def test_no_path_loads_nothing() -> None:
    model = Detector()
    before = snapshot(model)
    assert Checkpointer(model, policy="strict").load("") == {}
    assert equal_states(model.state_dict(), before)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="'lenient'"):
        Checkpointer(Detector(), policy="lenient")  # type: ignore[arg-type]


def fail(*_: Any, **__: Any) -> None:
    raise OSError("No space left on device")


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "torch.save"])
def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    old = randomise(Detector())
    Checkpointer(old, str(tmp_path)).save("model")
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(data: Any, file: Any) -> None:
        buffer = io.BytesIO()
        real_save(data, buffer)
        file.write(buffer.getvalue()[:1000])
        fail()

    real_save = torch.save
    monkeypatch.setattr(step, half if step == "torch.save" else fail)
    with pytest.raises(CheckpointError, match=r"model\.pth: cannot be written: No space"):
        Checkpointer(randomise(Detector(), seed=1), str(tmp_path)).save("model")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_killed_save_leaves_the_old_file_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = randomise(Detector()), randomise(Detector(), seed=1)
    Checkpointer(old, str(tmp_path)).save("model")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Checkpointer(new, str(tmp_path)).save("model")
    assert equal_states(load_file(str(tmp_path / "model.pth"))["model"], old.state_dict())
    (tmp_path / "model.pth.partial").write_bytes(b"what a killed process left")
    checkpointer = Checkpointer(new, str(tmp_path))
    checkpointer.save("model")
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / "model.pth")]
    assert equal_states(load_file(str(tmp_path / "model.pth"))["model"], new.state_dict())


def test_state_that_could_not_be_loaded_again_is_left_out(tmp_path: Path, logged: Callable[[], str]) -> None:
    Checkpointer(Detector(), str(tmp_path)).save("model", good={"a": (1, None)}, bad={"where": [Path("a")]})
    assert "'bad'" in logged() and "Path" in logged()
    loaded = load_file(str(tmp_path / "model.pth"))
    assert loaded["good"] == {"a": (1, None)} and "bad" not in loaded


def test_only_one_process_writes(tmp_path: Path) -> None:
    Checkpointer(Detector(), str(tmp_path), save_to_disk=False).save("model")
    Checkpointer(Detector()).save("model")
    assert not list(tmp_path.iterdir())


def test_detectron2s_own_entry_points_are_safe_too(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(CheckpointError, match="system"):
        Checkpointer(Detector())._load_file(str(path))
    assert not marker.exists()
