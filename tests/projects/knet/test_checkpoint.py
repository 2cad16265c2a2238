"""Checkpoints of the release: recognised and converted, Swin's layout included, and errors that name the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import PatchMerging

from convmask.checkpoint import Checkpointer, CheckpointError, recognise
from convmask.checkpoint.openmmlab import convert_swin
from convmask.config import get_cfg

ROUND = {
    "attention": "attention.attn",
    "updator": "kernel_update_conv",
    "class_branch": "cls_fcs",
    "mask_branch": "mask_fcs",
    "ffn.0": "ffn.layers.0.0",
    "ffn.3": "ffn.layers.1",
    "feat_transform": "feat_transform.conv",
}


def round_name(name: str) -> str:
    for ours, theirs in ROUND.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def layer(name: str, norm: str) -> str:
    """``p.norm.weight`` to ``p.gn.weight``, ``p.weight`` to ``p.conv.weight``."""
    prefix, tensor = name.rsplit(".", 1)
    if prefix.endswith(".norm"):
        return f"{prefix.removesuffix('norm')}{norm}.{tensor}"
    return f"{prefix}.conv.{tensor}"


def released_name(name: str, semantic: bool) -> str:
    """The release's name of a parameter here, heads only."""
    part, _, rest = name.partition(".")
    if part == "rounds":
        number, inner = rest.split(".", 1)
        return f"roi_head.mask_head.{number}.{round_name(inner)}"
    if part == "kernel_head":
        head, _, inner = rest.partition(".")
        if head in ("init_kernels", "conv_seg"):
            return f"rpn_head.{rest}"
        if head == "localization_fpn":
            level, position, tensor = inner.split(".", 2)
            conv = f"convs_all_levels.{int(level[1]) - 2}.conv{int(position) // 2}.{tensor}"
            return layer(f"rpn_head.localization_fpn.{conv}", "gn")
        position, tensor = inner.split(".", 1)
        first = {"localization": "localization_fpn.conv_pred", "semantic": "localization_fpn.aux_convs.0"}
        second = {"localization": "loc_convs.0", "semantic": "seg_convs.0"}
        return layer(f"rpn_head.{(second if position == '1' else first)[head]}.{tensor}", "gn")
    assert semantic and part == "sem_seg_head", name
    if rest.startswith("rounds."):
        number, inner = rest.removeprefix("rounds.").split(".", 1)
        return f"decode_head.kernel_update_head.{number}.{round_name(inner)}"
    head, _, inner = rest.partition(".")
    prefix = "auxiliary_head." if head == "auxiliary_head" else "decode_head.kernel_generate_head."
    if inner.startswith("predictor."):
        return prefix + inner.replace("predictor", "conv_seg")
    for module in ("psp_modules.0", "psp_modules.1", "psp_modules.2", "psp_modules.3", "image_pool"):
        inner = inner.replace(f"{module}.", f"{module}.1.")
    return prefix + layer(inner, "bn")


def swin_to_release(state: dict[str, torch.Tensor], ours: str) -> dict[str, torch.Tensor]:
    """OpenMMLab's names and layout of a Swin backbone's state."""
    converted = {}
    for name, value in state.items():
        inner = name.removeprefix(ours)
        if inner.startswith("norm"):
            converted[f"backbone.{inner}"] = value
            continue
        _, index, tail = inner.split(".", 2)
        stage, is_merging = divmod(int(index) - 1, 2)
        if index == "0":
            converted["backbone.patch_embed." + tail.replace("0.", "projection.").replace("2.", "norm.")] = value
        elif is_merging:
            if tail != "reduction.bias":
                # torchvision's patches, column by column, to (channel, patch), row by row
                patches = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
                value = patches.movedim(-2, -1).flatten(-2)
            converted[f"backbone.stages.{stage}.downsample.{tail}"] = value
        else:
            block, rest = tail.split(".", 1)
            rest = rest.replace("attn.", "attn.w_msa.").replace("mlp.0", "ffn.layers.0.0")
            rest = rest.replace("mlp.3", "ffn.layers.1")
            converted[f"backbone.stages.{stage}.blocks.{block}.{rest}"] = (
                value.reshape(49, 49) if "index" in rest else value
            )
    return converted


def small(repository: Path, name: str, *options: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "KNet" / f"{name}.yaml"))
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.SEM_SEG_HEAD.NORM", "BN"),
            *("MODEL.SWIN.EMBED_DIM", 24, "MODEL.SWIN.DEPTHS", (2, 2, 2, 2), "MODEL.SWIN.NUM_HEADS", (1, 2, 2, 4)),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.KNET.CHANNELS", 32),
            *("MODEL.KNET.FFN_CHANNELS", 64, "MODEL.KNET.NUM_THING_CLASSES", 5, "MODEL.KNET.NUM_STUFF_CLASSES", 4),
            *("MODEL.KNET.NUM_KERNELS", 10, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9),
            *("MODEL.KNET.UPDATOR_CHANNELS", 16 if "semantic" in name else 0, "MODEL.KNET.SEMANTIC.AUX_CHANNELS", 16),
            *options,
        ]
    )
    if "semantic" in name and "swin" not in name:
        cfg.MODEL.RESNETS.NORM = "BN"
    return cfg


def release(model: nn.Module, semantic: bool, swin: bool) -> dict[str, torch.Tensor]:
    """A state dictionary of the release with random values for this model."""
    torch.manual_seed(3)
    state = {name: torch.rand_like(x.float()) for name, x in model.state_dict().items() if "num_batches" not in name}
    below = "backbone." if semantic else "backbone.bottom_up."
    body = {name: x for name, x in state.items() if name.startswith(below)}
    heads = {name: x for name, x in state.items() if not name.startswith("backbone.")}
    converted = {released_name(name, semantic): x for name, x in heads.items()}
    for name in state.keys() - body.keys() - heads.keys():
        kind, tensor = name.removeprefix("backbone.fpn_").rsplit(".", 1)
        module = "lateral_convs" if "lateral" in kind else "fpn_convs"
        converted[f"neck.{module}.{int(kind[-1]) - 2}.conv.{tensor}"] = state[name]
    if swin:
        return converted | swin_to_release(body, below)
    for name, x in body.items():
        inner = name.removeprefix(below)
        if inner.startswith("stem"):
            number = 3 * (int(inner[len("stem.conv")]) - 1)
            deep = "stem.conv3.weight" in {key.removeprefix(below) for key in body}
            if deep:
                place = number + ("norm" in inner)
                converted[f"backbone.stem.{place}.{inner.rsplit('.', 1)[1]}"] = x
            else:
                converted[f"backbone.{'bn1' if 'norm' in inner else 'conv1'}.{inner.rsplit('.', 1)[1]}"] = x
            continue
        stage, block, tail = inner.split(".", 2)
        tail = tail.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        tail = tail.replace("conv2.offset", "conv2.conv_offset")
        for number in "123":
            tail = tail.replace(f"conv{number}.norm", f"bn{number}")
        converted[f"backbone.layer{int(stage[3]) - 1}.{block}.{tail}"] = x
    return converted


@pytest.mark.parametrize(
    "name",
    [
        "knet_instance_R_50_3x",
        "knet_panoptic_R_50_3x",
        "knet_panoptic_R_101_dcn_3x",
        "knet_panoptic_swin_l_3x",
        "knet_semantic_fcn_R_50_80k",
        "knet_semantic_pspnet_R_50_80k",
        "knet_semantic_deeplabv3_R_50_80k",
        "knet_semantic_upernet_R_50_80k",
        "knet_semantic_upernet_swin_t_80k",
    ],
)
def test_a_release_is_loaded_whole(repository: Path, tmp_path: Path, name: str) -> None:
    semantic, swin = "semantic" in name, "swin" in name
    model = build_model(small(repository, name))
    state = release(model, semantic, swin)
    torch.save({"meta": {}, "state_dict": state, "optimizer": {}}, tmp_path / "release.pth")
    Checkpointer(model, policy="strict").load(str(tmp_path / "release.pth"))
    again = release_of_values(model, semantic, swin)
    assert state.keys() == again.keys()
    for key, value in state.items():
        if "relative_position_index" not in key:
            assert torch.equal(value, again[key]), key


def release_of_values(model: nn.Module, semantic: bool, swin: bool) -> dict[str, torch.Tensor]:
    """The release's names for the values that the model has now."""
    values = model.state_dict()

    class Stub(nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda x: x.clone())
        return release(Stub(), semantic, swin)


def test_patch_merging_of_openmmlab_is_that_of_torchvision() -> None:
    """OpenMMLab merges by unfold: channels first, then the patches row by row."""
    torch.manual_seed(0)
    norm, reduction = nn.LayerNorm(4 * 6), nn.Linear(4 * 6, 2 * 6, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 10, 6)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
    expected = reduction(norm(unfolded)).view(2, 4, 5, 12)

    prefix = "backbone.stages.0.downsample."
    state = {f"{prefix}norm.{name}": value for name, value in norm.state_dict().items()}
    state[f"{prefix}reduction.weight"] = reduction.weight.detach()
    converted = convert_swin(state, "backbone.", "")
    merging = PatchMerging(6)
    merging.load_state_dict({name.removeprefix("features.2."): value for name, value in converted.items()})
    torch.testing.assert_close(merging(x), expected, rtol=1e-5, atol=1e-5)


def test_another_variant_is_an_error_that_names_its_config(repository: Path, tmp_path: Path) -> None:
    instance = build_model(small(repository, "knet_instance_R_50_3x"))
    torch.save({"state_dict": release(instance, False, False)}, tmp_path / "release.pth")
    panoptic = build_model(small(repository, "knet_panoptic_R_50_3x"))
    with pytest.raises(CheckpointError, match=r"configs/KNet/knet_instance_R_50_3x\.yaml"):
        Checkpointer(panoptic, policy="strict").load(str(tmp_path / "release.pth"))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("knet_panoptic_R_50_3x", {"MODEL.KNET.NUM_THING_CLASSES": 80, "MODEL.KNET.NUM_STUFF_CLASSES": 53}, None),
        (
            "knet_panoptic_R_101_dcn_3x",
            {"MODEL.KNET.NUM_THING_CLASSES": 80, "MODEL.KNET.NUM_STUFF_CLASSES": 53},
            "knet_panoptic_R_101_dcn_3x.yaml",
        ),
        ("knet_instance_R_101_n256_3x", {"MODEL.KNET.NUM_KERNELS": 256}, "knet_instance_R_101_n256_3x.yaml"),
        ("knet_semantic_pspnet_R_50_80k", {}, None),
        ("knet_semantic_deeplabv3_R_50_80k", {}, None),
        ("knet_semantic_upernet_swin_t_80k", {}, None),
    ],
)
def test_the_config_that_fits(repository: Path, name: str, options: dict[str, Any], expected: str | None) -> None:
    overrides = [item for pair in options.items() for item in pair]
    model = build_model(small(repository, name, *overrides))
    found = recognise({"state_dict": release(model, "semantic" in name, "swin" in name)}, "f")
    assert (expected or f"{name}.yaml") in found.config and "K-Net" in found.kind
    assert (repository / found.config.partition(",")[0]).is_file()
    assert ("UPDATOR_CHANNELS 16" in found.config) == ("semantic" in name)


def test_tampered_files_are_one_error(repository: Path) -> None:
    model = build_model(small(repository, "knet_panoptic_swin_l_3x"))
    state = release(model, False, True)
    state["backbone.stages.0.downsample.reduction.weight"] = torch.zeros(3, 7)
    with pytest.raises(CheckpointError, match="looks like K-Net"):
        recognise({"state_dict": state}, "f")
