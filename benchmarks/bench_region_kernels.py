"""Region kernels against the masked product of Panoptic FCN's release, forward and backward, in the training shape.

    python benchmarks/bench_region_kernels.py [--device cuda] [--regions 30 --channels 256]

The levels P3 to P7 of one image of 800 x 1333 pixels (padded to a width of 1344). Each implementation runs in a process
of its own for its memory, which is the peak above what the inputs take, and in turns in this one for its time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import processor
from torch import Tensor
from torch.nn import functional

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


def extra_memory(name: str, args: argparse.Namespace) -> float:
    """Peak MiB above what is there with the inputs. Runs once, in a fresh process on the CPU."""
    small = [
        (torch.ones(1, 2, 4, 4, device=args.device, requires_grad=True), torch.ones(1, 2, 4, 4, device=args.device))
    ]
    forward_backward(IMPLEMENTATIONS[name], small)  # libraries load what they need
    inputs = draw_inputs(args.regions, args.channels, args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(IMPLEMENTATIONS[name], inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is there
    before = peak_resident_memory()
    results = forward_backward(IMPLEMENTATIONS[name], inputs)
    after = peak_resident_memory()
    assert results
    return (after - before) / 2**10


def peak_resident_memory() -> int:
    """KiB. Linux only; `ru_maxrss` would begin at the peak of the parent process."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1])


def extra_memory_in_a_process(name: str, args: argparse.Namespace) -> float:
    """``extra_memory`` of a process that has done nothing else."""
    options = ["--device", args.device, "--regions", str(args.regions), "--channels", str(args.channels)]
    command = [sys.executable, __file__, "--memory-of", name, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def median_times(inputs: list[tuple[Tensor, Tensor]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each implementation; they take turns, so that a disturbance hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(repeats + 1):
        for name, implementation in IMPLEMENTATIONS.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            forward_backward(implementation, inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--regions", type=int, default=30)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(extra_memory(args.memory_of, args))
        return

    inputs = draw_inputs(args.regions, args.channels, args.device)
    for expected, actual in zip(*(forward_backward(f, inputs) for f in IMPLEMENTATIONS.values()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(
        f"{args.regions} regions, {args.channels} channels, P3 to P7 of 800 x 1333, float32; medians of {args.repeats}"
    )
    print(f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}\n")
    memory = {name: extra_memory_in_a_process(name, args) for name in IMPLEMENTATIONS}
    print("| threads | release, ms | region_kernels, ms | ratio | release, MiB | region_kernels, MiB | ratio |")
    print("|---------|-------------|--------------------|-------|--------------|---------------------|-------|")
    for threads in range(1, torch.get_num_threads() + 1) if args.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        times = median_times(inputs, args.repeats, args.device)
        release, ours = times.values()
        print(
            f"| {threads:7} | {1000 * release:11.1f} | {1000 * ours:18.2f} | {release / ours:5.0f} | "
            f"{memory['release']:12.0f} | {memory['region_kernels']:19.1f} | "
            f"{memory['release'] / memory['region_kernels']:5.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
