"""Kernel fusion against the sequence of PyTorch calls of Panoptic FCN's release, on the same random input in one run.

    python benchmarks/bench_fuse_kernels.py [--device cuda] [--kernels 250 --dims 256]

Inputs: "distinct", random directions, of which none are similar, so that no comparison can be left out for a kernel
that is fused already; "objects", kernels around 100 directions; each with 80 classes fused apart (the release's
setting) and with classes fused together. Prints medians, the ratio to the release's sequence, and as a floor the time
of the product of all kernels with all, which is one of its calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convmask.benchmark import median_times, processor
from convmask.ops import extension_status, fuse_kernels, fuse_kernels_reference

OBJECTS, CLASSES, THRESHOLD = 100, 80, 0.9


def release_sequence(kernels: Tensor, scores: Tensor, classes: Tensor, class_specific: bool) -> tuple[Tensor, ...]:
    """The release's calls: kernels, scores and classes in descending order of score to fused ones."""
    unit = kernels / kernels.norm(dim=1).unsqueeze(-1).clamp(min=1e-8)
    others = kernels / kernels.norm(dim=1).unsqueeze(-1).clamp(min=1e-8)
    covers = torch.mm(unit, others.transpose(0, 1)).triu(diagonal=0) >= THRESHOLD
    if class_specific:
        covers = covers & (classes.unsqueeze(-1) == classes.unsqueeze(0))
    is_first = torch.cumsum(covers.float(), dim=0) < 2
    keep = is_first.diagonal(0)
    members = (covers[keep] & is_first[keep]).float()
    fused = torch.mm(members, kernels) / members.sum(dim=1, keepdim=True)
    return fused, scores[keep], classes[keep]


def draw_input(kind: str, number: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels, descending scores, classes. Kernels of an object have its class."""
    objects = number if kind == "distinct" else OBJECTS
    chosen = torch.randint(objects, (number,), generator=generator) if kind == "objects" else torch.arange(number)
    directions = torch.randn(objects, dims, generator=generator)[chosen]
    classes = torch.randint(CLASSES, (objects,), generator=generator)[chosen]
    kernels = directions + 0.15 * torch.randn(number, dims, generator=generator)
    return kernels, torch.rand(number, generator=generator).sort(descending=True)[0], classes


def compare(kind: str, arguments: tuple[Tensor, Tensor, Tensor], class_specific: bool, repeats: int) -> None:
    """Checks that the results are equal, and prints one row for each thread count."""
    kernels, scores, _ = arguments
    functions: dict[str, Callable[[], Any]] = {
        "release": lambda: release_sequence(*arguments, class_specific),
        "fuse_kernels": lambda: fuse_kernels(*arguments, threshold=THRESHOLD, class_specific=class_specific),
        "reference": lambda: fuse_kernels_reference(*arguments, THRESHOLD, class_specific),
        "floor": lambda: kernels @ kernels.T,
    }
    expected, (fused, kept) = functions["release"](), functions["fuse_kernels"]()
    torch.testing.assert_close(fused, expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(scores[kept], expected[1]), "the results differ"
    device = kernels.device.type
    for threads in range(1, torch.get_num_threads() + 1) if device == "cpu" else [1]:
        torch.set_num_threads(threads)
        times = median_times(functions, repeats, device, warmup=5)
        microseconds = "".join(f" {1e6 * times[name]:12.0f} |" for name in functions)
        ratio = times["release"] / times["fuse_kernels"]
        fusion = "apart" if class_specific else "together"
        print(f"| {kind:8} | {fusion:8} | {len(fused):4} | {threads:7} |{microseconds} {ratio:14.1f} |", flush=True)


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--kernels", type=int, default=250)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()

    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(f"{args.kernels} kernels of {args.dims} channels, float32; medians of {args.repeats}, microseconds")
    print(f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}; {extension_status()[1]}\n")
    columns = ("release", "fuse_kernels", "reference", "floor")
    print(f"| input    | classes  | kept | threads |{''.join(f' {c:>12} |' for c in columns)} release / ours |")
    print(f"|----------|----------|------|---------|{'--------------|' * len(columns)}----------------|")
    threads = torch.get_num_threads()
    for kind in ("distinct", "objects"):
        drawn = draw_input(kind, args.kernels, args.dims, torch.Generator().manual_seed(0))
        kernels, scores, classes = (tensor.to(args.device) for tensor in drawn)
        for class_specific in (True, False):
            torch.set_num_threads(threads)
            compare(kind, (kernels, scores, classes), class_specific, args.repeats)


if __name__ == "__main__":
    main()
