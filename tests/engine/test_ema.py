from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from convmask.checkpoint import Checkpointer, load_file
from convmask.engine import Predictor, Trainer, load_config, prepare
from convmask.engine.ema import ModelAverage


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_the_average_of_everything_that_is_averaged() -> None:
    network = model()
    average = ModelAverage(network, 0.9)
    average.start()
    expected = network[0].weight.detach().clone()
    for number in range(1, 200):
        with torch.no_grad():
            network[0].weight.copy_(torch.full((3, 2), float(number)))
            network[1].running_mean.fill_(float(number))
            network[1].num_batches_tracked.add_(1)
        average.update(number)
        decay = min(0.9, number / (9 + number))
        expected = decay * expected + (1 - decay) * number
    state = average.state_dict()
    torch.testing.assert_close(state["0.weight"], expected)
    # A constant delay behind numbers that grow by 1.
    assert state["1.running_mean"][0].item() == pytest.approx(199 - 9, abs=0.1)
    assert state["1.num_batches_tracked"] == 199


def test_the_model_has_the_average_for_a_while() -> None:
    network = model()
    average = ModelAverage(network, 0.5)
    average.start()
    first = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight.add_(1)
    with average.applied():
        assert torch.equal(network[0].weight, first)
    assert torch.equal(network[0].weight, first + 1)


def test_another_models_average_and_a_wrong_decay() -> None:
    with pytest.raises(ValueError, match=r"average is of another model: 0\.weight"):
        ModelAverage(model(), 0.9).load_state_dict({**model().state_dict(), "0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"SOLVER\.EMA\.DECAY is 1\.5"):
        ModelAverage(model(), 1.5)


@pytest.fixture
def cfg(tiny_options: list[str]) -> CfgNode:
    options = [*tiny_options, "SOLVER.EMA.ENABLED", "True", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2"]
    cfg = load_config("quick/panoptic_fpn_synthetic.yaml", options)
    prepare(cfg)
    return cfg


def test_evaluation_and_demo_use_the_average_and_say_so(cfg: CfgNode, logged: Callable[[], str]) -> None:
    trainer = Trainer(cfg)
    trainer.train()
    path = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    contents = load_file(path)
    name = next(name for name, _ in trainer.checkpointer.model.named_parameters())
    raw, average = contents["model"][name], contents["ema_model"][name]
    assert not torch.equal(raw, average)
    with trainer.evaluated_weights():
        assert torch.equal(dict(trainer.checkpointer.model.named_parameters())[name], average)
    assert "moving average of the weights is evaluated" in logged()

    cfg.MODEL.WEIGHTS = path
    predictor = Predictor(cfg)
    assert torch.equal(dict(predictor.model.named_parameters())[name], average)
    assert "moving average of the weights (ema_model) is loaded" in logged()
    cfg.SOLVER.EMA.ENABLED = False
    assert torch.equal(dict(Predictor(cfg).model.named_parameters())[name], raw)

    cfg.SOLVER.EMA.ENABLED = True
    Checkpointer(predictor.model, cfg.OUTPUT_DIR).save("plain")
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "plain.pth")
    Predictor(cfg)
    assert "holds no moving average" in logged()
