from __future__ import annotations

import math

import pytest

from convmask.layers import sine_position_encoding


def test_against_the_definition_cell_by_cell() -> None:
    height, width, channels = 3, 5, 8
    found = sine_position_encoding(height, width, channels)
    assert found.shape == (channels, height, width)
    half = channels // 2
    for y in range(height):
        for x in range(width):
            for d in range(half):
                frequency = 10000 ** (2 * (d // 2) / half)
                wave = math.sin if d % 2 == 0 else math.cos
                row = (y + 1) / (height + 1e-6) * 2 * math.pi
                column = (x + 1) / (width + 1e-6) * 2 * math.pi
                assert found[d, y, x].item() == pytest.approx(wave(row / frequency), abs=1e-5)
                assert found[half + d, y, x].item() == pytest.approx(wave(column / frequency), abs=1e-5)


@pytest.mark.parametrize("channels", [0, 2, 6])
def test_channels_must_be_a_multiple_of_4(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels is {channels}"):
        sine_position_encoding(2, 2, channels)
