"""Pictures of scores, vectors and probabilities."""

from __future__ import annotations

import numpy as np
import torch

from convmask.visualization.maps import (
    enlarged,
    heat,
    input_picture,
    outlined,
    painted,
    principal_colors,
    scaled,
    shown_size,
    signed,
    tiles,
)


def test_the_longer_side_is_as_asked() -> None:
    assert shown_size(50, 100, 480) == (240, 480)
    assert shown_size(1000, 1, 480) == (480, 1)


def test_a_model_input_is_shown_in_rgb() -> None:
    image = torch.zeros(3, 4, 6)
    image[0] = 255  # blue of BGR
    assert input_picture({"image": image}, "BGR")[0, 0].tolist() == [0, 0, 255]
    assert input_picture({"image": image}, "RGB", (8, 12)).shape == (8, 12, 3)


def test_cells_stay_squares_where_asked() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 0] = 200
    assert set(np.unique(scaled(picture, (20, 20), smooth=False)).tolist()) == {0, 200}
    assert len(np.unique(scaled(picture, (20, 20)))) > 2


def test_maps_are_cut_to_the_image() -> None:
    maps = torch.zeros(1, 4, 8)
    maps[..., :2, :4] = 1.0  # the image; the rest is padding
    shown = enlarged(maps, padded=(32, 64), image=(12, 24), size=(24, 48))
    assert shown.shape == (1, 24, 48)
    assert torch.allclose(shown, torch.ones(()))
    assert enlarged(maps[:0], (32, 64), (12, 24), (5, 6)).shape == (0, 5, 6)


def test_colours_of_values() -> None:
    bright = heat(torch.tensor([[0.0, 0.5, 1.0, 9.0, float("nan")]])).astype(int).sum(axis=2)[0]
    assert bright[0] < bright[1] < bright[2] == bright[3]
    assert bright[4] == bright[0]
    blue, white, red = signed(np.array([[-2.0, 0.0, 2.0]]), 1.0)[0].tolist()
    assert blue[2] > blue[0] and red[0] > red[2] and min(white) > 240


def test_principal_colors_separate_what_differs_most() -> None:
    vectors = torch.randn(8, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.01
    vectors[3, :, 3:] += 10.0
    colors = principal_colors(vectors)
    assert colors.shape == (6, 6, 3)
    assert colors[:, 3:, 0].min() - colors[:, :3, 0].max() > 0.4
    # fewer dimensions than colours, and no variation at all
    assert principal_colors(torch.ones(1, 2, 2)).unique().tolist() == [0.5]


def test_probabilities_are_painted_over_the_image() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    picture = painted(image, maps, [(0, 200, 0)])
    assert picture[1, 1].tolist() == [35, 35, 35]
    assert picture[0, 0].tolist() == [10, 210, 10]
    assert painted(image, maps[:0], []).tolist() == np.full((2, 2, 3), 35).tolist()


def test_frames_and_tiles() -> None:
    picture = np.zeros((10, 12, 3), np.uint8)
    framed = outlined(picture, (2, 3, 8, 6), (255, 0, 0), 1)
    assert framed[3, 2].tolist() == [255, 0, 0] and not picture.any() and not framed[5, 5].any()
    sheet = tiles([[picture, picture], [picture]], gap=4)
    assert sheet.shape == (24, 28, 3)
    assert sheet[:10, 12:16].min() == 255 and sheet[14:, 16:].min() == 255 and not sheet[14:, :12].any()
