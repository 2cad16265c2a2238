"""Evaluators: panoptic quality in memory, COCO AP with a detection limit of one's own, and semantic IoU."""

from convmask.evaluation.build import build_evaluator
from convmask.evaluation.coco import COCOEvaluator
from convmask.evaluation.panoptic import PanopticEvaluator
from convmask.evaluation.semantic import SemSegEvaluator
from convmask.evaluation.voc_instances import VOCInstanceEvaluator

__all__ = ["COCOEvaluator", "PanopticEvaluator", "SemSegEvaluator", "VOCInstanceEvaluator", "build_evaluator"]
