"""One training step: data, losses, the check that they are finite, gradients, update; in one pass or in several."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


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


class UntouchedParameters:
    """Notices parameters that a backward pass gives no gradient to.

    DistributedDataParallel would wait for them for ever, in the other processes.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watches the trainable parameters of ``model``."""
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._left: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._touch, name))

    def _touch(self, name: str, gradient: Tensor) -> None:
        self._left.discard(name)

    def expect(self) -> None:
        """Begins a backward pass."""
        self._left = set(self._names)

    def check(self, batch: Iterable[Mapping[str, Any]]) -> None:
        """Ends a backward pass.

        Raises:
            RuntimeError: names the parameters, and the images of the batch.
        """
        if self._left:
            listed = ", ".join(sorted(self._left)[:10]) + (", ..." if len(self._left) > 10 else "")
            what = f"{len(self._left)} parameters of the model get no gradient: {listed}"
            raise RuntimeError(
                f"{_with_files(what, batch)}. Several processes need one for each parameter: add a zero term to the "
                "losses, or set SOLVER.FIND_UNUSED_PARAMETERS True"
            )


class TrainStep(TrainerBase):
    """The inner trainer, on any device, which checks the losses before they reach the weights.

    The order of the losses' dict is kept; ``data_time`` is the time in seconds that the step waited for its batches.

    Attributes:
        model, data_loader, optimizer: as of Detectron2's ``SimpleTrainer``.
        grad_scaler: of float16, else None.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype = torch.float32,
        passes: int = 1,
        every_parameter: bool = False,
    ) -> None:
        """Makes a step.

        Args:
            model: returns a dict of scalar losses for a list of dataset dicts. Put into training mode.
            data_loader: endless; yields lists of dataset dicts. Its iterator is made by the first step.
            optimizer: of the model's parameters.
            precision: of autocasting: float32 (none), bfloat16, or, on CUDA, float16 with a gradient scaler.
            passes: batches of one step, whose gradients and losses are averaged.
            every_parameter: a pass that leaves a parameter without gradient is an error.
        """
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.grad_scaler: torch.amp.GradScaler | None = (
            torch.amp.GradScaler("cuda") if precision == torch.float16 else None
        )
        self._precision = precision
        self._device = next(model.parameters()).device.type
        self._passes = passes
        self._untouched = UntouchedParameters(model) if every_parameter else None
        self._batches: Iterator[list[dict[str, Any]]] | None = None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == torch.float32:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._precision)

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

    def _next_batch(self) -> tuple[list[dict[str, Any]], float]:
        start = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self.data_loader)
        return next(self._batches), time.perf_counter() - start

    def _exchange(self, number: int) -> AbstractContextManager[Any]:
        """Processes exchange their gradients in the last pass of a step only."""
        if isinstance(self.model, DistributedDataParallel) and number < self._passes - 1:
            return self.model.no_sync()
        return nullcontext()

    def _backward(self, losses: Mapping[str, Tensor], batch: list[dict[str, Any]]) -> None:
        total: Any = sum(losses.values())
        if self._passes > 1:
            total = total / self._passes
        if self._untouched is not None:
            self._untouched.expect()
        (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()
        if self._untouched is not None:
            self._untouched.check(batch)

    def run_step(self) -> None:
        """Runs one step and records its losses and the time spent waiting for data."""
        self.optimizer.zero_grad()
        waited, rows = 0.0, []
        for number in range(self._passes):
            batch, seconds = self._next_batch()
            waited += seconds
            with self._exchange(number):
                losses = self._losses(batch)
                self._backward(losses, batch)
            rows.append({name: loss.detach().float().reshape(()) for name, loss in losses.items()})
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self._record(_means(rows), waited)

    def _record(self, losses: Mapping[str, Tensor], data_time: float) -> None:
        """Puts the mean of the losses, and the longest wait, over all processes into the event storage."""
        values = torch.stack([*losses.values()]).tolist()
        gathered = comm.gather((dict(zip(losses, values, strict=True)), data_time))
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(wait for _, wait in gathered))
        means = {name: sum(row.get(name, 0.0) for row, _ in gathered) / len(gathered) for name in losses}
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside model and scheduler: iteration, optimizer, gradient scaler and the data's seed."""
        state = super().state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if hasattr(self.data_loader, "state_dict"):
            state["data"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` holds; the data go on with the iteration after the stored one.

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
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        loader: Any = self.data_loader
        if hasattr(loader, "start_at"):
            if "data" in state_dict:
                loader.load_state_dict(state_dict["data"])
            loader.start_at(self.iter + 1)
            self._batches = None
        else:
            logger.warning("the data loader cannot begin at iteration %d: its order starts anew", self.iter + 1)


def _means(rows: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The mean of each loss; one that a row lacks counts as 0 there."""
    if len(rows) == 1:
        return rows[0]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.stack([row[name] for row in rows if name in row]).sum() / len(rows) for name in names}
