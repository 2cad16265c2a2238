"""Losses that several methods share."""

from .dice import dice_loss
from .focal import soft_focal_loss

__all__ = ["dice_loss", "soft_focal_loss"]
