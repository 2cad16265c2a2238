"""Class counts by the dataset."""

from __future__ import annotations

from convmask.data.class_counts import register_class_counts

register_class_counts("FCIS", {"MODEL.ROI_HEADS.NUM_CLASSES": "things"})
