"""Training: the trainer, its step, hooks and progress display, and how processes are started."""

from __future__ import annotations

from convmask.engine.config_files import find_config, load_config
from convmask.engine.defaults import argument_parser, prepare, setup
from convmask.engine.errors import ConfigError, one_line_errors
from convmask.engine.launch import launch
from convmask.engine.predictor import Predictor
from convmask.engine.trainer import Trainer

__all__ = [
    "ConfigError",
    "Predictor",
    "Trainer",
    "argument_parser",
    "find_config",
    "launch",
    "load_config",
    "one_line_errors",
    "prepare",
    "setup",
]
