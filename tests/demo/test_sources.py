"""Which files are meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convmask.data.errors import DatasetError
from convmask.demo import VideoReader, VideoWriter, find_inputs
from convmask.demo.sources import output_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.JPG", "a.png", "notes.txt", "clip.mp4", ".hidden.png", "sub/c.png", "odd[1].png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_a_folder_gives_its_images_and_videos(folder: Path) -> None:
    inputs = find_inputs([str(folder)])
    assert [path.name for path in inputs.images] == ["a.png", "b.JPG", "odd[1].png"]
    assert [path.name for path in inputs.videos] == ["clip.mp4"]


def test_patterns_names_and_what_is_missing(folder: Path) -> None:
    patterns = [str(folder / "**/*.png"), str(folder / "notes.txt"), str(folder / "odd[1].png"), str(folder / "*.gif")]
    inputs = find_inputs(patterns)
    names = sorted(path.name for path in inputs.images)
    # A file that is named is taken whatever its suffix; nothing is taken twice.
    assert names == ["a.png", "c.png", "notes.txt", "odd[1].png"]
    assert inputs.missing == [str(folder / "*.gif")]


def test_folders_and_patterns_without_a_picture_are_missing(folder: Path) -> None:
    (folder / "empty").mkdir()
    patterns = [str(folder / "empty"), str(folder / "*.txt"), str(folder / "em*"), str(folder / "a.png")]
    inputs = find_inputs([*patterns, str(folder / "a.*")])
    assert inputs.missing == patterns[:3]
    assert [path.name for path in inputs.images] == ["a.png"]


def test_equal_names_get_different_outputs() -> None:
    paths = [Path("x/a.png"), Path("y/a.jpg"), Path("a_2.png"), Path("z/A.png")]
    names = output_names(paths)
    assert names[0] == "a"
    assert len({name.lower() for name in names}) == 4


def test_a_video_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 12.5) as writer:
        for level in (0, 120, 240):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[..., 0] = level
            writer.write(frame)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    with VideoReader(path) as reader:
        assert reader.fps == pytest.approx(12.5)
        frames = list(reader)
    assert len(frames) == reader.count == 3
    assert frames[0].shape == (48, 64, 3)
    # RGB in, BGR out
    assert [round(float(frame[..., 2].mean()) / 120) for frame in frames] == [0, 1, 2]


def test_a_video_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "clip.mp4", 25) as writer:
        writer.write(np.zeros((16, 16, 3), np.uint8))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_a_broken_video_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"broken\.mp4"):
        VideoReader(path)
