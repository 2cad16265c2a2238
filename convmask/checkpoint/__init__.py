"""Safe loading, recognition and conversion of checkpoints, and what may differ between a file and a model."""

from __future__ import annotations

from convmask.checkpoint import backbones, openmmlab  # registers the converters of ImageNet backbones
from convmask.checkpoint.checkpointer import Checkpointer
from convmask.checkpoint.errors import CheckpointError
from convmask.checkpoint.inversion import inverse_rules, register_inverter, register_no_inverse
from convmask.checkpoint.loading import load_file
from convmask.checkpoint.recognition import Checkpoint, read_checkpoint, recognise, register_converter, rename_keys

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "backbones",
    "inverse_rules",
    "load_file",
    "openmmlab",
    "read_checkpoint",
    "recognise",
    "register_converter",
    "register_inverter",
    "register_no_inverse",
    "rename_keys",
]
