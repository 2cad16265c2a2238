from __future__ import annotations

import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.data.categories import PanopticCategories, SemanticCategories
from convmask.data.errors import DatasetError

ENTRIES = [
    {"id": 7, "name": "cell", "isthing": 1, "color": [10, 20, 30]},
    {"id": 3, "name": "sky", "isthing": 0},
    {"id": 5, "name": "ball", "isthing": 1},
    {"id": 90, "name": "ground", "isthing": 0},
]


def test_contiguous_ids_follow_the_order_of_category_ids():
    categories = PanopticCategories.from_coco(ENTRIES)
    assert categories.thing_ids == {5: 0, 7: 1}
    assert categories.stuff_ids == {3: 1, 90: 2}
    assert [categories.contiguous_id(i) for i in (5, 7, 3, 90)] == [0, 1, 1, 2]
    assert categories.by_id[7].color == (10, 20, 30)


def test_semantic_labels_of_both_layouts():
    categories = PanopticCategories.from_coco(ENTRIES)
    assert [categories.semantic_label(i, "separated") for i in (5, 7, 3, 90)] == [0, 0, 1, 2]
    assert [categories.semantic_label(i, "all") for i in (5, 7, 3, 90)] == [0, 1, 2, 3]
    assert categories.semantic_classes("separated") == ["things", "sky", "ground"]
    assert categories.semantic_classes("all") == ["ball", "cell", "sky", "ground"]
    assert (categories.num_semantic("separated"), categories.num_semantic("all")) == (3, 4)
    assert categories.thing_labels("separated") == (0,)
    assert categories.thing_labels("all") == (0, 1)
    assert categories.stuff_labels("separated") == (1, 2)
    assert categories.stuff_labels("all") == (2, 3)


def test_labels_in_the_order_of_category_ids():
    categories = PanopticCategories.from_coco(ENTRIES, "category_id")
    assert categories.semantic_classes("all") == ["sky", "ball", "cell", "ground"]
    assert categories.thing_labels("all") == (1, 2)
    assert categories.stuff_labels("all") == (0, 3)
    assert categories.semantic_classes("separated") == ["things", "sky", "ground"]


def test_metadata_of_coco_are_those_of_detectron2():
    from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

    ours, theirs = (
        PanopticCategories.from_coco(COCO_CATEGORIES).metadata(),
        _get_builtin_metadata("coco_panoptic_separated"),
    )
    for key in ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id", "stuff_colors"):
        assert ours[key] == theirs[key]
    assert ours["stuff_dataset_id_to_contiguous_id"] == theirs["stuff_dataset_id_to_contiguous_id"]
    assert [name.replace("-other", "").replace("-merged", "") for name in ours["stuff_classes"]] == theirs[
        "stuff_classes"
    ]


def test_things_label_does_not_take_a_category_id():
    categories = PanopticCategories.from_coco([{"id": 0, "name": "wall", "isthing": 0}])
    assert categories.metadata()["stuff_dataset_id_to_contiguous_id"] == {-1: 0, 0: 1}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 10**6), st.booleans(), min_size=1, max_size=30), st.booleans())
def test_every_category_has_its_own_class_and_label(kinds: dict[int, bool], by_id: bool):
    entries = [{"id": i, "name": f"c{i}", "isthing": int(isthing)} for i, isthing in kinds.items()]
    categories = PanopticCategories.from_coco(entries, "category_id" if by_id else "things_first")
    for identity, isthing in kinds.items():
        contiguous = categories.contiguous_id(identity)
        assert categories.category_id(contiguous, isthing) == identity
        label = categories.semantic_label(identity, "all")
        assert categories.semantic_label_of(contiguous, isthing, "all") == label
        assert categories.semantic_classes("all")[label] == f"c{identity}"
        assert (categories.semantic_label(identity, "separated") == 0) == isthing
    labels = categories.thing_labels("all") + categories.stuff_labels("all")
    assert sorted(labels) == list(range(len(kinds)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "categories is not a list with at least one category"),
        ([{"id": 1, "name": "a"}], "categories[0].isthing is neither 0 nor 1"),
        ([{"id": "1", "name": "a", "isthing": 1}], "categories[0].id is not an integer"),
        ([{"id": 1, "name": "", "isthing": 1}], "categories[0].name is not a name"),
        ([{"id": 1, "name": "a", "isthing": 1, "color": [1, 2, 300]}], "categories[0].color"),
        ([{"id": 1, "name": "a", "isthing": 1}, {"id": 1, "name": "b", "isthing": 1}], "category id 1 occurs twice"),
        (
            [{"id": 1, "name": "a", "isthing": 1}, {"id": 1, "name": "a", "isthing": 0}],
            "once as a thing and once as stuff",
        ),
        ([{"id": 1, "name": "a", "isthing": 1}, {"id": 2, "name": "a", "isthing": 0}], "'a' is a thing in one entry"),
        (["x"], "categories[0] is not an object"),
    ],
)
def test_malformed_categories_are_refused(entries, message):
    with pytest.raises(DatasetError) as error:
        PanopticCategories.from_coco(entries)
    assert message in str(error.value)


def test_unknown_ids_and_layouts_are_errors():
    categories = PanopticCategories.from_coco(ENTRIES)
    with pytest.raises(DatasetError, match="unknown category id 4"):
        categories.contiguous_id(4)
    with pytest.raises(DatasetError, match="no stuff class 3"):
        categories.category_id(3, isthing=False)
    with pytest.raises(DatasetError, match="no stuff class 0"):
        categories.category_id(0, isthing=False)
    with pytest.raises(DatasetError, match="semantic layout is 'both'"):
        categories.semantic_label(3, "both")  # type: ignore[arg-type]


def test_semantic_only_classes_are_their_labels():
    categories = SemanticCategories.from_names(["a", "b", "c"], [[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    for layout in ("separated", "all"):
        assert [categories.semantic_label(i, layout) for i in range(3)] == [0, 1, 2]
        assert categories.num_semantic(layout) == 3
        assert categories.stuff_labels(layout) == (0, 1, 2)
        assert categories.thing_labels(layout) == ()
    assert categories.contiguous_id(2) == 2
    assert categories.metadata()["stuff_colors"] == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
