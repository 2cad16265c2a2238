"""The training step and its check of the losses."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from convmask.engine.step import TrainStep, check_finite, non_finite_message


class Model(nn.Module):
    """Two losses: the weight's square, and a multiple of it given by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        factor = sum(item["factor"] for item in batch) / len(batch)
        return {"loss_square": self.weight**2, "loss_scaled": factor * self.weight**2}


def _step(factor: float) -> TrainStep:
    model = Model()
    batch = [{"factor": factor, "file_name": "a.png"}, {"factor": factor, "file_name": "b.png"}]
    return TrainStep(model, repeat(batch), torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_step_descends_and_records() -> None:
    step = _step(1.0)
    with EventStorage() as storage:
        step.run_step()
        latest = {name: value for name, (value, _) in storage.latest().items()}
    # d/dw (w^2 + w^2) = 4 w
    assert step.model.weight.item() == pytest.approx(2.0 - 0.1 * 8.0)
    assert latest["loss_square"] == pytest.approx(4.0)
    assert latest["total_loss"] == pytest.approx(8.0)
    assert latest["data_time"] >= 0


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_loss_stops_before_the_weights_change(factor: float) -> None:
    step = _step(factor)
    step.iter = 41
    with EventStorage(41), pytest.raises(FloatingPointError) as error:
        step.run_step()
    message = str(error.value)
    assert "iteration 41" in message
    assert f"loss_scaled = {factor}" in message
    assert "loss_square" not in message
    assert "a.png, b.png" in message
    assert step.model.weight.item() == 2.0
    assert step.model.weight.grad is None


def test_infinite_boxes_that_the_model_finds_itself_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        raise FloatingPointError("Predicted boxes contain NaN")

    step = _step(1.0)
    step.iter = 7
    monkeypatch.setattr(step.model, "forward", fail)
    with EventStorage(7), pytest.raises(FloatingPointError, match=r"iteration 7: Predicted boxes .*a\.png, b\.png"):
        step.run_step()


def test_finite_losses_whose_sum_overflows_are_not_reported() -> None:
    losses = {"a": torch.tensor(3e38), "b": torch.tensor(3e38)}
    assert non_finite_message(losses, [], 0) == ""
    check_finite(losses, [], 0)


def test_the_state_holds_optimizer_and_iteration() -> None:
    step = _step(1.0)
    step.optimizer = torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9)
    with EventStorage():
        step.run_step()
    other = _step(1.0)
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(step.state_dict())
    momentum = other.optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert momentum.item() == pytest.approx(8.0)


class Linear(nn.Module):
    """One loss, the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"loss": torch.stack([self.weight * item["x"] for item in batch]).mean()}


def test_several_passes_are_one_step_of_a_larger_batch() -> None:
    items = [{"x": torch.tensor(float(x)), "file_name": "a.png"} for x in (1, 2, 5, 8)]
    found = []
    for batches, passes in (([items], 1), ([items[:2], items[2:]], 2)):
        model = Linear()
        step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), passes=passes)
        with EventStorage() as storage:
            step.run_step()
        assert storage.latest()["total_loss"][0] == pytest.approx(4.0)
        found.append(model.weight.item())
    assert found == pytest.approx([1 - 0.1 * 4, 1 - 0.1 * 4])


def test_a_loss_that_one_pass_lacks_counts_as_zero_there() -> None:
    class Alternating(Linear):
        def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
            losses = super().forward(batch)
            return losses if batch[0]["x"] > 1 else {**losses, "other": self.weight * 6}

    model = Alternating()
    batches = [[{"x": torch.tensor(x), "file_name": ""}] for x in (1.0, 3.0)]
    step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), passes=2)
    with EventStorage() as storage:
        step.run_step()
    assert {name: value for name, (value, _) in storage.latest().items() if name in ("loss", "other")} == {
        "loss": pytest.approx(2.0),
        "other": pytest.approx(3.0),
    }


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 training needs a CUDA device")
def test_float16_scales_gradients_and_its_scaler_is_stored() -> None:
    model = Linear().cuda()
    batches = [[{"x": torch.tensor(2.0, device="cuda"), "file_name": ""}]] * 3
    step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), precision=torch.float16)
    with EventStorage():
        step.run_step()
    assert model.weight.item() == pytest.approx(0.8)
    assert step.state_dict()["grad_scaler"]["scale"] > 1
