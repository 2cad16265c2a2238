"""Checkpoints of Detectron2's model zoo, whose names are those here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from convmask.checkpoint.inversion import register_inverter, register_no_inverse
from convmask.checkpoint.recognition import State

_PREDICTOR, _FIRST = "sem_seg_head.predictor.weight", "sem_seg_head.p2.0.weight"
_LATERAL = "backbone.fpn_output2.weight"


def _is_ours(state: Mapping[str, torch.Tensor]) -> bool:
    kernels = {_PREDICTOR, _FIRST, _LATERAL}
    return (
        kernels <= state.keys()
        and all(state[name].dim() == 4 for name in kernels)
        and any(name.startswith("roi_heads.") for name in state)
    )


def _is_variant(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model has what Detectron2's lacks: a grouped FPN, joining by concatenation, two convolutions."""
    grouped = state[_LATERAL].shape[0] != state[_LATERAL].shape[1]
    concatenated = state[_PREDICTOR].shape[1] != state[_FIRST].shape[0]
    return grouped or concatenated or "sem_seg_head.p2.1.weight" in state


@register_inverter("Detectron2's PanopticFPN", matches=lambda state: _is_ours(state) and not _is_variant(state))
def invert_detectron2(state: State) -> State:
    """The same names."""
    names = list(state)
    return {name: state.pop(name) for name in names}


register_no_inverse(
    "Detectron2's PanopticFPN",
    matches=lambda state: _is_ours(state) and _is_variant(state),
    reason="it has no grouped FPN, no concatenation of levels, and one convolution before each upsampling",
)
