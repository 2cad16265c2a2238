from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from convmask.engine import ConfigError, Trainer, load_config, prepare
from convmask.engine.model_options import checkpoint_activations, compile_modules

METHODS = ("panoptic_fpn", "panoptic_fcn")


def config(method: str, options: list[str], *more: str) -> CfgNode:
    own = {"panoptic_fpn": ["MODEL.ROI_BOX_HEAD.FC_DIM", "16"], "panoptic_fcn": ["MODEL.FPN.OUT_CHANNELS", "64"]}
    small = ["DATASETS.TEST", "()", "MODEL.NARROW_RESNET.WIDTH", "8"]
    cfg = load_config(f"quick/{method}_synthetic.yaml", [*options, *small, *own[method], *more])
    prepare(cfg)
    return cfg


def trained(cfg: CfgNode) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.train()
    return trainer


# Of activation checkpointing and bfloat16, this is that the trainer does it; other methods: test_every_method.py.
def test_activation_checkpointing_changes_nothing(tiny_options: list[str]) -> None:
    options = [*tiny_options, "SOLVER.MAX_ITER", "2"]
    plain = trained(config("panoptic_fpn", options)).model.state_dict()
    trainer = trained(config("panoptic_fpn", options, "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", "True"))
    saving = trainer.model.state_dict()
    assert saving.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(saving[name], value), name
    # What is kept differs: each of the eight blocks is run again in the backward pass.
    calls: list[int] = []
    block = trainer.model.backbone.bottom_up.res2[0]
    block.conv1.register_forward_hook(lambda *_: calls.append(1))
    features = trainer.model.backbone(torch.rand(1, 3, 64, 64))
    assert len(calls) == 1
    sum(value.sum() for value in features.values()).backward()
    assert len(calls) == 2


def test_swin_blocks_are_checkpointed_and_their_stochastic_depth_repeated() -> None:
    options = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": [4, 4], "stochastic_depth_prob": 0.5}
    torch.manual_seed(1)
    model = SwinTransformer(patch_size=[4, 4], **options).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(2)
        model(torch.ones(4, 3, 32, 32)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        if len(gradients) == 1:
            assert checkpoint_activations(model) == 2
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_a_backbone_without_known_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ACTIVATION_CHECKPOINTING: Sequential has no blocks"):
        checkpoint_activations(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_bfloat16_on_the_cpu(tiny_options: list[str]) -> None:
    trainer = trained(config("panoptic_fpn", tiny_options, "SOLVER.AMP.ENABLED", "True"))
    exact = trained(config("panoptic_fpn", tiny_options))
    assert trainer._trainer._precision == torch.bfloat16 and trainer._trainer.grad_scaler is None
    ours, theirs = (run.storage.history("total_loss").values()[0][0] for run in (trainer, exact))
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours != theirs
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_backbone_trains_and_is_stored_by_its_own_names(method: str, tiny_options: list[str]) -> None:
    # Without code generation, which needs a compiler and a minute: tracing and the graph are the same.
    options = ("MODEL.COMPILE.MODULES", "('backbone',)", "MODEL.COMPILE.BACKEND", "eager", "SOLVER.MAX_ITER", "1")
    compiled = trained(config(method, tiny_options, *options))
    plain = trained(config(method, tiny_options, "SOLVER.MAX_ITER", "1"))
    assert compiled.model.backbone._compiled_call_impl is not None
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(
    ("names", "backend", "message"),
    [(("body",), "eager", "has no part 'body'; it has 0, 1"), (("0",), "fast", "BACKEND is 'fast', not one of")],
)
def test_what_cannot_be_compiled(names: tuple[str, ...], backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_modules(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), names, backend)


def test_wrong_options_are_wrong_configs(tiny_options: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.COMPILE\.MODULES: this model has no part 'head'"):
        Trainer(config("panoptic_fpn", tiny_options, "MODEL.COMPILE.MODULES", "('head',)"))
