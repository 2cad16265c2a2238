"""Test-time augmentation of any model that gives Detectron2's results: what its views agree on.

The wrapper needs nothing but the results. A model may say more about them, by attributes:

- ``merge_panoptic(instances, sem_seg) -> panoptic_seg``: its own rule, for an image's merged instances and averaged
  semantic map; without one, panoptic maps are voted on (``convmask.inference.panoptic_views``);
- ``sem_seg_values``: "probabilities" if its semantic maps are such; by default they are logits;
- ``augments_itself``: True if ``TEST.AUG`` is the model's own affair. It is then not wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convmask.inference.instance_views import merge_instances
from convmask.inference.panoptic_views import plurality, vote_panoptic
from convmask.inference.views import ViewOptions, views_of

Result = dict[str, Any]


class TestTimeAugmentation(nn.Module):
    """A model that looks at each image in several sizes, and mirrored, and returns what these views agree on.

    Input and output are the model's: of each image ``instances``, ``sem_seg`` and ``panoptic_seg``, as far as it gives
    them. With one view they are equal to the model's own. In training mode it is the model itself.

    - ``instances``: see :mod:`convmask.inference.instance_views`.
    - ``sem_seg``: the mean of the views' probabilities (softmax of logits), also where the model gives logits. Labels
      (H, W) are voted on.
    - ``panoptic_seg``: by the model's own rule from these two, where it gives both and has one; else see
      :mod:`convmask.inference.panoptic_views`.
    """

    __test__ = False  # for pytest, which takes a class of such a name for tests

    @configurable
    def __init__(
        self,
        model: nn.Module,
        *,
        options: ViewOptions,
        merge_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        """Takes a model, or ``TestTimeAugmentation(cfg, model)``.

        Args:
            model: with Detectron2's interface; in a ``DistributedDataParallel`` or not.
            options: the views.
            merge_threshold: least IoU of detections, and of segments of things, that are one object: above 0, at most
                1.
            max_detections: limit of the instances of an image, unless a single view gives more.

        Raises:
            ValueError: a threshold out of range.
        """
        super().__init__()
        if not 0 < merge_threshold <= 1:
            raise ValueError(f"TEST.AUG.MERGE_THRESH is {merge_threshold}, not above 0 and at most 1")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.training = self.model.training
        self.options = options
        self.merge_threshold = merge_threshold
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Reads ``TEST.AUG`` and ``TEST.DETECTIONS_PER_IMAGE``."""
        return {
            "model": model,
            "options": ViewOptions.from_config(cfg),
            "merge_threshold": cfg.TEST.AUG.MERGE_THRESH,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Results of each image at the size of its output; see the class.

        Args:
            batched_inputs: the model's. Annotations in them are not resized: none are allowed for.
        """
        if self.training:
            return self.model(batched_inputs)
        with torch.no_grad():
            return [self._result(inputs) for inputs in batched_inputs]

    def _result(self, inputs: dict[str, Any]) -> Result:
        results: list[Result] = []
        semantic = _SemanticMean(getattr(self.model, "sem_seg_values", "logits") == "probabilities")
        for view in views_of(inputs, self.options):
            result = dict(self.model([view.inputs])[0])
            result = unflipped(result) if view.flipped else result
            if "sem_seg" in result:
                # scores of all classes of all views would not fit into memory
                semantic.add(result.pop("sem_seg"))
            results.append(result)
        return self._merged(results, semantic)

    def _merged(self, results: Sequence[Result], semantic: _SemanticMean) -> Result:
        if len(results) == 1:
            return {**results[0], **({"sem_seg": semantic.first} if semantic.first is not None else {})}
        unknown = set(results[0]) - {"instances", "panoptic_seg"}
        if unknown:
            raise ValueError(f"TEST.AUG.ENABLED: {', '.join(sorted(unknown))} of several views cannot be merged")
        merged: Result = {}
        if semantic.first is not None:
            merged["sem_seg"] = semantic.result()
        if all("instances" in result for result in results):
            views = [result["instances"] for result in results]
            limit = max(self.max_detections, *(len(view) for view in views))
            merged["instances"] = merge_instances(views, self.merge_threshold, limit)
        if all("panoptic_seg" in result for result in results):
            merged["panoptic_seg"] = self._panoptic(results, merged)
        return merged

    def _panoptic(self, results: Sequence[Result], merged: Result) -> Any:
        if "instances" in merged and "sem_seg" in merged:
            if hasattr(self.model, "merge_panoptic"):
                return self.model.merge_panoptic(merged["instances"], merged["sem_seg"])
            if isinstance(self.model, PanopticFPN):
                return combine_semantic_and_instance_outputs(
                    merged["instances"],
                    merged["sem_seg"].argmax(dim=0),
                    self.model.combine_overlap_thresh,
                    self.model.combine_stuff_area_thresh,
                    self.model.combine_instances_score_thresh,
                )
        return vote_panoptic([result["panoptic_seg"] for result in results], self.merge_threshold)


class _SemanticMean:
    """The mean of semantic maps, of which one after the other is added."""

    def __init__(self, probabilities: bool) -> None:
        self._probabilities = probabilities
        self._labels: list[torch.Tensor] = []
        self._sum: torch.Tensor | None = None
        self._count = 0
        self.first: torch.Tensor | None = None

    def add(self, sem_seg: torch.Tensor) -> None:
        """Takes scores (C, H, W), or labels (H, W) of an integer type."""
        if self.first is None:
            self.first = sem_seg
        self._count += 1
        if sem_seg.dim() == 2:
            self._labels.append(sem_seg)
            return
        scores = sem_seg if self._probabilities else sem_seg.float().softmax(dim=0)
        self._sum = scores if self._sum is None else self._sum + scores

    def result(self) -> torch.Tensor:
        """Probabilities (C, H, W), or labels (H, W)."""
        return plurality(torch.stack(self._labels)) if self._sum is None else self._sum / self._count


def unflipped(result: Result) -> Result:
    """The result of a mirrored image, for the image itself; what it is made of stays as it was."""
    turned = dict(result)
    if "sem_seg" in result:
        turned["sem_seg"] = result["sem_seg"].flip(-1)
    if "panoptic_seg" in result:
        id_map, segments = result["panoptic_seg"]
        turned["panoptic_seg"] = (id_map.flip(-1), segments)
    if "instances" in result:
        turned["instances"] = _unflipped_instances(result["instances"])
    return turned


def _unflipped_instances(instances: Instances) -> Instances:
    width = instances.image_size[1]
    x1, y1, x2, y2 = instances.pred_boxes.tensor.unbind(dim=1)
    turned = Instances(instances.image_size, **instances.get_fields())
    turned.pred_boxes = Boxes(torch.stack([width - x2, y1, width - x1, y2], dim=1))
    if instances.has("pred_masks"):
        turned.pred_masks = instances.pred_masks.flip(-1)
    return turned


def with_test_time_augmentation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model that ``TEST.AUG`` asks for: ``model`` in a :class:`TestTimeAugmentation`, or as it is."""
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    if not cfg.TEST.AUG.ENABLED or getattr(unwrapped, "augments_itself", False):
        return model
    return TestTimeAugmentation(cfg, model)


def check_augmentation(cfg: CfgNode) -> None:
    """Finds values of ``TEST.AUG`` that cannot be carried out.

    Raises:
        ValueError: names the key and its value.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    ViewOptions.from_config(cfg)
    if not 0 < cfg.TEST.AUG.MERGE_THRESH <= 1:
        raise ValueError(f"TEST.AUG.MERGE_THRESH is {cfg.TEST.AUG.MERGE_THRESH}, not above 0 and at most 1")
    for key, value in (
        ("INPUT.TARGETS_IN_TEST", cfg.INPUT.TARGETS_IN_TEST),
        ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
    ):
        if value:
            raise ValueError(f"TEST.AUG.ENABLED and {key} are both True, but it is the image alone that is augmented")
