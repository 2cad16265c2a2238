"""An exponential moving average of a model, for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class ModelAverage:
    """The average ``a <- d a + (1 - d) w`` of everything in a model's state that is a floating-point number.

    ``d`` is the decay, but at the n-th update at most n / (9 + n), so that the first weights are soon forgotten. What
    is no floating-point number (counters) is copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Takes the model, whose state is the average at first.

        Args:
            model: not wrapped for several processes. All of them compute the same average.
            decay: 0 to 1.

        Raises:
            ValueError: ``decay`` is out of range.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"SOLVER.EMA.DECAY is {decay}, not between 0 and 1")
        self._model = model
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        self._restored = False

    def start(self) -> None:
        """Makes the average the model's present state, unless one was restored."""
        if not self._restored:
            self._average = {name: value.detach().clone() for name, value in self._model.state_dict().items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Takes the model's state in, for the update ``number``, counted from 1."""
        decay = min(self._decay, number / (9 + number))
        state = self._model.state_dict()
        floating = [name for name, value in self._average.items() if value.is_floating_point()]
        torch._foreach_lerp_([self._average[n] for n in floating], [state[n].detach() for n in floating], 1 - decay)
        for name in self._average.keys() - set(floating):
            self._average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average's values; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
        self._copy_into_model(self._average)
        try:
            yield
        finally:
            self._copy_into_model(own)

    @torch.no_grad()
    def _copy_into_model(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._model.state_dict().items():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by the names of the model's own state."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores an average.

        Raises:
            ValueError: it is that of another model.
        """
        own = self._model.state_dict()
        differing = own.keys() ^ state.keys() or {name for name in own if own[name].shape != state[name].shape}
        if differing:
            raise ValueError(f"the average is of another model: {', '.join(sorted(differing)[:5])}")
        self._average = {name: state[name].detach().to(own[name].device, copy=True) for name in own}
        self._restored = True


class AverageHook(HookBase):
    """Updates a :class:`ModelAverage` after each iteration."""

    def __init__(self, average: ModelAverage) -> None:
        """Takes the average."""
        self._average = average

    def before_train(self) -> None:
        """Begins with the weights that training begins with, or with the average of the checkpoint."""
        if self.trainer.start_iter > 0 and not self._average._restored:
            logger.warning("the checkpoint holds no average of the weights: it begins with its weights")
        self._average.start()

    def after_step(self) -> None:
        """Takes the new weights in."""
        self._average.update(self.trainer.iter + 1)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the average has an entry of its own in a checkpoint."""
        return {}
