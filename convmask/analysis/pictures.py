"""Pictures of single images: what was predicted, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pycocotools.mask as mask_util

from convmask.analysis.dataset import AnalysedDataset
from convmask.analysis.regions import Region, RegionMatches
from convmask.analysis.run import RunAnalysis
from convmask.data.images import read_image
from convmask.visualization import Segment, contact_sheet, draw_segments
from convmask.visualization.colors import Color, class_color, object_color
from convmask.visualization.draw import default_scale, enlarge

# Colours that are told apart by those who do not tell red from green.
RIGHT: Color = (0, 158, 115)
CONFUSED: Color = (240, 190, 40)
FALSE: Color = (213, 60, 0)
MISSED: Color = (40, 110, 230)
LEGEND = "green: right; yellow: right place, wrong class; red: false positive; blue: missed"


def region_segment(region: Region, dataset: AnalysedDataset, color: Color | None = None, name: str = "") -> Segment:
    """A region as it is drawn: by default in the colour and with the name of its class."""
    left, top, width, height = (int(value) for value in mask_util.toBbox(region.code))
    mask = np.asarray(mask_util.decode(region.code)).astype(bool)
    isthing = dataset.is_thing(region.category_id)
    if color is None:
        index = dataset.class_index(region.category_id)
        center = (left + width / 2) / mask.shape[1], (top + height / 2) / mask.shape[0]
        color = class_color(dataset.metadata, index, isthing)
        color = object_color(color, center, one_class=len(dataset.thing_names) == 1) if isthing else color
    crop = mask[top : top + height, left : left + width]
    return Segment(crop, top, left, name or class_name(region, dataset), region.score, color, isthing)


def class_name(region: Region, dataset: AnalysedDataset) -> str:
    """The name of a region's class."""
    names = dataset.segment_names if dataset.is_panoptic else dataset.thing_names
    return names[region.category_id]


def draw_regions(image: np.ndarray, regions: Sequence[Region], dataset: AnalysedDataset, scale: int) -> np.ndarray:
    """Regions in the colours of their classes on an RGB image; see :func:`draw_segments`."""
    return draw_segments(image, [region_segment(region, dataset) for region in _seen(regions)], scale, scores=False)


def draw_errors(
    image: np.ndarray,
    found: Sequence[Region],
    truth: Sequence[Region],
    matches: RegionMatches,
    dataset: AnalysedDataset,
    scale: int,
) -> np.ndarray:
    """Predictions and missed regions on an RGB image, coloured by what they are (``LEGEND``).

    Stuff that is right is not painted.
    """
    segments = []
    for row, column, _ in matches.pairs:
        region, true = found[row], truth[column]
        if region.category_id != true.category_id:
            name = f"{class_name(region, dataset)} (is {class_name(true, dataset)})"
            segments.append(region_segment(region, dataset, CONFUSED, name))
        elif dataset.is_thing(region.category_id):
            segments.append(region_segment(region, dataset, RIGHT))
    segments += [region_segment(found[row], dataset, FALSE) for row in matches.false]
    segments += [region_segment(truth[column], dataset, MISSED) for column in matches.missed]
    return draw_segments(image, [s for s in segments if s.mask.size], scale)


def _seen(regions: Sequence[Region]) -> list[Region]:
    return [region for region in regions if mask_util.area(region.code)]


def picture(runs: Sequence[RunAnalysis], names: Sequence[str], kind: str, image_id: Hashable) -> np.ndarray:
    """One row: the image, the ground truth, and for each run its prediction and its errors.

    Args:
        runs: on one dataset.
        names: of the runs, for the captions; one run needs none.
        kind: "instances" or "panoptic".
        image_id: of the dataset.

    Returns:
        (H', W', 3) uint8, RGB.

    Raises:
        DatasetError: the image, or a panoptic map, cannot be read.
    """
    dataset = runs[0].results.dataset
    image = read_image(dataset.records[image_id]["file_name"], "RGB")
    scale = default_scale(*image.shape[:2])
    parts = [run.regions(kind, image_id) for run in runs]
    cells, captions = [enlarge(image, scale)], ["image"]
    cells.append(draw_regions(image, parts[0][1], dataset, scale))
    captions.append("ground truth")
    for (found, truth, matches), name in zip(parts, names, strict=True):
        cells += [draw_regions(image, found, dataset, scale), draw_errors(image, found, truth, matches, dataset, scale)]
        captions += [f"{name}: {caption}" if len(runs) > 1 else caption for caption in ("prediction", "errors")]
    return contact_sheet([cells], captions, panel_height=min(480, cells[0].shape[0]))
