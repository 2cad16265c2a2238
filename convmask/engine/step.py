"""One training step: data, losses, the check that they are finite, gradients, update."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn


def non_finite_message(losses: Mapping[str, Tensor], batch: Iterable[Mapping[str, Any]], iteration: int) -> str:
    """Says which losses are NaN or infinite, when, and on which images; empty if all losses are finite.

    Args:
        losses: scalar tensors by name.
        batch: dataset dicts as the mapper returns them; ``file_name`` is quoted.
        iteration: counted from 0.
    """
    details = _bad_losses(losses, batch)
    return _message(details, iteration) if details else ""


def _bad_losses(losses: Mapping[str, Tensor], batch: Iterable[Mapping[str, Any]]) -> str:
    bad = {name: float(loss.detach()) for name, loss in losses.items() if not bool(torch.isfinite(loss.detach()))}
    return _with_files(", ".join(f"{name} = {value}" for name, value in bad.items()), batch) if bad else ""


def _with_files(what: str, batch: Iterable[Mapping[str, Any]]) -> str:
    files = ", ".join(str(item.get("file_name", "<no file_name>")) for item in batch)
    return f"{what}; images of this batch: {files}"


def _message(details: str, iteration: int) -> str:
    return (
        f"training stopped at iteration {iteration}: {details}. "
        "Try a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS"
    )


def check_finite(
    losses: Mapping[str, Tensor],
    batch: Iterable[Mapping[str, Any]],
    iteration: int,
    failure: FloatingPointError | None = None,
) -> None:
    """Stops all processes if a loss of any of them is NaN or infinite.

    Args:
        losses: scalar tensors by name; not looked at after a failure.
        batch: dataset dicts.
        iteration: counted from 0.
        failure: what the model itself raised about infinite values, before there was a loss.

    Raises:
        FloatingPointError: with the iteration, the loss terms and the image files of every process concerned. Each
            process raises the same message, so that none is left waiting for the others.
    """
    if failure is None:
        total = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()]).sum()
    else:
        total = torch.tensor(float("nan"), device="cuda" if torch.cuda.is_available() else "cpu")
    if comm.get_world_size() > 1:
        # The sum over all processes is non-finite if any term is: one small reduction a step.
        torch.distributed.all_reduce(total)
    if bool(torch.isfinite(total)):
        return
    own = _bad_losses(losses, batch) if failure is None else _with_files(str(failure), batch)
    details = [text for text in comm.all_gather(own) if text]
    # Finite terms may overflow in the sum only.
    if details:
        raise FloatingPointError(_message("; ".join(details), iteration)) from failure


class TrainStep(SimpleTrainer):
    """Detectron2's inner trainer, on any device, which checks the losses before they reach the weights.

    The order of the losses' dict is kept; ``data_time`` is the time in seconds that the step waited for its batch.
    """

    def __init__(
        self, model: nn.Module, data_loader: Iterable[Any], optimizer: torch.optim.Optimizer, amp: bool = False
    ) -> None:
        """Makes a step.

        Args:
            model: returns a dict of scalar losses for a list of dataset dicts.
            data_loader: endless; yields lists of dataset dicts.
            optimizer: of the model's parameters.
            amp: float16 with a gradient scaler, on CUDA.
        """
        super().__init__(model, data_loader, optimizer)
        self.grad_scaler: torch.amp.GradScaler | None = torch.amp.GradScaler("cuda") if amp else None

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.grad_scaler is None else torch.autocast("cuda", dtype=torch.float16)

    def _losses(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The model's losses, all finite."""
        try:
            with self._autocast():
                losses = self.model(batch)
        except FloatingPointError as error:  # Detectron2's proposals look for infinite boxes
            check_finite({}, batch, self.iter, failure=error)
            raise
        if isinstance(losses, Tensor):
            losses = {"total_loss": losses}
        check_finite(losses, batch, self.iter)
        return losses

    def run_step(self) -> None:
        """Runs one step and records its losses and the time spent waiting for data."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        losses = self._losses(batch)

        total = sum(losses.values())
        self.optimizer.zero_grad()
        if self.grad_scaler is None:
            total.backward()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(total).backward()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self._record(losses, data_time)

    def _record(self, losses: Mapping[str, Tensor], data_time: float) -> None:
        """Puts the mean of the losses, and the longest wait, over all processes into the event storage."""
        values = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()]).tolist()
        gathered = comm.gather(([*losses], values, data_time))
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(wait for _, _, wait in gathered))
        means = {
            name: sum(dict(zip(names, row, strict=True)).get(name, 0.0) for names, row, _ in gathered) / len(gathered)
            for name in losses
        }
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside model, optimizer and scheduler: the iteration and the gradient scaler."""
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` holds.

        Raises:
            ValueError: the state is that of another kind of optimizer.
        """
        for own, stored in zip(
            self.optimizer.param_groups, state_dict.get("optimizer", {}).get("param_groups", []), strict=False
        ):
            missing = own.keys() - stored.keys()
            if missing:
                raise ValueError(f"the stored optimizer has no {', '.join(sorted(missing))}: it is of another kind")
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
