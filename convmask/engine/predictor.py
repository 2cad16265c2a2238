"""One image in, one prediction out."""

from __future__ import annotations

from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer
from convmask.engine.errors import errors_of_config
from convmask.inference import with_test_time_augmentation


class Predictor(DefaultPredictor):
    """Detectron2's predictor, loading weights as ``--eval-only`` does.

    Called with a BGR image of shape (H, W, 3) and type uint8, whatever ``INPUT.FORMAT`` is, it returns the model's
    output for it: ``instances``, ``sem_seg``, ``panoptic_seg`` at the size of the image, as far as the model has them;
    with ``TEST.AUG.ENABLED`` what its views agree on.

    Attributes:
        metadata: of the first data set in ``DATASETS.TEST``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Builds the model and loads ``MODEL.WEIGHTS``; with ``SOLVER.EMA`` the average that they hold.

        Args:
            cfg: complete, see :func:`convmask.engine.prepare`.

        Raises:
            ConfigError: no model can be built from the config.
            CheckpointError: the weights are unreadable, or of another model.
        """
        self.cfg = cfg.clone()
        with errors_of_config("the model"):
            self.model = build_model(self.cfg)
        self.model.eval()
        name = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unknown_classes__"
        self.metadata = MetadataCatalog.get(name)
        Checkpointer(self.model, policy="strict", average=cfg.SOLVER.EMA.ENABLED).load(cfg.MODEL.WEIGHTS)
        shortest = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
        self.model = with_test_time_augmentation(cfg, self.model)
        self.aug = T.ResizeShortestEdge(shortest, cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """See the class. Pixels stay uint8, as the mapper gives them, so that views are resized as in an evaluation."""
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        height, width = image.shape[:2]
        resized = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        with torch.no_grad():
            return self.model([{"image": tensor, "height": height, "width": width}])[0]
