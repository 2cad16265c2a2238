"""tools/convert_checkpoint.py on both releases' files; there is no way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .test_checkpoint import narrow_cfg, randomised, write  # noqa: F401 (a fixture)


@pytest.mark.parametrize("kind", ["mxnet", "chainercv"])
def test_converted_weights_give_the_same_results(
    narrow_cfg: Callable[..., CfgNode],  # noqa: F811
    tmp_path: Path,
    kind: str,
    check_conversion: Callable,
    convert_checkpoint: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = narrow_cfg("MODEL.FCIS.CONVENTION", kind)
    source = write(tmp_path, kind, randomised(cfg).state_dict())
    converted = check_conversion(source, lambda: build_model(cfg))
    capsys.readouterr()
    details = tmp_path / "tensors.json"
    assert convert_checkpoint([str(source), "--dry-run", "--json", str(details)]) == 0
    assert "reordered" in capsys.readouterr().out
    rows = {row["target"]: row["what"] for row in json.loads(details.read_text())["tensors"]}
    assert rows["roi_heads.head.score_maps.weight"] == rows["backbone.stem.conv1.weight"] == "reordered"
    assert rows["roi_heads.head.box_maps.weight"] == "part"
    assert rows["backbone.res3.0.conv2.weight"] == "renamed"
    with pytest.raises(SystemExit):
        convert_checkpoint([str(converted), str(tmp_path / "back.pth"), "--to-original"])
    assert "without loss: FCIS (MXNet, original release): its box maps" in capsys.readouterr().err
