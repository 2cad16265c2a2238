"""Embedding-distance masks against the best sequences of PyTorch calls, on the same random input in one run.

    python benchmarks/bench_embedding_masks.py [--device cuda] [--proposals 100 --dims 32 --height 200 --width 304]

Alternatives: "plain", the squared distance as |p|^2 - 2 p q + |q|^2 as one writes it, around one matrix product;
"expanded", the same with a fused sum, in place where gradients are not needed; "one product", all three terms in one
matrix product of D + 2 dimensions. All lose small distances to cancellation, and a proposal's own pixel may get a value
above 0. "broadcast" subtracts as the operator does, through a tensor of (K, D, H, W). In boxes, which cover 10 % of the
map on average, the alternatives compute whole maps: they have no cheaper way.

Margins are one a proposal. Backward is that of a graph that is kept. Memory is the peak of a process of its own above
what inputs take.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convmask.benchmark import extra_memory, in_fresh_process, median_times, processor
from convmask.ops import embedding_masks, embedding_masks_in_boxes, embedding_masks_reference, extension_status

Inputs = tuple[Tensor, Tensor, Tensor]


def plain(pixels: Tensor, proposals: Tensor, margins: Tensor) -> Tensor:
    """(K, H, W): four passes over the values after the product."""
    flat = pixels.flatten(1)
    squares = flat.square().sum(0) - 2 * (proposals @ flat) + proposals.square().sum(1)[:, None]
    return (-margins[:, None] * squares).view(-1, *pixels.shape[1:])


def expanded(pixels: Tensor, proposals: Tensor, margins: Tensor) -> Tensor:
    """(K, H, W): the squares around a product; two passes over the values after it."""
    flat = pixels.flatten(1)
    squares = torch.addmm(flat.square().sum(0), proposals, flat, alpha=-2)
    if squares.requires_grad:
        values = -margins[:, None] * (squares + proposals.square().sum(1)[:, None])
    else:
        values = squares.add_(proposals.square().sum(1)[:, None]).mul_(-margins[:, None])
    return values.view(-1, *pixels.shape[1:])


def one_product(pixels: Tensor, proposals: Tensor, margins: Tensor) -> Tensor:
    """(K, H, W): all of it in one product."""
    flat = pixels.flatten(1)
    left = torch.cat([2 * proposals, -torch.ones_like(margins)[:, None], -proposals.square().sum(1)[:, None]], dim=1)
    right = torch.cat([flat, flat.square().sum(0)[None], torch.ones_like(flat[:1])])
    return ((margins[:, None] * left) @ right).view(-1, *pixels.shape[1:])


def broadcast(pixels: Tensor, proposals: Tensor, margins: Tensor) -> Tensor:
    """(K, H, W) through (K, D, H, W)."""
    squares = (pixels[None] - proposals[:, :, None, None]).square()
    return -margins[:, None, None] * squares.sum(1)


ALTERNATIVES: dict[str, Callable[..., Tensor]] = {"plain": plain, "expanded": expanded, "one product": one_product}


def draw_inputs(args: argparse.Namespace) -> tuple[Inputs, Tensor]:
    """Pixels around the proposals, margins of EmbedMask's size, and boxes of 10 % of the map on average."""
    generator = torch.Generator().manual_seed(0)
    proposals = torch.randn(args.proposals, args.dims, generator=generator)
    owners = torch.randint(args.proposals, (args.height // 8 + 1, args.width // 8 + 1), generator=generator)
    owners = owners.repeat_interleave(8, 0).repeat_interleave(8, 1)[: args.height, : args.width]
    noise = torch.randn(args.dims, args.height, args.width, generator=generator)
    pixels = (proposals[owners].permute(2, 0, 1) + 0.3 * noise).contiguous()
    margins = 0.1 + 0.2 * torch.rand(args.proposals, generator=generator)
    shares = 0.2 * torch.rand(args.proposals, generator=generator)
    aspects = 2 ** (torch.rand(args.proposals, generator=generator) - 0.5)
    scale = torch.tensor([args.width, args.height])
    sides = (shares.sqrt()[:, None] * torch.stack([aspects, 1 / aspects], 1) * scale).round().long()
    corners = (torch.rand(args.proposals, 2, generator=generator) * (scale - sides)).long()
    boxes = torch.cat([corners, corners + sides], dim=1)
    pixels, proposals, margins = (x.to(args.device) for x in (pixels, proposals, margins))
    return (pixels, proposals, margins), boxes.to(args.device)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed. Otherwise whoever allocates first may pay for thousands of new pages."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest that it takes
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def medians(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each."""
    times = median_times(functions, repeats, device, warmup=2, prepared=True)
    return {name: 1000 * seconds for name, seconds in times.items()}


def implementations(boxes: Tensor) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """By what is computed, the operator and what it is compared with."""
    in_boxes = {"operator": lambda *x: embedding_masks_in_boxes(*x, boxes).values}
    return {"whole map": {"operator": embedding_masks, **ALTERNATIVES}, "in boxes": {**in_boxes, **ALTERNATIVES}}


def backward_of(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    """The backward pass alone, for a random gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    values = function(*leaves)
    gradient = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values.device)
    return lambda: torch.autograd.grad(values, leaves, gradient, retain_graph=True)


def compare(what: str, functions: dict[str, Callable[..., Tensor]], inputs: Inputs, args: argparse.Namespace) -> None:
    """One row for each thread count and direction."""
    most = torch.get_num_threads()
    for threads in range(1, most + 1) if args.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        with torch.no_grad():
            forward = medians({n: lambda f=f: f(*inputs) for n, f in functions.items()}, args.repeats, args.device)
        backward = medians({n: backward_of(f, inputs) for n, f in functions.items()}, args.repeats, args.device)
        for direction, times in (("forward", forward), ("backward", backward)):
            row = "".join(f" {times[name]:11.2f} |" for name in functions)
            ratios = "".join(f" {times[name] / times['operator']:11.1f} |" for name in ALTERNATIVES)
            print(f"| {what:9} | {direction:9} | {threads:7} |{row}{ratios}", flush=True)
    torch.set_num_threads(most)


def check(inputs: Inputs, boxes: Tensor) -> None:
    """All agree with double precision, and how far each is from it."""
    pixels, proposals, margins = (x.double() for x in inputs)
    exact = embedding_masks_reference(pixels, proposals, margins, None, 0.0)
    for name, function in {"operator": embedding_masks, **ALTERNATIVES}.items():
        found = function(*inputs).double()
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
        print(f"largest error of {name}: {(found - exact).abs().max():.1e}, relative {relative(found, exact):.1e}")
    values, offsets, _ = embedding_masks_in_boxes(*inputs, boxes)
    dense = embedding_masks(*inputs, boxes, fill=1.0)
    torch.testing.assert_close(values, dense[dense <= 0], rtol=1e-6, atol=1e-6)
    print(f"boxes cover {int(offsets[-1]) / dense.numel():.1%} of the maps\n")


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest relative error."""
    return ((found - exact).abs() / exact.abs().clamp(min=1e-30)).max().item()


def memory_of(name: str, args: argparse.Namespace) -> float:
    """Peak MiB above what is there with the inputs, in a process on the CPU that has done nothing else."""
    inputs, boxes = draw_inputs(args)
    function = embedding_masks if name == "whole map" else implementations(boxes)["in boxes"].get(name, broadcast)
    tiny = torch.zeros(0, args.dims, device=args.device)
    embedding_masks(inputs[0], tiny, tiny[:, 0])  # libraries load what they need
    torch.ones(8, 8) @ torch.ones(8, 8)
    return extra_memory(lambda: function(*inputs))


def main() -> None:
    """Runs the comparison and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--proposals", type=int, default=100)
    parser.add_argument("--dims", type=int, default=32)
    parser.add_argument("--height", type=int, default=200)
    parser.add_argument("--width", type=int, default=304)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    keep_freed_memory()
    inputs, boxes = draw_inputs(args)
    size = f"{args.proposals} proposals, {args.dims} dimensions, {args.height} x {args.width}"
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(f"{size}, float32; medians of {args.repeats}, milliseconds")
    print(f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}; {extension_status()[1]}\n")
    check(inputs, boxes)
    names = ["operator", *ALTERNATIVES, *(f"{alternative} / op." for alternative in ALTERNATIVES)]
    print(f"|           |           | threads | {' | '.join(names)} |")
    print(f"|-----------|-----------|---------|{'-------------|' * 7}")
    for what, functions in implementations(boxes).items():
        compare(what, functions, inputs, args)
    with torch.no_grad():
        slow = medians({"broadcast": lambda: broadcast(*inputs)}, 1, args.device)["broadcast"]
    print(f"\nbroadcast, whole map, forward: {slow:.0f} ms")
    if args.device == "cpu" and sys.platform == "linux":
        for name in ("operator", "whole map", *ALTERNATIVES, "broadcast"):
            found = in_fresh_process(memory_of, name, args)
            print(f"memory of {'operator in boxes' if name == 'operator' else name}: {found:.1f} MiB")


if __name__ == "__main__":
    main()
