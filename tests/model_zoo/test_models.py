"""Models by name: found, built, loaded, and what is missing said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from convmask import model_zoo
from convmask.checkpoint import CheckpointError
from convmask.engine import ConfigError, load_config
from convmask.model_zoo.names import config_files, full_name


@pytest.mark.parametrize(
    "name",
    [
        "PanopticFCN/panoptic_fcn_R_50_1x.yaml",
        "configs/PanopticFCN/panoptic_fcn_R_50_1x.yaml",
        "PanopticFCN/panoptic_fcn_R_50_1x",
        "panoptic_fcn_R_50_1x",
    ],
)
def test_a_config_has_a_path_and_a_short_name(repository: Path, name: str) -> None:
    assert Path(model_zoo.get_config_file(name)) == repository / "configs" / "PanopticFCN" / "panoptic_fcn_R_50_1x.yaml"


def test_short_names_are_unique(repository: Path) -> None:
    names = [Path(name).stem for name in config_files()]
    assert len(set(names)) == len(names)
    on_disk = [path for path in (repository / "configs").glob("*/*.yaml") if not path.name.startswith("Base")]
    assert len(names) == len(on_disk) > 60


def test_a_wrong_name_lists_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"'panoptic_fcn_nuclej'.*did you mean panoptic_fcn_nuclei"):
        model_zoo.get_config("panoptic_fcn_nuclej")
    with pytest.raises(ConfigError, match="lists all"):
        full_name("zzz")


def test_a_config_is_that_of_load_config() -> None:
    cfg = model_zoo.get_config("fcis_R_101_voc")
    assert cfg == load_config("FCIS/fcis_R_101_voc.yaml")


def test_trained_needs_known_weights() -> None:
    cfg = model_zoo.get_config("panoptic_fpn_R_50_3x", trained=True)
    assert cfg.MODEL.WEIGHTS.endswith("panoptic_fpn_R_50_3x/139514569/model_final_c10459.pkl")
    for function in (model_zoo.get, model_zoo.get_config):
        with pytest.raises(ConfigError, match=r"no trained weights of quick/fcis_nuclei\.yaml.*weights="):
            function("fcis_nuclei", trained=True)
    with pytest.raises(ConfigError, match="exclude"):
        model_zoo.get("panoptic_fpn_R_50_3x", trained=True, weights="x.pth")


def test_published_weights_are_those_of_detectron2() -> None:
    urls = pytest.importorskip("detectron2.model_zoo").model_zoo._ModelZooUrls
    known = [model.weights for model in model_zoo.list_models() if model.weights]
    published = {f"{urls.S3_PREFIX}{name}/{suffix}" for name, suffix in urls.CONFIG_PATH_TO_URL_SUFFIX.items()}
    prefix = "https://dl.fbaipublicfiles.com/detectron2/"
    assert known and {url.replace("detectron2://", prefix) for url in known} <= published


def test_a_model_is_built_with_the_classes_of_its_data_and_takes_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_zoo.get("fcis_fpn_synthetic", weights="", device="cpu")
    assert model.training
    classes = len(MetadataCatalog.get("synthetic_panoptic_val").thing_classes)
    assert model.roi_heads.num_classes == classes
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    again = model_zoo.get("fcis_fpn_synthetic", weights=str(tmp_path / "weights.pth"), device="cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="does not fit"):
        model_zoo.get("panoptic_fcn_synthetic", weights=str(tmp_path / "weights.pth"), device="cpu")


@pytest.mark.slow
def test_a_wheel_holds_the_configs(repository: Path, tmp_path: Path) -> None:
    """What ``pip install`` of a wheel unpacks, imported from elsewhere."""
    environment = {**os.environ, "CONVMASK_BUILD_EXT": "0"}
    built = tmp_path / "site-packages"
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, *command], cwd=repository, env=environment, check=True, capture_output=True)
    program = (
        "import convmask; from convmask import model_zoo; from convmask.engine import find_config\n"
        "print(convmask.__file__, model_zoo.get_config_file('fcis_R_101_voc'), find_config('quick/fcis_nuclei.yaml'),\n"
        "      len(model_zoo.list_models()), sum(bool(m.trained) for m in model_zoo.list_models()))"
    )
    environment = {**environment, "PYTHONPATH": os.pathsep.join([str(built), environment.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *paths, models, trained = done.stdout.split()
    assert all(path.startswith(str(built)) for path in paths), paths
    assert int(models) == len(config_files()) and int(trained) > 10
