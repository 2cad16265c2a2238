from __future__ import annotations

import torch

from convmask.layers import append_coordinates


def test_rows_then_columns_from_minus_one_to_one() -> None:
    x = torch.randn(2, 3, 4, 5)
    result = append_coordinates(x)
    assert result.shape == (2, 5, 4, 5)
    assert torch.equal(result[:, :3], x)
    for image in result:
        torch.testing.assert_close(image[3], torch.linspace(-1, 1, 4)[:, None].expand(4, 5))
        torch.testing.assert_close(image[4], torch.linspace(-1, 1, 5).expand(4, 5))


def test_one_cell_is_at_minus_one() -> None:
    assert append_coordinates(torch.zeros(1, 1, 1, 1)).flatten().tolist() == [0, -1, -1]


def test_half_precision_stays() -> None:
    assert append_coordinates(torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
