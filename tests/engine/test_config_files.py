"""Finding configs and merging options."""

from __future__ import annotations

from pathlib import Path

import pytest

from convmask.engine import ConfigError, find_config, load_config


def test_a_config_is_found_below_the_repository_from_anywhere(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = repository / "configs" / "quick" / "panoptic_fpn_synthetic.yaml"
    for name in ("quick/panoptic_fpn_synthetic.yaml", "configs/quick/panoptic_fpn_synthetic.yaml", str(expected)):
        assert Path(find_config(name)) == expected


def test_a_name_of_the_model_zoo_is_a_config() -> None:
    cfg = load_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"
    assert cfg.SOLVER.MAX_ITER == 270000


def test_options_are_merged_last() -> None:
    cfg = load_config("quick/panoptic_fpn_synthetic.yaml", ["SOLVER.MAX_ITER", "7", "SOLVER.BASE_LR", "0.5"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such.yaml", [], "no config file 'no/such.yaml'"),
        ("", ["SOLVER.NO_SUCH_KEY", "1"], "SOLVER.NO_SUCH_KEY"),
        ("", ["SOLVER.MAX_ITER", "many"], "option SOLVER.MAX_ITER many"),
        ("", ["SOLVER.MAX_ITER"], "come in pairs"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config(name, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL: [", "while parsing"),
        ("NO_SUCH_NODE: 1\n", "NO_SUCH_NODE"),
        ("VERSION: 2\nOUTPUT_DIR: !!python/object/apply:os.getcwd []\n", "os.getcwd"),
        ("just a string\n", "config file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
