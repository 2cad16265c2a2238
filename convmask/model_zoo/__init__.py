"""Models by name, as in ``detectron2.model_zoo``, and the list of all configs with their results.

    from convmask import model_zoo

    model = model_zoo.get("panoptic_fpn_R_50_3x", trained=True)
    model = model_zoo.get("quick/fcis_nuclei.yaml", weights="output/fcis_nuclei/model_final.pth", device="cpu")
    cfg = model_zoo.get_config("knet_panoptic_R_50_1x")

``python -m convmask.model_zoo`` prints the list.
"""

from __future__ import annotations

from convmask.model_zoo.listing import Model, list_models, table
from convmask.model_zoo.models import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["Model", "get", "get_checkpoint_url", "get_config", "get_config_file", "list_models", "table"]
