"""Annotation files may hold anything: they are read, or refused with one kind of error, and never crash."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convmask.data.errors import DatasetError
from convmask.data.instance import load_instances, thing_categories
from convmask.data.panoptic import load_panoptic, register_panoptic
from convmask.data.problems import Problem
from convmask.data.validation import validate_instances, validate_panoptic

SEGMENT = {"id": 1, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6, "iscrowd": 0, "isthing": 1}
CONTENT = {
    "categories": [{"id": 1, "name": "a", "isthing": 1}, {"id": 2, "name": "b", "isthing": 0, "color": [1, 2, 3]}],
    "images": [{"id": 1, "file_name": "a.png", "height": 2, "width": 3}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6, "iscrowd": 0, "file_name": "a.png",
         "segments_info": [SEGMENT], "segmentation": [[0, 0, 2, 0, 2, 2]], "keypoints": [1, 1, 2]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6,
         "segmentation": {"size": [2, 3], "counts": [2, 2, 2]}},
    ],
}  # fmt: skip

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "size", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a json value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [place for key, inner in items for place in ((value, key), *_places(inner))]


@pytest.fixture
def json_file(tmp_path):
    return tmp_path / "set.json"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.one_of(VALUES, st.just("remove")))
def test_any_value_anywhere(json_file: Path, seed: int, value: Any):
    content = copy.deepcopy(CONTENT)
    container, key = random.Random(seed).choice(_places(content))
    if value == "remove":
        del container[key]
    else:
        container[key] = value
    json_file.write_text(json.dumps(content))
    folder, file = str(json_file.parent), str(json_file)
    for problems in (validate_panoptic(folder, file, folder), validate_instances(folder, file)):
        assert all(isinstance(problem, Problem) and str(problem) for problem in problems)
    for load in (
        lambda: load_instances(folder, file),
        lambda: load_panoptic(folder, file, folder, lambda read: thing_categories(read["categories"])),
    ):
        try:
            assert load()
        except DatasetError as error:
            assert str(error)


def test_the_content_without_a_change_is_read(json_file):
    json_file.write_text(json.dumps(CONTENT))
    (record,) = load_instances("x", str(json_file))
    assert len(record["annotations"]) == 2


def test_documented_names_exist(repository):
    from detectron2.data import DatasetCatalog

    import convmask.data  # noqa: F401

    rows = [line for line in (repository / "docs/data.md").read_text().splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in row.split("|")[1].replace("`", "").replace("},", "};").split(";")]
    expanded = set()
    for name in names:
        prefix, _, rest = name.strip().partition("{")
        choices, _, suffix = rest.partition("}")
        expanded |= {f"{prefix}{choice}{suffix}" for choice in choices.split(",")} if choices else set()
    ours = {name for name in DatasetCatalog.list() if name.startswith(("convmask_", "nuclei_", "synthetic_"))}
    assert ours == expanded


def test_registration_does_not_read(json_file):
    json_file.write_text("{")
    register_panoptic("p3_broken", "x", json_file, "x")
