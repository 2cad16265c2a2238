"""Which files the user means: names, folders and patterns, of images and videos."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


@dataclass
class Inputs:
    """Files found, in order and without repetition.

    Attributes:
        images: also files of unknown suffix that were named one by one.
        videos: files with a suffix of VIDEO_SUFFIXES.
        missing: names, folders and patterns that give no image and no video.
    """

    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def _add(self, path: Path) -> None:
        group = self.videos if path.suffix.lower() in VIDEO_SUFFIXES else self.images
        if path not in group:
            group.append(path)


def find_inputs(patterns: Iterable[str]) -> Inputs:
    """Finds files by name, all images and videos of a folder, and what matches a pattern such as ``photos/**/*.jpg``.

    A file or folder that has this very name is meant before a pattern.
    """
    inputs = Inputs()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = _pictures(file for file in path.iterdir() if not file.name.startswith("."))
        elif path.exists():
            files = [path]
        else:
            files = _pictures(Path(match) for match in glob.glob(str(path), recursive=True))
        if not files:
            inputs.missing.append(pattern)
        for file in files:
            inputs._add(file)
    return inputs


def _pictures(paths: Iterable[Path]) -> list[Path]:
    """The images and videos among ``paths``, sorted."""
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and path.is_file())


def output_names(paths: Iterable[Path]) -> list[str]:
    """A stem for the results of each file, all different, also if two folders hold files of one name."""
    used: set[str] = set()
    names = []
    for path in paths:
        name, count = path.stem, 1
        while name.lower() in used:
            count += 1
            name = f"{path.stem}_{count}"
        used.add(name.lower())
        names.append(name)
    return names
