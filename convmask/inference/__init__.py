"""From predictions at network size to results at image size."""

from .panoptic import panoptic_segmentation

__all__ = ["panoptic_segmentation"]
