"""What follows the heads against the plain implementation that follows the release, which the benchmark measures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from convmask.projects.panoptic_fcn.heads import HeadOutputs

NODE = "MODEL.PANOPTIC_FCN"
# at stride 4 and on the levels of a padded image of 96 x 128 pixels
COMMON, LEVELS = (24, 32), ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))


@pytest.fixture(scope="module")
def release(repository: Path) -> ModuleType:
    path = repository / "benchmarks" / "panoptic_fcn_release.py"
    spec = importlib.util.spec_from_file_location("panoptic_fcn_release", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head_outputs(seed: int, kernel_dims: int, encoded_dims: int) -> HeadOutputs:
    """Of one image. Features vary slowly, so that masks are blobs and have a box."""
    generator = torch.Generator().manual_seed(seed)
    encoded = torch.randn(1, encoded_dims, 6, 8, generator=generator)
    encoded = torch.nn.functional.interpolate(encoded, COMMON, mode="bilinear")[0]
    centers = [torch.randn(5, *size, generator=generator) - 1 for size in LEVELS]
    regions = [torch.randn(4, *size, generator=generator) for size in LEVELS]
    kernels = [torch.randn(kernel_dims, *size, generator=generator) for size in LEVELS]
    return HeadOutputs(centers, regions, kernels, encoded)


@pytest.mark.parametrize(
    ("seed", "image", "output", "keys"),
    [
        (0, (96, 128), (96, 128), {}),
        (1, (89, 117), (140, 180), {}),
        (2, (90, 121), (45, 60), {"INFERENCE.SIMILAR_THRESH": 0.3, "INFERENCE.CLASS_SPECIFIC": False}),
        (3, (96, 120), (97, 119), {"INFERENCE.TOP_NUM": 6, "STUFF.WITH_THINGS": False}),
        (4, (60, 60), (60, 60), {"INFERENCE.THING_THRESH": 1.0}),
        (5, (60, 60), (60, 60), {"INFERENCE.STUFF_THRESH": 1.0}),
    ],
)
def test_same_result_as_the_release(
    release: ModuleType,
    small_cfg: Callable[..., CfgNode],
    seed: int,
    image: tuple[int, int],
    output: tuple[int, int],
    keys: dict[str, Any],
) -> None:
    cfg = small_cfg(*(x for key, value in keys.items() for x in (f"{NODE}.{key}", value)))
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    for layer in (model.thing_embedding, model.stuff_embedding):
        torch.nn.init.normal_(layer.weight, std=0.2)
        torch.nn.init.normal_(layer.bias, std=0.5)
    outputs = head_outputs(seed, 64, 16)
    with torch.no_grad():
        expected = release.release_postprocessing(model, outputs, 4, image, output)
        found = model.postprocess(*model.masks_of(outputs), 4, image, output)
    instances = found["instances"]
    assert (len(expected["scores"]) > 0) is (seed != 4)
    assert bool(expected["sem_seg"].any()) is (seed != 5)
    torch.testing.assert_close(instances.scores, expected["scores"])
    assert torch.equal(instances.pred_classes, expected["classes"])
    # but for pixels at the threshold
    assert (instances.pred_masks != expected["masks"]).sum() <= 1e-4 * expected["masks"].numel()
    torch.testing.assert_close(instances.pred_boxes.tensor, expected["boxes"])
    torch.testing.assert_close(found["sem_seg"], expected["sem_seg"])
    panoptic, segments = found["panoptic_seg"]
    assert (panoptic != expected["panoptic"]).float().mean() < 1e-4
    assert len(segments) == len(expected["segments"])
    for ours, theirs in zip(segments, expected["segments"], strict=True):
        assert (ours["isthing"], ours["category_id"]) == (theirs["isthing"], theirs["category_id"])
