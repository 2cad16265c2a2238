"""LazyConfig leaves build the models of the YAML files beside them: same parts, options, weights and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from convmask import model_zoo
from convmask.engine import ConfigError, load_config

pytest.importorskip("omegaconf", reason="Detectron2's LazyConfig needs omegaconf")

REPOSITORY = Path(__file__).resolve().parents[2]
LEAVES = sorted(path.relative_to(REPOSITORY / "configs") for path in (REPOSITORY / "configs").glob("*/*.py"))


def models(leaf: Path) -> tuple[nn.Module, nn.Module]:
    """Of the leaf, and of the YAML file."""
    cfg = load_config(str(leaf.with_suffix(".yaml")), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    torch.manual_seed(0)
    expected = build_model(cfg)
    torch.manual_seed(0)
    return model_zoo.get(str(leaf), device="cpu"), expected


def plain(value: Any) -> Any:
    """What can be compared of a value, sequences as lists; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, str | int | float | bool):
        return value
    if type(value).__name__ in ("list", "tuple", "ListConfig"):
        return [plain(part) for part in value]
    if type(value).__module__.startswith(("detectron2.modeling.matcher", "detectron2.modeling.box_regression")):
        return type(value).__name__, plain(vars(value))
    return None


def described(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The type and the options of every module."""
    for name, module in model.named_modules():
        options = {key: plain(value) for key, value in vars(module).items() if not key.startswith("_parameters")}
        yield name, (type(module).__name__, {key: value for key, value in options.items() if value not in (None, {})})


def outputs(model: nn.Module) -> list[torch.Tensor]:
    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    torch.manual_seed(0)
    with torch.no_grad():
        result = model.eval()([{"image": image, "height": 120, "width": 160}])[0]
    tensors = []
    for value in result.values():
        if isinstance(value, Instances):
            tensors += [getattr(field, "tensor", field) for field in value.get_fields().values()]
        else:
            tensors.append(value[0] if isinstance(value, tuple) else value)
    return tensors


def test_there_is_a_leaf_for_each_method() -> None:
    methods = {path.parent.parent.name for path in (REPOSITORY / "projects").glob("*/*/meta_arch.py")}
    assert {leaf.parts[0] for leaf in LEAVES} == methods
    for leaf in LEAVES:
        assert (REPOSITORY / "configs" / leaf).with_suffix(".yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.stem)
def test_a_leaf_builds_the_model_of_its_yaml(leaf: Path) -> None:
    model, expected = models(leaf)
    assert dict(described(model)) == dict(described(expected))
    parameters, others = dict(model.named_parameters()), dict(expected.named_parameters())
    assert {k: (v.shape, v.requires_grad) for k, v in parameters.items()} == {
        k: (v.shape, v.requires_grad) for k, v in others.items()
    }
    assert [(k, v.shape) for k, v in model.named_buffers()] == [(k, v.shape) for k, v in expected.named_buffers()]
    # initial weights of one distribution, drawn in whatever order
    for name, value in parameters.items():
        if value.numel() > 1000 and others[name].numel() > 1000:
            assert float(value.detach().std()) == pytest.approx(float(others[name].detach().std()), rel=0.2), name
    model.load_state_dict(expected.state_dict())
    for found, wanted in zip(outputs(model), outputs(expected), strict=True):
        assert torch.equal(found, wanted)


def test_a_leaf_is_a_config_of_the_zoo() -> None:
    cfg = model_zoo.get_config("EmbedMask/embed_mask_v1_R_50_1x.py")
    assert set(cfg) == {"model"}
    cfg.model.fcos_head.num_convs = 1
    from detectron2.config import instantiate

    assert len(instantiate(cfg.model.fcos_head).cls_tower) == 1
    with pytest.raises(ConfigError, match="LazyConfig"):
        model_zoo.get_config("EmbedMask/embed_mask_v1_R_50_1x.py", trained=True)
    with pytest.raises(ConfigError, match=r"no config 'EmbedMask/no_such\.py'"):
        model_zoo.get_config("EmbedMask/no_such.py")
