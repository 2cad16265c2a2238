from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from convmask.inference import vote_panoptic
from convmask.inference.panoptic_views import plurality

Segment = tuple[int, bool, int, float | None]


def view(id_map: Any, *segments: Segment) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Segments (id, isthing, class, score)."""
    infos = [
        {"id": i, "isthing": t, "category_id": c, **({} if s is None else {"score": s})} for i, t, c, s in segments
    ]
    return torch.as_tensor(np.asarray(id_map), dtype=torch.int32), infos


def columns(*runs: tuple[int, int]) -> np.ndarray:
    """A map of 4 rows: so many columns of each id."""
    return np.tile(np.repeat([value for value, _ in runs], [width for _, width in runs]), (4, 1))


def test_one_view_is_as_it_was() -> None:
    given = view(columns((7, 3), (0, 2), (2, 5)), (2, False, 4, 0.5), (7, True, 1, 0.9))
    id_map, segments = vote_panoptic([given])
    assert id_map.tolist() == columns((1, 3), (0, 2), (2, 5)).tolist() and id_map.dtype == torch.int32
    assert segments == [
        {"id": 1, "isthing": True, "category_id": 1, "area": 12, "score": 0.9},
        {"id": 2, "isthing": False, "category_id": 4, "area": 20, "score": 0.5},
    ]


def test_most_views_decide_pixel_by_pixel() -> None:
    things = [(1, True, 0, 0.9), (2, False, 1, None)]
    views = [view(columns((1, width), (2, 10 - width)), *things) for width in (4, 5, 5)]
    id_map, segments = vote_panoptic(views)
    names = {segment["id"]: segment for segment in segments}
    assert [names[i]["category_id"] for i in id_map[0].tolist()] == [0] * 5 + [1] * 5
    assert [names[int(id_map[0, x])]["isthing"] for x in (0, 9)] == [True, False]
    assert names[int(id_map[0, 0])]["score"] == pytest.approx(0.9) and "score" not in names[int(id_map[0, 9])]


def test_a_thing_of_one_view_in_three_is_outvoted() -> None:
    stuff = (2, False, 1, None)
    views = [view(columns((1, 4), (2, 6)), (1, True, 0, 0.9), stuff), *[view(columns((2, 10)), stuff)] * 2]
    id_map, segments = vote_panoptic(views)
    assert [segment["isthing"] for segment in segments] == [False]
    assert (id_map == 1).all()


def test_neighbours_of_one_class_stay_two() -> None:
    pair = [(1, True, 0, 0.9), (2, True, 0, 0.8)]
    views = [view(columns((1, 5), (2, 5)), *pair), view(columns((2, 6), (1, 4)), *pair)]
    id_map, segments = vote_panoptic(views)
    assert len(segments) == 2
    assert len(set(id_map[0, :5].tolist())) == 1 and len(set(id_map[0].tolist())) == 2


def test_void_has_a_vote_but_loses_a_tie() -> None:
    thing = (1, True, 0, 0.9)
    full, empty = view(columns((1, 6)), thing), view(columns((0, 6)))
    assert (vote_panoptic([full, empty])[0] == 1).all()
    id_map, segments = vote_panoptic([full, empty, empty])
    assert not id_map.any() and segments == []


def test_what_keeps_a_sliver_goes_to_the_others() -> None:
    # the thing of class 1 wins only where the others disagree about the border
    views = [
        view(columns((1, 5), (2, 5)), (1, True, 0, 0.9), (2, False, 1, None)),
        view(columns((1, 6), (2, 4)), (1, True, 0, 0.9), (2, False, 1, None)),
        view(columns((1, 2), (3, 6), (2, 2)), (1, True, 0, 0.2), (2, False, 1, None), (3, True, 1, 0.99)),
    ]
    id_map, segments = vote_panoptic(views)
    assert {(segment["isthing"], segment["category_id"]) for segment in segments} == {(True, 0), (False, 1)}
    assert id_map.min() == 1


def test_plurality_against_counting() -> None:
    labels = torch.randint(0, 4, (5, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for ignored in (None, 3):
        found = plurality(labels, ignored)
        for y, x in np.ndindex(6, 7):
            counts = np.bincount(labels[:, y, x], minlength=4)
            if ignored is not None and counts[:3].any():
                counts[ignored] = 0
            assert int(found[y, x]) == int(counts.argmax())


def test_views_without_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="no view"):
        vote_panoptic([])
    with pytest.raises(ValueError, match="without segments_info"):
        vote_panoptic([(torch.zeros(2, 2), None)])  # type: ignore[list-item]
