"""What the tests of several methods use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Instances
from torch import nn

from convmask.checkpoint import Checkpointer, load_file


@pytest.fixture(scope="session")
def convert_checkpoint(load_script: Callable[[str], ModuleType]) -> Callable[[list[str]], int]:
    """``main`` of tools/convert_checkpoint.py."""
    return load_script("tools/convert_checkpoint.py").main


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Instances):
        return [getattr(x, "tensor", x) for x in value.get_fields().values()]
    if isinstance(value, dict):
        return [x for part in value.values() for x in _tensors(part)]
    return [x for part in value for x in _tensors(part)] if isinstance(value, list | tuple) else []


@pytest.fixture
def check_conversion(
    convert_checkpoint: Callable[[list[str]], int], tmp_path: Path
) -> Callable[[Path, Callable[[], nn.Module]], Path]:
    """``check_conversion(original, build)``: the converted file, after making sure that models with either file have
    the same weights and results. ``build`` makes a model."""

    def check(original: Path, build: Callable[[], nn.Module]) -> Path:
        pytest.importorskip("safetensors")
        results = []
        target = tmp_path / "converted.safetensors"
        assert convert_checkpoint([str(original), str(target)]) == 0
        for path in (original, target):
            model = build().eval()
            Checkpointer(model, policy="strict").load(str(path))
            image = torch.randint(0, 256, (3, 160, 288), generator=torch.Generator().manual_seed(5)).float()
            torch.manual_seed(0)
            with torch.no_grad():
                results.append((dict(model.state_dict()), _tensors(model([{"image": image}]))))
        (states, outputs), (others, other_outputs) = results
        assert all(torch.equal(value, others[name]) for name, value in states.items())
        assert outputs and all(torch.equal(a, b) for a, b in zip(outputs, other_outputs, strict=True))
        assert all(bool(x.isfinite().all()) for x in outputs)
        return target

    return check


@pytest.fixture
def check_way_back(convert_checkpoint: Callable[[list[str]], int], tmp_path: Path) -> Callable[[Path, Path, str], None]:
    """``check_way_back(original, converted, entry)``: the converted file gets back its original names, and each tensor
    its values, bit for bit; tensors that are no weights may be absent."""

    def check(original: Path, converted: Path, entry: str) -> None:
        back = tmp_path / "back.pth"
        assert convert_checkpoint([str(converted), str(back), "--to-original"]) == 0
        found, expected = load_file(str(back))[entry], load_file(str(original))[entry]
        absent = {name for name in expected.keys() - found.keys() if "relative_position_index" not in name}
        assert not absent and not found.keys() - expected.keys()
        for name, value in found.items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name

    return check


@pytest.fixture
def draw_inputs() -> Callable[..., list[dict[str, Any]]]:
    """``draw_inputs(objects=(2, 0))``: training input of one image for each number of objects, rectangles of 5 classes.

    ``sides``: the least side of an object, and how much may be added, in pixels. ``semantic_classes``: of a semantic
    map, if there is to be one. ``boxes``: whether the objects have them.
    """

    def draw(
        objects: tuple[int, ...] = (2, 3),
        size: tuple[int, int] = (64, 80),
        *,
        sides: tuple[int, int] = (8, 30),
        boxes: bool = True,
        semantic_classes: int | None = None,
    ) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)
        return [_draw_input(count, size, sides, boxes, semantic_classes, generator) for count in objects]

    return draw


def _draw_input(
    count: int,
    size: tuple[int, int],
    sides: tuple[int, int],
    boxes: bool,
    semantic_classes: int | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    height, width = size
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([width - 40.0, height - 40.0])
    extents = sides[0] + torch.rand(count, 2, generator=generator) * sides[1]
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (x, y), (w, h) in zip(masks, corners.int().tolist(), extents.int().tolist(), strict=True):
        mask[y : y + h, x : x + w] = True
    instances = Instances(size, gt_masks=BitMasks(masks))
    if boxes:
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
    result: dict[str, Any] = {"instances": instances}
    if semantic_classes is not None:
        sem_seg = torch.randint(0, semantic_classes, (4, 5), generator=generator)
        sem_seg = sem_seg.repeat_interleave(height // 4, 0).repeat_interleave(width // 5, 1)
        sem_seg[:5] = 255
        result["sem_seg"] = sem_seg
    result["image"] = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    return {**result, "height": height + 6, "width": width - 9, "file_name": "random.png"}
