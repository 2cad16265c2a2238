"""K-Net's products of masks and features, and of kernels and features, in the forms that they can have.

    python benchmarks/bench_knet_products.py [--device cuda] [--repeats 9]

Forms take turns on the same random input, so that a disturbance hits all alike; each row gives medians of forward, and
of forward and backward, and their ratio to the release's form: einsum for masks, a convolution for kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from convmask.benchmark import median_times, processor


class Shape(NamedTuple):
    """N images, Q kernels, C channels, h x w cells."""

    name: str
    images: int
    kernels: int
    channels: int
    height: int
    width: int


SHAPES = (
    Shape("instance, 800 x 1333", 1, 100, 256, 100, 168),
    Shape("panoptic, 800 x 1333", 1, 153, 256, 100, 168),
    Shape("panoptic, batch of 2", 2, 153, 256, 100, 168),
    Shape("instance, 256 kernels", 1, 256, 256, 100, 168),
    Shape("semantic, 512 x 512", 2, 150, 512, 64, 64),
    Shape("quick configs", 8, 24, 64, 32, 32),
)
Form = Callable[[Tensor, Tensor], Tensor]


def masks_einsum(masks: Tensor, features: Tensor) -> Tensor:
    """The release's."""
    return torch.einsum("nqhw,nchw->nqc", masks, features)


def masks_matmul(masks: Tensor, features: Tensor) -> Tensor:
    """Masks times features, over cells."""
    return torch.bmm(masks.flatten(2), features.flatten(2).transpose(1, 2))


def masks_matmul_transposed(masks: Tensor, features: Tensor) -> Tensor:
    """Features times masks, turned afterwards."""
    return torch.bmm(features.flatten(2), masks.flatten(2).transpose(1, 2)).transpose(1, 2)


def masks_convolution(masks: Tensor, features: Tensor) -> Tensor:
    """Masks as kernels as large as the map, image by image."""
    return torch.stack(
        [functional.conv2d(x[:, None], mask[:, None])[..., 0, 0].T for mask, x in zip(masks, features, strict=True)]
    )


def kernels_convolution(kernels: Tensor, features: Tensor) -> Tensor:
    """The release's: image by image."""
    return torch.cat(
        [functional.conv2d(x[None], kernel[:, :, None, None]) for kernel, x in zip(kernels, features, strict=True)]
    )


def kernels_grouped(kernels: Tensor, features: Tensor) -> Tensor:
    """One convolution with a group for each image."""
    weight = kernels.flatten(0, 1)[:, :, None, None]
    return functional.conv2d(features.flatten(0, 1)[None], weight, groups=len(features))[0].unflatten(
        0, kernels.shape[:2]
    )


def kernels_einsum(kernels: Tensor, features: Tensor) -> Tensor:
    """As it is written in the paper."""
    return torch.einsum("nqc,nchw->nqhw", kernels, features)


def kernels_matmul(kernels: Tensor, features: Tensor) -> Tensor:
    """Kernels times features."""
    return torch.bmm(kernels, features.flatten(2)).unflatten(2, features.shape[2:])


PRODUCTS: dict[str, dict[str, Form]] = {
    "masks x features": {
        "einsum (release)": masks_einsum,
        "matmul": masks_matmul,
        "matmul, transposed": masks_matmul_transposed,
        "convolution": masks_convolution,
    },
    "kernels x features": {
        "convolution (release)": kernels_convolution,
        "grouped convolution": kernels_grouped,
        "einsum": kernels_einsum,
        "matmul": kernels_matmul,
    },
}
# its kernel is as large as the map: run on the smallest shape alone
SMALLEST_ONLY = "convolution"


def inputs_of(product: str, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Hard masks, or kernels with a gradient; and features with a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    features = torch.randn(shape.images, shape.channels, shape.height, shape.width, **options).requires_grad_()
    if product.startswith("masks"):
        masks = torch.randn(shape.images, shape.kernels, shape.height, shape.width, **options)
        return (masks > 0).float(), features
    return torch.randn(shape.images, shape.kernels, shape.channels, **options).requires_grad_(), features


def run(form: Form, inputs: tuple[Tensor, Tensor], backward: bool) -> Tensor:
    """The result, after its gradients where they are asked for."""
    if not backward:
        with torch.no_grad():
            return form(*inputs)
    result = form(*inputs)
    torch.autograd.grad(result, [x for x in inputs if x.requires_grad], torch.ones_like(result))
    return result


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    print(f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}; float32; medians of {args.repeats}\n")
    print("| product | shape (N, Q, C, h, w) | form | forward, ms | ratio | with backward, ms | ratio |")
    print("|---------|-----------------------|------|-------------|-------|-------------------|-------|")
    for product, all_forms in PRODUCTS.items():
        for shape in SHAPES:
            forms = {key: form for key, form in all_forms.items() if key != SMALLEST_ONLY or shape is SHAPES[-1]}
            inputs = inputs_of(product, shape, args.device)
            expected = run(next(iter(forms.values())), inputs, False)
            for form in forms.values():
                torch.testing.assert_close(run(form, inputs, False), expected, rtol=1e-3, atol=1e-2)
            forward, both = (
                list(
                    median_times(
                        {key: partial(run, form, inputs, backward) for key, form in forms.items()},
                        args.repeats,
                        args.device,
                    ).values()
                )
                for backward in (False, True)
            )
            for form_name, f, b in zip(forms, forward, both, strict=True):
                print(
                    f"| {product} | {shape.name} {tuple(shape[1:])} | {form_name} | {1000 * f:.2f} | "
                    f"{forward[0] / f:.2f} | {1000 * b:.2f} | {both[0] / b:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
