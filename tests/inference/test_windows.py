"""Pasting of windows, against the scaling of whole maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convmask.inference.windows import Size, paste_windows


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    scaled=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    fill=st.sampled_from([0.0, -10.0]),
)
def test_windows_are_pasted_as_whole_maps_are_scaled(seed: int, size: Size, scaled: Size, fill: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randint(s, (4,), generator=generator) for s in size[::-1]], 1)
    last = torch.minimum(first + torch.randint(0, 8, (4, 2), generator=generator), torch.tensor(size[::-1]))
    windows = torch.cat([first, last], 1)
    areas = (last - first).prod(1)
    offsets = torch.cat([areas.new_zeros(1), areas.cumsum(0)])
    values = torch.rand(int(areas.sum()), generator=generator, dtype=torch.float64)
    maps = torch.full((4, *size), fill, dtype=torch.float64)
    for k, (x1, y1, x2, y2) in enumerate(windows.tolist()):
        maps[k, y1:y2, x1:x2] = values[offsets[k] : offsets[k + 1]].view(y2 - y1, x2 - x1)
    expected = F.interpolate(maps[None], size=scaled, mode="bilinear", align_corners=False)[0]
    output = (max(scaled[0] - 2, 1), max(scaled[1] - 1, 1))
    expected = expected[:, : output[0], : output[1]]
    found = paste_windows(
        values, offsets, windows, size=size, scaled=scaled, output=output, fill=fill, threshold=0.4321
    )
    assert not ((found != (expected > 0.4321)) & ((expected - 0.4321).abs() > 1e-9)).any()


def test_pasting_refuses_what_it_cannot_do() -> None:
    empty = torch.zeros(0), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"fill is 1\.0, above"):
        paste_windows(*empty, size=(4, 4), scaled=(8, 8), output=(8, 8), fill=1.0, threshold=0.5)
    with pytest.raises(ValueError, match="output is"):
        paste_windows(*empty, size=(4, 4), scaled=(8, 8), output=(9, 8), fill=0.0, threshold=0.5)
