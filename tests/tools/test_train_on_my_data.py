"""One command from annotations to a trained, evaluated and drawn model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.data import DatasetCatalog

from convmask.engine import load_config, prepare

from .own_data import write_own_data

FEW = ["SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/train_on_my_data.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_own_data(folder)
    return folder


def arguments(data: Path, kind: str, output: Path, *more: str) -> list[str]:
    return ["--images", str(data / "images"), f"--{kind}", str(data / f"{kind}.json"), "--output", str(output), *more]


def test_panoptic_data_from_annotations_to_pictures(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "squares"
    assert tool.main(arguments(data, "panoptic", output, "--device", "cpu", "--opts", *FEW)) == 0
    printed = capsys.readouterr().out
    assert "2 thing and 1 stuff" in printed and "linear scaling rule" in printed
    assert (output / "model_final.pth").is_file() and (output / "pictures" / "contact_sheet.png").is_file()
    assert {"panoptic_seg", "segm"} <= json.loads((output / "results.json").read_text()).keys()
    parts = [json.loads((output / "data" / f"{name}.json").read_text()) for name in ("train", "val")]
    assert [len(part["images"]) for part in parts] == [5, 1]
    # the config alone is enough for the other programs
    cfg = load_config(str(output / "config.yaml"))
    prepare(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2 and len(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])) == 5
    # what is there is not begun anew, but gone on with
    with pytest.raises(SystemExit):
        tool.main(arguments(data, "panoptic", output))
    assert "--resume" in capsys.readouterr().err
    assert tool.main(["--output", str(output), "--resume", "--opts", "SOLVER.MAX_ITER", "5"]) == 0
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 4
    assert "Starting training from iteration 4" in (output / "log.txt").read_text()


@pytest.mark.parametrize(
    "method", ["embed_mask", *(pytest.param(m, marks=pytest.mark.slow) for m in ("panoptic_fpn", "fcis", "knet"))]
)
def test_instances_with_validation_data(tool: ModuleType, data: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / f"squares_{method}"
    given = ["--method", method, "--val-instances", str(data / "instances.json"), "--device", "cpu"]
    assert tool.main(arguments(data, "instances", output, *given, "--opts", *FEW)) == 0
    assert "segm" in json.loads((output / "results.json").read_text())
    assert not (output / "data").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["panoptic_fcn", "fcis", "embed_mask", "knet"])
def test_panoptic_data_with_every_method(tool: ModuleType, data: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / f"panoptic_{method}"
    assert tool.main(arguments(data, "panoptic", output, "--method", method, "--device", "cpu", "--opts", *FEW)) == 0
    assert (output / "pictures" / "contact_sheet.png").is_file()


def test_a_dry_run_only_suggests_and_time_sets_the_schedule(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--opts", *FEW[2:], "SOLVER.MAX_ITER", "100"]
    output = tmp_path / "suggested"
    assert tool.main(arguments(data, "instances", output, "--dry-run", "--time", "3s", "--device", "cpu", *few)) == 0
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "data"]
    cfg = load_config(str(output / "config.yaml"))
    assert f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "nowhere"], "nowhere: there is no such folder"),
        (["--method", "panoptic_fcn"], "needs stuff classes"),
        (["--time", "soon"], "duration 'soon'"),
        (["--opts", "SOLVER.MAX_ITER", "many"], "option SOLVER.MAX_ITER many"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(arguments(data, "instances", tmp_path / f"wrong_{len(message)}", "--device", "cpu", *more))
    assert end.value.code == 1 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.yaml"))


def test_broken_annotations_stop_it(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((data / "instances.json").read_text())
    content["annotations"][3]["category_id"] = 77
    (tmp_path / "broken.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        tool.main(
            ["--images", str(data / "images"), "--instances", str(tmp_path / "broken.json"), "--output", str(tmp_path)]
        )
    assert "77" in capsys.readouterr().err


def test_the_command_line_is_checked(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        ["--output", "o"],
        ["--images", "i", "--instances", "a", "--panoptic", "b", "--output", "o"],
        ["--images", "i", "--instances", "a", "--val-panoptic", "b", "--output", "o"],
        ["--images", "i", "--instances", "a", "--val-share", "1.5", "--output", "o"],
    ):
        with pytest.raises(SystemExit) as end:
            tool.parse_arguments(wrong)
        assert end.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--images", "i", "--instances", "a", "--val-images", "b"], "--val-images b needs --val-instances or"),
        (
            ["--images", "i", "--panoptic", "a", "--val-panoptic-root", "b"],
            "--val-panoptic-root b needs --val-panoptic",
        ),
        (["--images", "i", "--instances", "a", "--panoptic-root", "b"], "--panoptic-root b needs --panoptic"),
        *(
            (["--resume", option, value], f"{option}: --resume goes on with the config")
            for option, value in (
                *(("--images", "i"), ("--instances", "a"), ("--panoptic", "a"), ("--val-images", "i")),
                *(
                    ("--val-share", "0.3"),
                    ("--method", "knet"),
                    ("--device", "cpu"),
                    ("--weights", "w"),
                    ("--time", "1m"),
                ),
            )
        ),
    ],
)
def test_options_without_effect_are_refused(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        tool.parse_arguments(["--output", "o", *given])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "val"])
def test_annotations_of_the_user_are_not_overwritten(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / f"{name}.json"
    own.write_bytes((data / "instances.json").read_bytes())
    given = ["--images", str(data / "images"), "--instances", str(own), "--output", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        tool.main([*given, "--dry-run"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and f"{own} is there already, with other contents" in error
    assert own.read_bytes() == (data / "instances.json").read_bytes()
    assert [path.name for path in tmp_path.rglob("*")] == ["data", own.name]


def test_a_split_of_the_same_contents_is_made_again(tool: ModuleType, data: Path, tmp_path: Path) -> None:
    entry = ["instances", str(data / "images"), str(data / "instances.json")]
    assert tool.split(entry, 0.2, tmp_path) == tool.split(entry, 0.2, tmp_path)
    with pytest.raises(tool.ConfigError, match=r"train\.json is there already, with other contents"):
        tool.split(entry, 0.5, tmp_path)


def test_cuda_is_refused_where_there_is_none(
    tool: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        tool.main(arguments(data, "instances", tmp_path / "o", "--device", "cuda:1", "--dry-run"))
    assert end.value.code == 1 and "--device cuda:1: this machine has no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_nan_is_null_in_the_results(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").touch()
    results = {"segm": {"AP": float("nan"), "AP50": 1.5}}
    monkeypatch.setattr(tool, "train", lambda options: (None, None, results))
    monkeypatch.setattr(tool, "draw_examples", lambda *_, **__: [tmp_path / "contact_sheet.png"])
    assert tool.main(["--output", str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == {"segm": {"AP": None, "AP50": 1.5}}
