"""What a trained model predicts, beside the ground truth, and its results as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from rich.table import Table

from convmask.data.images import read_image
from convmask.engine.trainer import Trainer
from convmask.visualization import contact_sheet, ground_truth, panels, save_image


def draw_examples(
    cfg: CfgNode, model: torch.nn.Module, folder: Path, count: int = 8, threshold: float = 0.0, scale: int | None = 2
) -> list[Path]:
    """Draws ``count`` images spread over the test set: one picture each, and all on one sheet.

    Args:
        cfg: whose first set of ``DATASETS.TEST`` is drawn.
        model: set to evaluation mode.
        folder: for the files.
        count: of images.
        threshold: predicted objects with a lower score are left out.
        scale: enlargement on the sheet; None: small images get one.

    Returns:
        The files, the sheet first.
    """
    name = cfg.DATASETS.TEST[0]
    metadata, dicts = MetadataCatalog.get(name), DatasetCatalog.get(name)
    chosen = np.unique(np.linspace(0, len(dicts) - 1, count).astype(int)).tolist()
    model.eval()
    loader = Trainer.build_test_loader(cfg, name)
    rows, paths = [], []
    for index in chosen:
        batch = [loader.dataset[index]]
        with torch.no_grad():
            prediction = model(batch)[0]
        image, truth = read_image(dicts[index]["file_name"], "RGB"), ground_truth(dicts[index])
        single = contact_sheet([panels(image, prediction, truth, metadata, threshold=threshold)])
        paths.append(save_image(folder / f"{index:04d}.png", single))
        rows.append(panels(image, prediction, truth, metadata, scale=scale, threshold=threshold))
    return [save_image(folder / "contact_sheet.png", contact_sheet(rows, groups=2)), *paths]


def results_table(results: Mapping[str, Mapping[str, float]], title: str = "Held-out images, in percent") -> Table:
    """PQ, SQ and RQ of all classes, things and stuff; beside them AP and mIoU."""
    table = Table(title=title)
    for column in ("", "PQ", "SQ", "RQ", "box AP", "mask AP", "mIoU"):
        table.add_column(column, justify="right" if column else "left")

    def number(task: str, key: str) -> str:
        value = results.get(task, {}).get(key)
        return "-" if value is None else f"{value:.1f}"

    for label, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st")):
        quality = [number("panoptic_seg", f"{key}{suffix}") for key in ("PQ", "SQ", "RQ")]
        aps = [number("bbox", "AP"), number("segm", "AP")] if label == "things" else ["", ""]
        table.add_row(label, *quality, *aps, number("sem_seg", "mIoU") if label == "all" else "")
    return table
