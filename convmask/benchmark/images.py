"""What a model is timed on: noise, images of one's own, or those of a dataset, all resized as the config tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode

from convmask.benchmark.counts import faint_image, image_size
from convmask.data.errors import DatasetError
from convmask.data.images import read_image
from convmask.data.loader import build_test_loader
from convmask.demo.sources import find_inputs
from convmask.engine.errors import ConfigError

Input = dict[str, Any]


def random_images(cfg: CfgNode, number: int = 1, size: tuple[int, int] | None = None, seed: int = 0) -> list[Input]:
    """Noise, uint8.

    Args:
        cfg: INPUT, MODEL.PIXEL_MEAN and PIXEL_STD.
        number: of images.
        size: (height, width); by default that of the config: :func:`~convmask.benchmark.counts.image_size`.
        seed: of the noise.
    """
    height, width = size or image_size(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = [faint_image(cfg, height, width).round().clamp(0, 255).to(torch.uint8) for _ in range(number)]
    return [{"image": image, "height": height, "width": width} for image in noise]


def images_of_files(cfg: CfgNode, names: Sequence[str], limit: int) -> list[Input]:
    """Images from files, folders and patterns, at most ``limit``.

    Raises:
        ConfigError: a name gives no image.
        DatasetError: a file cannot be read as an image.
    """
    found = find_inputs(names)
    if found.missing or not found.images:
        raise ConfigError(f"no images in {', '.join(found.missing or names)}")
    shortest = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    resize = T.ResizeShortestEdge(shortest, cfg.INPUT.MAX_SIZE_TEST)
    inputs = []
    for path in found.images[:limit]:
        pixels = read_image(str(path), cfg.INPUT.FORMAT)
        resized = resize.get_transform(pixels).apply_image(pixels)
        image = torch.as_tensor(resized.transpose(2, 0, 1).copy())
        inputs.append({"image": image, "height": pixels.shape[0], "width": pixels.shape[1]})
    return inputs


def images_of_dataset(cfg: CfgNode, limit: int) -> list[Input]:
    """The first images of the first set of ``DATASETS.TEST``.

    Raises:
        ConfigError: the config names none.
        DatasetError: it cannot be read.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: there is no dataset to take images from")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    inputs = [image for batch in itertools.islice(loader, limit) for image in batch]
    if not inputs:
        raise DatasetError(f"DATASETS.TEST: {cfg.DATASETS.TEST[0]!r} has no images")
    return [{name: image[name] for name in ("image", "height", "width") if name in image} for image in inputs]


def in_batches(images: Sequence[Input], size: int) -> list[list[Input]]:
    """Batches of ``size`` images; the first ones complete the last batch."""
    count = -(-len(images) // size)
    endless = itertools.cycle(images)
    return [list(itertools.islice(endless, size)) for _ in range(count)]


def middle_size(images: Sequence[Input]) -> tuple[int, int]:
    """(height, width) of the image of median area, as the network sees it."""
    sizes = sorted((tuple(image["image"].shape[-2:]) for image in images), key=lambda size: size[0] * size[1])
    height, width = sizes[(len(sizes) - 1) // 2]
    return int(height), int(width)
