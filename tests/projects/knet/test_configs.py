"""The configs of the release: sizes of the models, schedules, and what their optimizer does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.config import get_cfg
from convmask.engine.optimizer import build_optimizer

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "KNet"
LEAVES = sorted(path.stem for path in CONFIGS.glob("knet_*.yaml"))


def read(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    return cfg


def test_every_leaf_has_an_output_folder_of_its_own() -> None:
    for name in LEAVES:
        assert f"output/{name}" == read(name).OUTPUT_DIR


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    # measured by the release
    [("knet_panoptic_R_50_1x", 37.54), ("knet_instance_R_50_1x", 37.48)],
)
def test_parameters_are_as_many_as_the_releases(name: str, millions: float) -> None:
    cfg = read(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    # frozen batch normalisation holds its affine part in buffers
    affine = [x for key, x in model.state_dict().items() if key.endswith(("norm.weight", "norm.bias"))]
    parameters = {key: p for key, p in model.named_parameters() if not key.endswith(("norm.weight", "norm.bias"))}
    count = sum(p.numel() for p in parameters.values()) + sum(x.numel() for x in affine)
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_optimizer_of_the_release() -> None:
    cfg = read("knet_panoptic_R_50_1x")
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8, 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.KNET.FFN_CHANNELS = 32, 64
    model = build_model(cfg)
    rates = {p: g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    decays = {g["weight_decay"] for g in build_optimizer(cfg, model).param_groups}
    assert decays == {0.05}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[p] == pytest.approx(2.5e-5 if "bottom_up" in name else 1e-4), name


def test_no_decay_of_swins_positions() -> None:
    cfg = read("knet_semantic_upernet_swin_t_80k")
    cfg.merge_from_list(
        [
            *("MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", (1, 1, 1, 1), "MODEL.SWIN.NUM_HEADS", (1, 1, 1, 1)),
            *("MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 16, "MODEL.KNET.UPDATOR_CHANNELS", 8),
            *("MODEL.KNET.FFN_CHANNELS", 16, "MODEL.KNET.SEMANTIC.AUX_CHANNELS", 16),
        ]
    )
    model = build_model(cfg)
    decay = {p: g["weight_decay"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        free = "relative_position_bias_table" in name or ".norm" in name or "_norm" in name
        if free:
            assert decay[p] == 0, name
        elif "features." in name:
            assert decay[p] == (0 if name.startswith("backbone.features.0.2.") else 5e-4), name
