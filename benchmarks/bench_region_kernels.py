"""Region kernels against the masked product of Panoptic FCN's release, forward and backward, in the training shape.

    python benchmarks/bench_region_kernels.py [--device cuda] [--regions 30 --channels 256]

The levels P3 to P7 of one image of 800 x 1333 pixels (padded to a width of 1344). Each implementation runs in a process
of its own for its memory, which is the peak above what the inputs take, and in turns in this one for its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from convmask.benchmark import extra_memory, in_fresh_process, median_times, processor
from convmask.ops import region_kernels

LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))


def release_product(kernel_map: Tensor, masks: Tensor) -> Tensor:
    """(N, K, C): the map times each mask, averaged over all cells."""
    product = kernel_map.unsqueeze(1) * masks.unsqueeze(2)
    return functional.adaptive_avg_pool2d(product.flatten(0, 1), 1).view(product.shape[:3])


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "release": release_product,
    "region_kernels": region_kernels,
}


def draw_inputs(regions: int, channels: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """For each level a map that needs a gradient, and float masks of disjoint regions, as a semantic map gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for height, width in LEVELS:
        kernel_map = torch.randn(1, channels, height, width, generator=generator)
        coarse = torch.randint(regions, (1, height // 8 + 1, width // 8 + 1), generator=generator)
        labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
        masks = functional.one_hot(labels, regions).permute(0, 3, 1, 2).float().contiguous()
        inputs.append((kernel_map.to(device).requires_grad_(), masks.to(device)))
    return inputs


def forward_backward(
    implementation: Callable[[Tensor, Tensor], Tensor], inputs: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The kernels of all levels, and the gradients of all maps for a loss that is their squared norm."""
    kernels = [implementation(kernel_map, masks) for kernel_map, masks in inputs]
    loss = torch.stack([level.square().sum() for level in kernels]).sum()
    return kernels, list(torch.autograd.grad(loss, [kernel_map for kernel_map, _ in inputs]))


def memory_of(name: str, args: argparse.Namespace) -> float:
    """Peak MiB above what is there with the inputs, in a process that has done nothing else."""
    small = [
        (torch.ones(1, 2, 4, 4, device=args.device, requires_grad=True), torch.ones(1, 2, 4, 4, device=args.device))
    ]
    forward_backward(IMPLEMENTATIONS[name], small)  # libraries load what they need
    inputs = draw_inputs(args.regions, args.channels, args.device)
    return extra_memory(lambda: forward_backward(IMPLEMENTATIONS[name], inputs), args.device)


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--regions", type=int, default=30)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    inputs = draw_inputs(args.regions, args.channels, args.device)
    for expected, actual in zip(*(forward_backward(f, inputs) for f in IMPLEMENTATIONS.values()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(
        f"{args.regions} regions, {args.channels} channels, P3 to P7 of 800 x 1333, float32; medians of {args.repeats}"
    )
    print(f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}\n")
    memory = {name: in_fresh_process(memory_of, name, args) for name in IMPLEMENTATIONS}
    print("| threads | release, ms | region_kernels, ms | ratio | release, MiB | region_kernels, MiB | ratio |")
    print("|---------|-------------|--------------------|-------|--------------|---------------------|-------|")
    for threads in range(1, torch.get_num_threads() + 1) if args.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        functions = {name: partial(forward_backward, how, inputs) for name, how in IMPLEMENTATIONS.items()}
        times = median_times(functions, args.repeats, args.device)
        release, ours = times.values()
        print(
            f"| {threads:7} | {1000 * release:11.1f} | {1000 * ours:18.2f} | {release / ours:5.0f} | "
            f"{memory['release']:12.0f} | {memory['region_kernels']:19.1f} | "
            f"{memory['release'] / memory['region_kernels']:5.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
