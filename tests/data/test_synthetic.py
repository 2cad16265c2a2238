from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from scipy import ndimage

import convmask.data  # noqa: F401
from convmask.data import synthetic
from convmask.data.errors import DatasetError
from convmask.data.images import read_image, read_panoptic_map
from convmask.data.synthetic_layout import HARD, STUFF, THINGS, Layout, draw_layout, place, shape_mask, smooth_fields

NAMES = tuple(f"synthetic_{split}" for split in synthetic.SPLITS)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]


# All arithmetic is on integers: these hold on every platform. They change with synthetic_layout.VERSION only.
PINNED = {
    ("panoptic_train", 0): ("71d2d352f0c33d9b", "7117c145a919c979"),
    ("panoptic_train", 999): ("3259031a73a611d6", "d20568718ba392f2"),
    ("panoptic_val", 7): ("cd3a8b6a5d413c17", "82d4f1eb03b9eff5"),
    ("panoptic_hard_train", 1): ("5f32b2b4b226f8d9", "862711e0b86860c3"),
    ("panoptic_hard_val", 2): ("4069cd465d50a00a", "1c375a944735c4a0"),
}


@pytest.mark.parametrize(("split", "index"), PINNED)
def test_pictures_are_the_same_everywhere(split: str, index: int) -> None:
    layout = synthetic.synthetic_layout(split, index)
    found = digest(layout.ids.astype("<i4")), digest(synthetic.synthetic_image(split, index))
    assert found == PINNED[split, index]


_OTHER_PROCESS = """
import hashlib
from convmask.data.synthetic import synthetic_image
for index in (3, 0, 2):
    print(hashlib.sha256(synthetic_image("panoptic_hard_val", index)).hexdigest()[:16])
"""


def test_other_processes_draw_the_same_in_any_order() -> None:
    command = [sys.executable, "-W", "ignore", "-c", _OTHER_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    own = {index: digest(synthetic.synthetic_image("panoptic_hard_val", index)) for index in (0, 2, 3)}
    assert done.stdout.split() == [own[3], own[0], own[2]]


def test_global_generators_are_left_alone() -> None:
    drawn = []
    for index in (None, 998, 999):
        np.random.seed(1)
        random.seed(1)
        torch.manual_seed(1)
        if index is not None:
            synthetic.synthetic_image("panoptic_train", index)
        drawn.append((np.random.random(), random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1] == drawn[2]


def test_no_image_is_in_two_splits() -> None:
    digests = [digest(synthetic.synthetic_image(split, index)) for split in synthetic.SPLITS for index in range(20)]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", NAMES)
def test_records_agree_with_the_files(name: str) -> None:
    records = DatasetCatalog.get(name)
    assert len(records) == synthetic.SPLITS[name.removeprefix("synthetic_")].count
    assert len({record["image_id"] for record in records}) == len(records)
    metadata = MetadataCatalog.get(name)
    for record in records[:24]:
        image, ids = read_image(record["file_name"], "RGB"), read_panoptic_map(record["pan_seg_file_name"])
        assert image.shape == (record["height"], record["width"], 3)
        assert ids.shape == image.shape[:2]
        assert {segment["id"] for segment in record["segments_info"]} == set(np.unique(ids).tolist()) - {0}
        for segment in record["segments_info"]:
            mask = ids == segment["id"]
            rows, columns = np.nonzero(mask)
            assert segment["area"] == mask.sum()
            x, y, width, height = segment["bbox"]
            assert (x, y, x + width, y + height) == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )
            classes = metadata.thing_classes if segment["isthing"] else metadata.stuff_classes
            assert classes[segment["category_id"]] in (THINGS if segment["isthing"] else STUFF)
        things = [segment["id"] for segment in record["segments_info"] if segment["isthing"]]
        assert [annotation["segment_id"] for annotation in record["annotations"]] == things


def test_records_are_copies() -> None:
    DatasetCatalog.get("synthetic_panoptic_val")[0]["segments_info"].clear()
    assert DatasetCatalog.get("synthetic_panoptic_val")[0]["segments_info"]


def test_the_moderate_split_is_moderate() -> None:
    records = DatasetCatalog.get("synthetic_panoptic_train")
    classes: defaultdict[tuple[bool, int], int] = defaultdict(int)
    for record in records:
        assert 112 <= record["height"] <= 128
        assert 112 <= record["width"] <= 128
        # An object may end up with the few pixels that the border of the image leaves.
        assert 2 <= len(record["annotations"]) <= 6
        assert 1 <= len(record["segments_info"]) - len(record["annotations"]) <= 3
        assert not any(segment["iscrowd"] for segment in record["segments_info"])
        assert min(segment["area"] for segment in record["segments_info"] if segment["isthing"]) >= 60
        for segment in record["segments_info"]:
            classes[segment["isthing"], segment["category_id"]] += 1
    assert len(classes) == len(THINGS) + len(STUFF)
    assert min(classes.values()) > 300


def test_the_hard_split_is_hard() -> None:
    records = DatasetCatalog.get("synthetic_panoptic_hard_val")
    segments = [(record, segment) for record in records for segment in record["segments_info"] if segment["isthing"]]
    shares = [segment["area"] / (record["height"] * record["width"]) for record, segment in segments]
    assert sum(not record["annotations"] for record in records) >= 5
    assert sum(segment["iscrowd"] for _, segment in segments) >= 10
    assert min(segment["area"] for _, segment in segments) == 1
    assert max(shares) > 0.5
    assert max(len(record["annotations"]) for record in records) >= 20
    void = [(read_panoptic_map(record["pan_seg_file_name"]) == 0).any() for record in records]
    assert 5 < sum(void) < len(records)
    # In pieces: heavy occlusion.
    layouts = [synthetic.synthetic_layout("panoptic_hard_val", index) for index in range(16)]
    assert any(_pieces(layout) > 1 for layout in layouts)


def _pieces(layout: Layout) -> int:
    things = [number for number, s in enumerate(layout.segments, 1) if s.isthing and not s.iscrowd]
    return max((ndimage.label(layout.order == number)[1] for number in things), default=0)


def test_colour_does_not_give_the_class() -> None:
    """The nearest mean colour among the segments of other images finds the class hardly more often than chance."""
    colors: dict[bool, list[np.ndarray]] = {True: [], False: []}
    classes: dict[bool, list[str]] = {True: [], False: []}
    for index in range(250):
        layout, image = (
            synthetic.synthetic_layout("panoptic_train", index),
            synthetic.synthetic_image("panoptic_train", index),
        )
        for number, segment in enumerate(layout.segments, 1):
            colors[segment.isthing].append(image[layout.order == number].mean(axis=0))
            classes[segment.isthing].append(segment.name)
    for isthing, names in ((True, THINGS), (False, STUFF)):
        points, labels = np.array(colors[isthing]), np.array(classes[isthing])
        distances = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
        np.fill_diagonal(distances, np.inf)
        assert (labels[distances.argmin(axis=1)] == labels).mean() < 1 / len(names) + 0.15


@pytest.mark.parametrize("name", THINGS)
def test_shapes(name: str) -> None:
    assert shape_mask(name, 1).tolist() == [[True]]
    areas = {"disc": 0.785, "square": 0.5, "triangle": 0.325, "star": 0.31, "ring": 0.537}
    for diameter in (20, 40, 54):
        mask = shape_mask(name, diameter, 30)
        assert mask.shape[0] % 2 == 1
        assert mask.sum() / diameter**2 == pytest.approx(areas[name], abs=0.07)
    assert bool(shape_mask(name, 40)[20, 20]) == (name != "ring")


def test_place_cuts_at_the_border() -> None:
    mask = shape_mask("disc", 9)
    where, part = place(mask, (0, 9), (10, 10))
    assert where == (slice(0, 5), slice(5, 10))
    np.testing.assert_array_equal(part, mask[4:, :5])


def test_smooth_fields_are_smooth() -> None:
    fields = smooth_fields(np.random.default_rng(0), 3, (90, 70))
    assert fields.shape == (3, 90, 70)
    assert fields.min() >= 0
    assert fields.max() < 1024
    assert np.abs(np.diff(fields, axis=1)).max() < 40


def test_an_index_beyond_the_split_draws_too() -> None:
    assert draw_layout(HARD, 2, 123_456).order.shape == draw_layout(HARD, 2, 123_456).order.shape


@pytest.mark.parametrize(
    "path",
    [
        "synthetic://panoptic_train/images/001000.png",
        "synthetic://panoptic_val/images/12.png",
        "synthetic://nothing/images/000000.png",
        "synthetic://panoptic_val/panoptic/000000.jpg",
        "synthetic://panoptic_val/../000000.png",
        "synthetic://",
    ],
)
def test_unknown_files_are_refused(path: str) -> None:
    assert not PathManager.exists(path)
    assert not PathManager.isfile(path)
    with pytest.raises(FileNotFoundError, match="no synthetic file"):
        PathManager.open(path, "rb")
    with pytest.raises(DatasetError, match="no synthetic file"):
        read_image(path, "RGB")


def test_files_are_read_only() -> None:
    path = "synthetic://panoptic_val/images/000000.png"
    assert PathManager.exists(path)
    with pytest.raises(OSError, match="'wb'"):
        PathManager.open(path, "wb")


def test_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "get_cache_dir", lambda: str(tmp_path))
    path = "synthetic://panoptic_val/panoptic/000007.png"
    local = PathManager.get_local_path(path)
    assert Path(local).is_relative_to(tmp_path)
    np.testing.assert_array_equal(read_panoptic_map(local), read_panoptic_map(path))
    assert len(list(Path(local).parent.iterdir())) == 1


def test_registering_twice_does_no_harm() -> None:
    synthetic.register_all()
    assert set(NAMES) <= set(DatasetCatalog.list())
