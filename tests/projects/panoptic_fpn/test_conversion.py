"""tools/convert_checkpoint.py on a file of Detectron2's zoo, whose names are ours."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer


def test_a_zoo_pickle_there_and_back(
    small_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    check_conversion: Callable,
    convert_checkpoint: Callable,
) -> None:
    cfg = small_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    state = {name: value.numpy() for name, value in build_model(cfg).state_dict().items()}
    zoo = {"model": state | {"pixel_mean": torch.zeros(3, 1, 1).numpy()}, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(zoo, protocol=2))
    converted = check_conversion(tmp_path / "model_final.pkl", lambda: build_model(cfg))
    assert convert_checkpoint([str(converted), str(tmp_path / "back.pth"), "--to-original"]) == 0
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    theirs = build_model(cfg)
    Checkpointer(theirs, policy="strict").load(str(tmp_path / "back.pth"))
    assert all(torch.equal(value, torch.from_numpy(state[name])) for name, value in theirs.state_dict().items())


def test_a_variant_that_detectron2_lacks_is_refused(
    small_cfg: Callable[..., CfgNode], tmp_path: Path, convert_checkpoint: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(small_cfg("MODEL.PANOPTIC_FPN.GROUPED_FPN", True))
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    with pytest.raises(SystemExit):
        convert_checkpoint([str(tmp_path / "ours.pth"), str(tmp_path / "back.pth"), "--to-original"])
    assert "no grouped FPN" in capsys.readouterr().err


def test_a_file_with_tensors_of_other_shapes_has_no_way_back(
    tmp_path: Path, convert_checkpoint: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("sem_seg_head.predictor.weight", "sem_seg_head.p2.0.weight", "backbone.fpn_output2.weight")
    state = {name: torch.zeros(3) for name in (*names, "roi_heads.box_head.fc1.weight")}
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(SystemExit):
        convert_checkpoint([str(tmp_path / "odd.pth"), str(tmp_path / "back.pth"), "--to-original"])
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "back.pth").exists()
