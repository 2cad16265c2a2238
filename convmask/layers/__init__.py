"""Layers that several methods share."""

from .semantic_fpn import SemanticFPN

__all__ = ["SemanticFPN"]
