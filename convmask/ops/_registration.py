"""Defines operators in the namespace ``torch.ops.convmask``.

The schema is defined here, in Python, with the reference as the kernel for every device. The compiled library only adds
kernels for single devices, which the dispatcher prefers. So there is one call path with and without the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from convmask.ops._extension import SLOWDOWNS, warn_slow_path

_library = torch.library.Library("convmask", "FRAGMENT")  # definitions live as long as this object


def register_operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    slowdown: str | None = None,
) -> None:
    """Defines ``torch.ops.convmask.<name>``.

    Args:
        schema: such as ``"scale(Tensor x, float factor) -> Tensor"``.
        reference: the operator in plain PyTorch, with the schema's arguments and results.
        fake: allocates the results without computing them, for ``torch.compile`` and export.
        backward: ``backward(ctx, *gradients)`` of ``torch.library.register_autograd``. Without it, differentiating
            raises NotImplementedError.
        setup_context: ``setup_context(ctx, inputs, output)``, what ``backward`` needs.
        slowdown: how much slower the reference is than the compiled kernel, such as "about 20 times slower"; shown when
            the reference runs. None if it is not slower.
    """
    name = schema.partition("(")[0]
    if slowdown is not None:
        SLOWDOWNS[name] = slowdown

    def run_reference(*args: Any, **kwargs: Any) -> Any:
        if slowdown is not None:
            warn_slow_path(_device_type(args))
        return reference(*args, **kwargs)

    def no_gradient(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"torch.ops.convmask.{name} has no gradient")

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"convmask::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"convmask::{name}", backward or no_gradient, setup_context=setup_context, lib=_library
    )


def _device_type(args: tuple[Any, ...]) -> str:
    return next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
