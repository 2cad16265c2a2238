"""Losses that several methods share."""

from .dice import dice_loss
from .focal import soft_focal_loss
from .lovasz import lovasz_hinge

__all__ = ["dice_loss", "lovasz_hinge", "soft_focal_loss"]
