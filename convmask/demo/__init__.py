"""What the scripts in ``demo/`` share: inputs, the model, results in files."""

from __future__ import annotations

from convmask.demo.model import demo_config, draw
from convmask.demo.results import CocoResults
from convmask.demo.sources import Inputs, find_inputs
from convmask.demo.video import VideoReader, VideoWriter

__all__ = ["CocoResults", "Inputs", "VideoReader", "VideoWriter", "demo_config", "draw", "find_inputs"]
