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
        missing: names and patterns that match nothing.
    """

    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def _add(self, path: Path, named: bool) -> None:
        suffix = path.suffix.lower()
        group = self.videos if suffix in VIDEO_SUFFIXES else self.images
        if (named or suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES) and path not in group:
            group.append(path)

    def _add_folder(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self._add(path, named=False)


def find_inputs(patterns: Iterable[str]) -> Inputs:
    """Finds files by name, all images and videos of a folder, and what matches a pattern such as ``photos/**/*.jpg``.

    A file or folder that has this very name is meant before a pattern.
    """
    inputs = Inputs()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            inputs._add_folder(path)
        elif path.exists():
            inputs._add(path, named=True)
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                inputs.missing.append(pattern)
            for match in matches:
                if match.is_file():
                    inputs._add(match, named=False)
    return inputs


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
