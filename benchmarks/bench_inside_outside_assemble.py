"""Inside/outside assembly against torchvision's ps_roi_pool and the unfused steps, on the same random input in one run.

    python benchmarks/bench_inside_outside_assemble.py [--classes 81 --height 38 --width 63 --rois 300 --repeats 7]

The alternatives: "torchvision", its ``ps_roi_pool`` at k x k bins on the same values and RoIs, which has to do less
(k x k bins in place of P x P, no maximum, no mean, no masks); "unfused", our ``ps_roi_pool`` at P x P, then maximum,
mean and choice in PyTorch. Ours: "channels last", the classes of a cell being neighbours in memory, as a convolution in
that format leaves them; "channels first", as a convolution in the usual format does, the reordering being part of the
operator. Prints medians in milliseconds, for each number of threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import ps_roi_pool as torchvision_ps_roi_pool

from convmask.benchmark import extra_memory, median_times, processor
from convmask.ops import extension_status, inside_outside_assemble, ps_roi_pool

STRIDE = 16


def draw_rois(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(R, 5) boxes in pixels; the square root of an area is log-uniform from 32 pixels to the image's shorter side."""
    size, aspect, left, top = torch.rand(4, count, generator=generator)
    size = 32 * (min(height, width) * STRIDE / 32) ** size
    w, h = (size * 3 ** (aspect - 0.5)).clamp(max=width * STRIDE), (size / 3 ** (aspect - 0.5))
    h = h.clamp(max=height * STRIDE)
    x1, y1 = left * (width * STRIDE - w), top * (height * STRIDE - h)
    return torch.stack([torch.zeros(count), x1, y1, x1 + w - 1, y1 + h - 1], dim=1).floor()


def unfused(channels: Tensor, rois: Tensor, classes: int, k: int, size: int) -> tuple[Tensor, Tensor]:
    """Scores and mask logits step by step; ``channels`` (1, C 2 k k, H, W) in the release's order."""
    pooled = ps_roi_pool(channels, rois, group_size=k, output_size=size).unflatten(1, (classes, 2))
    scores = pooled.amax(dim=2).mean(dim=(2, 3))
    chosen = scores[:, 1:].argmax(dim=1) + 1
    return scores, pooled[torch.arange(len(rois)), chosen]


def backward_of(function: Callable[[Tensor], tuple[Tensor, ...]], maps: Tensor) -> Callable[[], Any]:
    """Runs the backward of ``function`` alone, again and again."""
    leaf = maps.detach().requires_grad_()
    results = function(leaf)[:2]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(result.shape, generator=generator) for result in results]
    return lambda: torch.autograd.grad(results, leaf, gradients, retain_graph=True)


def main() -> None:
    """Runs the comparison and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=81)
    parser.add_argument("--group", type=int, default=7)
    parser.add_argument("--size", type=int, default=21)
    parser.add_argument("--height", type=int, default=38)
    parser.add_argument("--width", type=int, default=63)
    parser.add_argument("--rois", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    k, classes, size = args.group, args.classes, args.size
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(1, args.height, args.width, k, k, 2, classes, generator=generator).permute(0, 3, 4, 5, 6, 1, 2)
    first = last.contiguous()
    release = first.permute(0, 4, 3, 1, 2, 5, 6).reshape(1, classes * 2 * k * k, args.height, args.width)
    rois = draw_rois(args.rois, args.height, args.width, generator)

    def assemble(maps: Tensor) -> tuple[Tensor, ...]:
        return inside_outside_assemble(maps, rois, output_size=size)

    forward = {
        "torchvision": lambda: torchvision_ps_roi_pool(release, rois, k, 1 / STRIDE),
        "unfused": lambda: unfused(release, rois, classes, k, size),
        "channels last": lambda: assemble(last),
        "channels first": lambda: assemble(first),
    }
    extra = extra_memory(lambda: assemble(last)) * 2**20 / 1e6
    scores, logits, _ = assemble(last)
    for other in (assemble(first)[:2], unfused(release, rois, classes, k, size)):
        torch.testing.assert_close((scores, logits), tuple(other), rtol=1e-4, atol=1e-4)

    print(f"{classes} classes, k = {k}, map {args.height} x {args.width}, {args.rois} RoIs, {size} x {size} bins")
    print(f"{processor()}; torch {torch.__version__}; {extension_status()[1]}")
    print(f"channels last, forward: results {4e-6 * (scores.numel() + logits.numel()):.1f} MB, at most {extra:.1f} MB")
    print(f"of memory in all; medians of {args.repeats} in milliseconds\n")
    backward = {
        "unfused": backward_of(lambda maps: unfused(maps, rois, classes, k, size), release),
        "channels last": backward_of(assemble, last),
        "channels first": backward_of(assemble, first),
    }
    print("|          | threads | torchvision | unfused | channels last | channels first |")
    print("|----------|---------|-------------|---------|---------------|----------------|")
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        for name, functions in (("forward", forward), ("backward", backward)):
            times = median_times(functions, args.repeats)
            cells = [f"{1000 * times[way]:.1f}" if way in times else "" for way in forward]
            print(f"| {name:8} | {threads:7} | {cells[0]:>11} | {cells[1]:>7} | {cells[2]:>13} | {cells[3]:>14} |")


if __name__ == "__main__":
    main()
