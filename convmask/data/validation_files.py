"""Checks of the pictures, panoptic PNG files and semantic maps that annotations name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from detectron2.utils.file_io import PathManager

from convmask.data.errors import DatasetError
from convmask.data.images import read_image, read_panoptic_map, read_semantic_map
from convmask.data.problems import Problem

_BATCH = 64


@dataclass(frozen=True)
class Files:
    """The files of one image, and what the annotations say about them.

    Attributes:
        source: the annotation file or dataset, for messages.
        image: the image, for messages.
        file_name: the picture.
        height: in pixels, if the annotations say so; width likewise.
        pan_seg_file_name: the panoptic PNG, if any, and ``segment_ids``, those listed.
        sem_seg_file_name: the semantic map, if any, whose labels are below ``num_labels`` or ``ignore_label``.
    """

    source: str
    image: str
    file_name: str
    height: int | None = None
    width: int | None = None
    pan_seg_file_name: str | None = None
    segment_ids: tuple[int, ...] = ()
    sem_seg_file_name: str | None = None
    num_labels: int | None = None
    ignore_label: int = 255


def existence_problems(files: Iterable[Files]) -> Iterator[Problem]:
    """Missing files. Each folder is listed once, which is cheap on network file systems too."""
    folders: dict[str, set[str] | None] = {}
    for entry in files:
        for field in ("file_name", "pan_seg_file_name", "sem_seg_file_name"):
            path = getattr(entry, field)
            if path is not None and not _exists(path, folders):
                yield Problem(entry.source, entry.image, field, f"no file {path}")


def _exists(path: str, folders: dict[str, set[str] | None]) -> bool:
    folder, name = os.path.split(path)
    if folder not in folders:
        try:
            folders[folder] = set(PathManager.ls(folder))
        except Exception:  # Not every kind of path can be listed.
            folders[folder] = None
    listed = folders[folder]
    try:
        return PathManager.isfile(path) if listed is None else name in listed
    except (OSError, ValueError):
        return False


def content_problems(
    files: Sequence[Files], progress: Callable[[Iterable[Files]], Iterable[Files]] = iter
) -> Iterator[Problem]:
    """Decodes every file, several at a time, and compares sizes, segment ids and labels.

    Args:
        files: what to read. Files that do not exist are passed over.
        progress: wraps the iteration, for a progress bar.
    """
    # Not more at a time than a batch, so that whoever stops early does not wait for the rest.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        batch: list[Files] = []
        for entry in progress(files):
            batch.append(entry)
            if len(batch) == _BATCH:
                yield from (problem for found in pool.map(_decoded_problems, batch) for problem in found)
                batch = []
        yield from (problem for found in pool.map(_decoded_problems, batch) for problem in found)


def _decoded_problems(entry: Files) -> list[Problem]:
    problems = []

    def report(field: str, message: str) -> None:
        problems.append(Problem(entry.source, entry.image, field, message))

    size = _picture_size(entry, report)
    checks = (("pan_seg_file_name", _panoptic_map), ("sem_seg_file_name", _semantic_map))
    for field, check in checks:
        path = getattr(entry, field)
        if path is None or not PathManager.isfile(path):
            continue
        try:
            found = check(entry, report)
        except DatasetError as error:
            report(field, str(error))
            continue
        if size is not None and found != size:
            message = (
                f"{path} is of {found[1]} x {found[0]} pixels, the picture and its annotation of {size[1]} x {size[0]}"
            )
            report(field, message)
    return problems


def _picture_size(entry: Files, report: Callable[[str, str], None]) -> tuple[int, int] | None:
    """(height, width) that maps must have."""
    annotated = (entry.height, entry.width) if entry.height is not None and entry.width is not None else None
    if not PathManager.isfile(entry.file_name):
        return annotated
    try:
        height, width = read_image(entry.file_name, "RGB").shape[:2]
    except DatasetError as error:
        report("file_name", str(error))
        return annotated
    if annotated not in (None, (height, width)):
        message = f"{entry.file_name} is of {width} x {height} pixels, annotated are {entry.width} x {entry.height}"
        report("width, height", message)
    return annotated or (height, width)


def _panoptic_map(entry: Files, report: Callable[[str, str], None]) -> tuple[int, int]:
    assert entry.pan_seg_file_name is not None
    ids = read_panoptic_map(entry.pan_seg_file_name)
    drawn, listed = set(_values(ids)) - {0}, set(entry.segment_ids)
    for identity in sorted(listed - drawn):
        report("segments_info", f"segment id {identity} is not in {entry.pan_seg_file_name}")
    for identity in sorted(drawn - listed)[:10]:
        report("segments_info", f"id {identity} of {entry.pan_seg_file_name} is not in segments_info")
    if len(drawn - listed) > 10:
        report("segments_info", f"{len(drawn - listed) - 10} more ids of {entry.pan_seg_file_name} are not there")
    return ids.shape[0], ids.shape[1]


def _semantic_map(entry: Files, report: Callable[[str, str], None]) -> tuple[int, int]:
    assert entry.sem_seg_file_name is not None
    labels = read_semantic_map(entry.sem_seg_file_name)
    if entry.num_labels is not None:
        wrong = [value for value in _values(labels) if value >= entry.num_labels and value != entry.ignore_label]
        if wrong:
            allowed = f"0 to {entry.num_labels - 1} and {entry.ignore_label} (ignored)"
            report("sem_seg_file_name", f"{entry.sem_seg_file_name} holds {sorted(wrong)[:10]}; labels are {allowed}")
    return labels.shape[0], labels.shape[1]


def _values(array: np.ndarray) -> list[int]:
    """The distinct values. Sorting only the pixels that differ from the one before is much cheaper than all of them."""
    flat = array.ravel()
    return [int(value) for value in np.unique(flat[np.flatnonzero(np.diff(flat, prepend=flat[:1] - 1))])]
