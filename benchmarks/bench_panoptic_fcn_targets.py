"""Training targets of Panoptic FCN against a plain implementation that follows the release, on the same random input.

    python benchmarks/bench_panoptic_fcn_targets.py [--images 2] [--instances 50 --labels 12]

Images of 800 x 1333 pixels (padded to a width of 1344) with 80 thing and 54 region classes on the levels P3 to P7;
objects are ellipses of the sizes that they have in COCO. The results are compared first. Prints medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from panoptic_fcn_release_targets import LevelTargets, ReleaseTargets
from torch import Tensor

from convmask.benchmark import median_times, processor
from convmask.projects.panoptic_fcn.targets import TargetOptions, Targets, make_targets

HEIGHT, WIDTH = 800, 1333
SIZES: dict[str, Any] = {
    "padded": (800, 1344),
    "common": (200, 336),
    "levels": ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)),
}
OPTIONS = TargetOptions(num_classes=80, num_regions=54)


def draw_instances(count: int, generator: torch.Generator) -> Instances:
    """Ellipses; the square root of an object's area is log-uniform from 20 to 400 pixels."""
    y, x = torch.arange(HEIGHT).view(1, -1, 1), torch.arange(WIDTH).view(1, 1, -1)
    size, aspect, top, left = torch.rand(4, count, 1, 1, generator=generator)
    size = 20 * (400 / 20) ** size
    aspect = 3 ** (aspect - 0.5)
    masks = ((y - top * HEIGHT) / (size * aspect)) ** 2 + ((x - left * WIDTH) / (size / aspect)) ** 2 < 0.32
    instances = Instances((HEIGHT, WIDTH), gt_masks=BitMasks(masks))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.randint(OPTIONS.num_classes, (count,), generator=generator)
    return instances


def draw_labels(labels: int, generator: torch.Generator) -> Tensor:
    """A semantic map with so many of the labels, in patches of 100 x 100 pixels, a tenth of them without a label."""
    chosen = torch.randperm(OPTIONS.num_regions, generator=generator)[:labels]
    patches = chosen[torch.randint(labels, (HEIGHT // 100 + 1, WIDTH // 100 + 1), generator=generator)]
    patches[torch.rand(patches.shape, generator=generator) < 0.1] = 255
    return patches.repeat_interleave(100, 0).repeat_interleave(100, 1)[:HEIGHT, :WIDTH].contiguous()


def check_equal(found: Targets, release: list[list[LevelTargets]]) -> None:
    """Raises an AssertionError where the two differ."""
    for index, image in enumerate(release):
        for level, expected in enumerate(image):
            member = found.members[level]
            member = member[found.objects.images[member] == index]
            label = (expected.regions > 0).flatten(1).any(dim=1)
            pairs = (
                (found.centers[level][index], expected.centers),
                (found.regions[level][index], expected.regions),
                (found.objects.masks[member], expected.masks[expected.valid]),
                (found.objects.classes[member], expected.classes[expected.valid]),
                (found.semantic[index, label], expected.region_shares[expected.region_valid]),
            )
            for actual, wanted in pairs:
                # weights of the interpolation are rounded differently: 1333 / 333 pixels a cell
                torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-4)


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--instances", type=int, default=50)
    parser.add_argument("--labels", type=int, default=12, help="labels in the semantic map of an image")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    instances = [draw_instances(args.instances, generator) for _ in range(args.images)]
    sem_segs = [draw_labels(args.labels, generator) for _ in range(args.images)]
    release = ReleaseTargets(OPTIONS.num_classes, OPTIONS.num_regions)
    functions: dict[str, Callable[[], Any]] = {
        "release": lambda: release.batch(instances, sem_segs, **SIZES),
        "make_targets": lambda: make_targets(instances, sem_segs, **SIZES, options=OPTIONS),
    }
    check_equal(functions["make_targets"](), functions["release"]())
    print(
        f"{args.images} x 800 x 1333, {args.instances} instances and {args.labels} labels an image; "
        f"medians of {args.repeats}"
    )
    print(f"{processor()}; torch {torch.__version__}\n")
    print("| images | labels | threads | release, ms | make_targets, ms | ratio |")
    print("|--------|--------|---------|-------------|------------------|-------|")
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        plain, ours = median_times(functions, args.repeats).values()
        print(
            f"| {args.images:6} | {args.labels:6} | {threads:7} | {1000 * plain:11.0f} | {1000 * ours:16.1f} | "
            f"{plain / ours:5.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
