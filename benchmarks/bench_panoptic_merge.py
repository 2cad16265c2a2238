"""Panoptic merging against Detectron2's function, on the same random input in the same run.

    python benchmarks/bench_panoptic_merge.py [--device cuda] [--height 800 --width 1333 --instances 100]

Two inputs: "blobs", ellipses of the sizes that objects have in COCO, and "full", masks that cover the image and are
noise, so that no part of them can be skipped (every instance is kept). Prints medians, the ratio to Detectron2's
function, and as the floor the time of one pass over the masks' bytes (their sum, as 64-bit words).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances
from torch import Tensor

from convmask.benchmark import median_times, processor
from convmask.ops import extension_status, panoptic_merge, panoptic_merge_reference

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_blobs(instances: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(N, H, W) bool ellipses; the square root of an object's area is log-uniform from 20 to 400 pixels."""
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    size, aspect, top, left = torch.rand(4, instances, 1, 1, generator=generator)
    size = 20 * (400 / 20) ** size
    aspect = 3 ** (aspect - 0.5)
    return ((y - top * height) / (size * aspect)) ** 2 + ((x - left * width) / (size / aspect)) ** 2 < 0.32


def draw_input(kind: str, instances: int, height: int, width: int, generator: torch.Generator) -> Arguments:
    """Masks, scores above the threshold, classes, and a semantic map of 54 labels in patches of 100 x 100 pixels."""
    if kind == "blobs":
        masks = draw_blobs(instances, height, width, generator)
    else:
        masks = torch.rand(instances, height, width, generator=generator) < 0.6
    scores = 0.5 + 0.5 * torch.rand(instances, generator=generator)
    classes = torch.randint(80, (instances,), generator=generator)
    patches = torch.randint(54, (height // 100 + 1, width // 100 + 1), generator=generator)
    sem_seg = patches.repeat_interleave(100, 0).repeat_interleave(100, 1)[:height, :width].contiguous()
    return masks, scores, classes, sem_seg


def compare(kind: str, arguments: Arguments, overlap_threshold: float, repeats: int) -> None:
    """Checks that the results are equal, and prints one row for each thread count."""
    masks, scores, classes, sem_seg = arguments
    device = masks.device.type
    result = Instances((masks.shape[1], masks.shape[2]), scores=scores, pred_classes=classes, pred_masks=masks)
    words = masks.flatten()[: masks.numel() // 8 * 8].view(torch.int64)
    operator_options = (overlap_threshold, 4096, 0.5, 0.5, [0])
    functions: dict[str, Callable[[], Any]] = {
        "detectron2": lambda: combine_semantic_and_instance_outputs(result, sem_seg, overlap_threshold, 4096, 0.5),
        "panoptic_merge": lambda: panoptic_merge(*arguments, overlap_threshold=overlap_threshold),
        "reference": lambda: panoptic_merge_reference(*arguments, *operator_options),
        "floor": lambda: words.sum(),
    }
    expected, actual = functions["detectron2"](), functions["panoptic_merge"]()
    assert torch.equal(expected[0], actual[0]) and expected[1] == actual[1], "the results differ"
    for threads in range(1, torch.get_num_threads() + 1) if device == "cpu" else [1]:
        torch.set_num_threads(threads)
        times = median_times(functions, repeats, device)
        milliseconds = "".join(f" {1000 * times[name]:14.2f} |" for name in functions)
        ratio = times["detectron2"] / times["panoptic_merge"]
        print(f"| {kind:5} | {threads:7} |{milliseconds} {ratio:17.1f} |", flush=True)


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(f"{args.instances} instances, {args.height} x {args.width}, bool; medians of {args.repeats}, milliseconds")
    print(f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}; {extension_status()[1]}\n")
    print("| input | threads |     Detectron2 | panoptic_merge |      reference | floor (1 read) | Detectron2 / ours |")
    print("|-------|---------|----------------|----------------|----------------|----------------|-------------------|")
    threads = torch.get_num_threads()
    for kind, overlap_threshold in (("blobs", 0.5), ("full", 1.0)):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        drawn = draw_input(kind, args.instances, args.height, args.width, generator)
        masks, scores, classes, sem_seg = (tensor.to(args.device) for tensor in drawn)
        compare(kind, (masks, scores, classes, sem_seg), overlap_threshold, args.repeats)


if __name__ == "__main__":
    main()
