"""Finds what is wrong with a dataset before training starts, and names the file, the image and the field."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm

from convmask.data import instance, panoptic
from convmask.data.categories import PanopticCategories
from convmask.data.errors import DatasetError
from convmask.data.json_files import read_json
from convmask.data.problems import Problem, listing, raise_if_fatal
from convmask.data.validation_entries import label
from convmask.data.validation_files import Files, content_problems, existence_problems
from convmask.data.validation_instances import instance_json_problems, record_problems
from convmask.data.validation_panoptic import Pair, panoptic_json_problems

# How many pictures of a dataset are decoded before training: all of a small one, and some seconds' worth of others.
SAMPLE = 500
_SAMPLE_PIXELS = 100_000_000
# Of a picture whose annotations do not say.
_USUAL_PIXELS = 500_000

Progress = Callable[[Iterable[Files]], Iterable[Files]]

_logger = logging.getLogger(__name__)


def validate(
    source: str | Sequence[Mapping[str, Any]],
    *,
    quick: bool = False,
    sample: int = 0,
    max_problems: int | None = None,
    progress: Progress = iter,
) -> list[Problem]:
    """Checks a registered dataset, or dataset dicts.

    Args:
        source: the name of a dataset, ConvMask's, Detectron2's or one's own; or dataset dicts in Detectron2's format.
        quick: check annotations and that the files exist, but decode none.
        sample: with ``quick``, decode this many images all the same, evenly spaced; fewer, but at least 16, where they
            are so large that they hold more than 100 million pixels.
        max_problems: stop after so many.
        progress: wraps the iteration over the images to decode, for a progress bar.

    Returns:
        What is wrong, empty if nothing is. An unreadable file is a problem too, not an exception.
    """
    found = _problems(_parts(source), quick, sample, progress)
    return list(islice(found, max_problems))


def validate_panoptic(
    image_root: str | os.PathLike[str],
    panoptic_json: str | os.PathLike[str],
    panoptic_root: str | os.PathLike[str],
    *,
    quick: bool = False,
    max_problems: int | None = None,
    progress: Progress = iter,
) -> list[Problem]:
    """Checks a panoptic dataset that is not registered; arguments as of ``register_panoptic`` and ``validate``."""
    parts = _panoptic_parts(os.fspath(image_root), os.fspath(panoptic_json), os.fspath(panoptic_root))
    return list(islice(_problems(parts, quick, 0, progress), max_problems))


def validate_instances(
    image_root: str | os.PathLike[str],
    json_file: str | os.PathLike[str],
    *,
    quick: bool = False,
    max_problems: int | None = None,
    progress: Progress = iter,
) -> list[Problem]:
    """Checks an instance dataset that is not registered; arguments as of ``register_instances`` and ``validate``."""
    parts = _instance_parts(os.fspath(image_root), os.fspath(json_file))
    return list(islice(_problems(parts, quick, 0, progress), max_problems))


def check_before_training(cfg: CfgNode) -> None:
    """Quick validation of all of ``DATASETS.TRAIN`` and ``DATASETS.TEST``, decoding up to 500 images of each.

    Problems that are not fatal are logged. ``DATASETS.VALIDATE`` False switches it off. Of several processes the first
    does it, and all raise what it finds.

    Raises:
        DatasetError: for all fatal problems together, listing the first ten.
    """
    if not cfg.DATASETS.VALIDATE:
        return
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    problems = []
    if comm.is_main_process():
        problems = [problem for name in names for problem in validate(name, quick=True, sample=SAMPLE)]
    problems = comm.all_gather(problems)[0]
    harmless = [problem for problem in problems if not problem.fatal]
    if harmless:
        _logger.warning(
            "%d entries of the datasets will be left out or repaired:\n%s", len(harmless), listing(harmless)
        )
    raise_if_fatal(problems, f"datasets {', '.join(names)} cannot be trained on")


# Annotation problems as they are found, with the files to check once they are exhausted.
_Parts = tuple[Iterable[Problem], Callable[[], Sequence[Files]]]


def _problems(parts: _Parts, quick: bool, sample: int, progress: Progress) -> Iterator[Problem]:
    annotations, files_of = parts
    yield from annotations
    files = files_of()
    yield from existence_problems(files)
    yield from content_problems(_sampled(files, sample) if quick else files, progress)


def _sampled(files: Sequence[Files], sample: int) -> Sequence[Files]:
    pixels = sum((entry.height or 0) * (entry.width or 0) or _USUAL_PIXELS for entry in files)
    affordable = max(16, _SAMPLE_PIXELS * len(files) // max(pixels, 1))
    count = min(sample, affordable, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _parts(source: str | Sequence[Mapping[str, Any]]) -> _Parts:
    if not isinstance(source, str):
        return _record_parts("dataset dicts", source, None)
    if source not in DatasetCatalog.list():
        return _nothing(source, f"dataset {source!r} is not registered")
    metadata = MetadataCatalog.get(source)
    kind = metadata.__dict__.get("evaluator_type")
    if kind == "convmask_panoptic" and "panoptic_json" in metadata.__dict__:
        roots = metadata.image_root, metadata.panoptic_json, metadata.panoptic_root
        # Metadata that was not read from the json, which is what is checked, is there already.
        return _panoptic_parts(*roots, metadata.get("image_path"), metadata.__dict__.get("categories"))
    if kind == "coco" and "json_file" in metadata.__dict__:
        return _instance_parts(metadata.image_root, metadata.json_file)
    try:
        records = DatasetCatalog.get(source)
        categories = metadata.get("categories")
    except Exception as error:  # Loaders of any origin run here.
        return _nothing(source, f"cannot be loaded: {error or type(error).__name__}")
    return _record_parts(source, records, categories, metadata)


def _nothing(name: str, message: str) -> _Parts:
    return [Problem(name, "", "", message)], list


def _read(file: str, lists: tuple[str, ...]) -> dict[str, Any] | Problem:
    try:
        return read_json(file, lists)
    except DatasetError as error:
        return Problem(file, "", "", str(error).removeprefix(f"{file}: ").replace(f"no file {file}", "does not exist"))


def _panoptic_parts(
    image_root: str,
    file: str,
    panoptic_root: str,
    image_path: panoptic.ImagePath | None = None,
    categories: PanopticCategories | None = None,
) -> _Parts:
    content = _read(file, panoptic.LISTS)
    if isinstance(content, Problem):
        return [content], list
    pairs: list[Pair] = []

    def files() -> list[Files]:
        return [_panoptic_files(file, image_root, panoptic_root, image_path, *pair) for pair in pairs]

    return panoptic_json_problems(file, content, pairs, categories), files


def _panoptic_files(
    file: str,
    image_root: str,
    panoptic_root: str,
    image_path: panoptic.ImagePath | None,
    image: Mapping[str, Any],
    annotation: Mapping[str, Any],
) -> Files:
    ids = (segment.get("id") for segment in annotation["segments_info"] if isinstance(segment, Mapping))
    return Files(
        file,
        label(image),
        os.path.join(image_root, image_path(image) if image_path else image["file_name"]),
        image["height"],
        image["width"],
        os.path.join(panoptic_root, annotation["file_name"]),
        tuple(identity for identity in ids if isinstance(identity, int)),
    )


def _instance_parts(image_root: str, file: str) -> _Parts:
    content = _read(file, instance.LISTS)
    if isinstance(content, Problem):
        return [content], list
    images: dict[Any, Mapping[str, Any]] = {}

    def files() -> list[Files]:
        return [
            Files(file, label(i), os.path.join(image_root, i["file_name"]), i["height"], i["width"])
            for i in images.values()
        ]

    return instance_json_problems(file, content, images), files


def _record_parts(
    name: str,
    records: Sequence[Mapping[str, Any]],
    categories: PanopticCategories | None,
    metadata: Metadata | None = None,
) -> _Parts:
    classes = metadata.get("stuff_classes") if metadata else None

    def files() -> list[Files]:
        return [
            Files(
                name,
                label(record),
                record["file_name"],
                record.get("height"),
                record.get("width"),
                record.get("pan_seg_file_name"),
                tuple(segment.get("id", 0) for segment in record.get("segments_info") or ()),
                record.get("sem_seg_file_name"),
                len(classes) if classes else None,
                metadata.get("ignore_label", 255) if metadata else 255,
            )
            for record in records
            if isinstance(record, Mapping) and isinstance(record.get("file_name"), str)
        ]

    return record_problems(name, records, categories), files
