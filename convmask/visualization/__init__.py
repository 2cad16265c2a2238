"""Pictures of predictions and ground truth."""

from __future__ import annotations

from convmask.visualization.compose import contact_sheet, panels, side_by_side
from convmask.visualization.draw import draw_prediction, draw_segments
from convmask.visualization.files import save_image
from convmask.visualization.ground_truth import ground_truth
from convmask.visualization.segments import Segment, segments_of

__all__ = [
    "Segment",
    "contact_sheet",
    "draw_prediction",
    "draw_segments",
    "ground_truth",
    "panels",
    "save_image",
    "segments_of",
    "side_by_side",
]
