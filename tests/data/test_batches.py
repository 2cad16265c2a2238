from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.data.batches import Draw, EpochSampler, MicroBatches, orientation_groups


def first(batches: MicroBatches, count: int, start: int = 0, step: int = 1) -> list[list[Draw]]:
    return list(islice(batches.start(start, step), count))


@given(
    size=st.integers(1, 12),
    images=st.integers(1, 5),
    start=st.integers(0, 40),
    step=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_sequence_is_the_same_wherever_it_is_entered(
    size: int, images: int, start: int, step: int, seed: int, data: st.DataObject
) -> None:
    groups = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=size, max_size=size))
    batches = MicroBatches(EpochSampler(size, seed), images, groups)
    whole = first(batches, start + 6 * step)
    assert first(batches, 6, start, step) == whole[start::step]
    if groups is not None:
        assert all(len({groups[draw.image] for draw in batch}) == 1 for batch in whole)


@given(size=st.integers(1, 20), images=st.integers(1, 6), groups=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_each_epoch_has_each_image_once(size: int, images: int, groups: int) -> None:
    batches = MicroBatches(EpochSampler(size, 5), images, [index % groups for index in range(size)])
    # However few of a group there are: after so many epochs each group has completed the first two.
    drawn = [draw for batch in first(batches, 2 * size + images * groups * 20) for draw in batch]
    for epoch in (0, 1):
        assert sorted(draw.image for draw in drawn if draw.epoch == epoch) == list(range(size))


def test_two_processes_see_what_one_sees_in_two_passes() -> None:
    batches = MicroBatches(EpochSampler(11, 1), 2)
    alone = first(batches, 12)
    ranks = [first(batches, 6, start=rank, step=2) for rank in range(2)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone


def test_epochs_and_seeds_differ() -> None:
    orders = [EpochSampler(50, seed).epoch(epoch)[0].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_repeated_images_are_drawn_as_often_as_asked_for_and_told_apart() -> None:
    sampler = EpochSampler(3, 0, repeat_factors=[1.0, 2.0, 2.5])
    counts: Counter[int] = Counter()
    for epoch in range(200):
        indices, occurrences = sampler.epoch(epoch)
        pairs = list(zip(indices.tolist(), occurrences.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        counts.update(indices.tolist())
    assert counts[0] == 200 and counts[1] == 400 and 460 < counts[2] < 540


def test_a_share_of_the_images_is_the_same_in_each_epoch() -> None:
    sampler = EpochSampler(20, 7, share=0.25)
    chosen = {tuple(sorted(sampler.epoch(epoch)[0].tolist())) for epoch in range(4)}
    assert len(chosen) == 1 and len(chosen.pop()) == 5


@pytest.mark.parametrize("options", [{"share": 0.1}, {"repeat_factors": [0.0, 0.0, 0.0]}])
def test_nothing_to_draw(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        EpochSampler(3, 0, **options)  # type: ignore[arg-type]


def test_groups_go_by_the_annotated_size() -> None:
    sizes = [(4, 3), (3, 4), (3, 3), (None, 3)]
    assert orientation_groups([{"width": w, "height": h} for w, h in sizes]) == [1, 0, 0, 2]
    assert orientation_groups([{}]) == [2]
