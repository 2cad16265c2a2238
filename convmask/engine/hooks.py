"""Hooks that differ from Detectron2's."""

from __future__ import annotations

from detectron2.engine import hooks


class EvalHook(hooks.EvalHook):
    """Detectron2's evaluation, periodic and at the end, but not after a training that failed in its last iteration."""

    def after_train(self) -> None:
        """Evaluates if every iteration was done."""
        # The loop counts one further once it is through; Detectron2's own condition also holds in the last iteration.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
