"""What training does to any model, whatever its method: activation checkpointing, compilation, several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.layers import CNNBlockBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import SwinTransformerBlock

# Blocks of one tensor in, one out. A backbone of other blocks names their type in a call of register_block.
_BLOCKS: list[type[nn.Module]] = [CNNBlockBase, SwinTransformerBlock]


def register_block(block: type[nn.Module]) -> type[nn.Module]:
    """Declares, as a decorator or called, that a module type is a block that activation checkpointing may repeat."""
    _BLOCKS.append(block)
    return block


def checkpoint_activations(backbone: nn.Module) -> int:
    """Lets each block of a backbone keep its input only, and run its forward pass again in the backward pass.

    Losses, gradients and running statistics stay what they are. Names in the state dict do too.

    Returns:
        The number of blocks.

    Raises:
        ValueError: the backbone has no block of a known type.
    """
    types = tuple(_BLOCKS)
    blocks: list[nn.Module] = []
    _collect(backbone, types, blocks)
    if not blocks:
        known = ", ".join(block.__name__ for block in _BLOCKS)
        raise ValueError(
            f"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING: {type(backbone).__name__} has no blocks of the types {known} "
            "(convmask.engine.model_options.register_block)"
        )
    for block in blocks:
        block.forward = partial(_repeated, block, block.forward)
    return len(blocks)


def _collect(module: nn.Module, types: tuple[type[nn.Module], ...], found: list[nn.Module]) -> None:
    """The outermost modules of the given types."""
    for child in module.children():
        if isinstance(child, types):
            found.append(child)
        else:
            _collect(child, types, found)


def _repeated(block: nn.Module, forward: Any, *args: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not enter the batch into running statistics once more."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # The same tensors have to be saved as in the first pass, so the statistics do take part, with no weight.
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def compile_modules(model: nn.Module, names: tuple[str, ...], backend: str) -> None:
    """Compiles parts of a model in place, by ``torch.compile``; names in the state dict stay.

    Args:
        model: whose parts they are.
        names: modules ("backbone") and methods ("sem_seg_head.layers").
        backend: of ``torch.compile``.

    Raises:
        ValueError: the model has no such part, or there is no such backend.
    """
    compiled = compile_parts(model, names, backend)
    for name in names:
        if name not in compiled:
            top = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"MODEL.COMPILE.MODULES: this model has no part {name!r}; it has {top} and their parts")


def compile_parts(
    model: nn.Module, names: tuple[str, ...], backend: str, *, fullgraph: bool = False
) -> tuple[str, ...]:
    """:func:`compile_modules` of the parts that are there; returns their names.

    Args:
        model: see above, as are ``names`` and ``backend`` in their places.
        names: see above.
        backend: see above.
        fullgraph: a part that is not one graph is an error when it is called.

    Raises:
        ValueError: there is no such backend.
    """
    if names and backend not in torch._dynamo.list_backends(None):
        known = ", ".join(torch._dynamo.list_backends())
        raise ValueError(f"MODEL.COMPILE.BACKEND is {backend!r}, not one of {known}")
    modules = dict(model.named_modules())
    compiled = []
    for name in filter(None, names):
        owner, _, last = name.rpartition(".")
        if name in modules:
            modules[name].compile(backend=backend, fullgraph=fullgraph)
        elif callable(method := getattr(modules.get(owner), last, None)):
            setattr(modules[owner], last, torch.compile(method, backend=backend, fullgraph=fullgraph))
        else:
            continue
        compiled.append(name)
    return tuple(compiled)


def prepare_model(cfg: CfgNode, model: nn.Module) -> None:
    """Applies ``MODEL.BACKBONE.ACTIVATION_CHECKPOINTING`` and ``MODEL.COMPILE`` for training, in place.

    Raises:
        ValueError: see :func:`checkpoint_activations` and :func:`compile_modules`.
    """
    if cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING:
        backbone = getattr(model, "backbone", None)
        if backbone is None:
            raise ValueError(f"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING: {type(model).__name__} has no backbone")
        checkpoint_activations(backbone)
    if cfg.MODEL.COMPILE.MODULES:
        compile_modules(model, tuple(cfg.MODEL.COMPILE.MODULES), cfg.MODEL.COMPILE.BACKEND)


def distribute(model: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
    """Wraps ``model`` for training in several processes; returns it as it is where there is one."""
    options: dict[str, Any] = {"broadcast_buffers": False, "find_unused_parameters": find_unused_parameters}
    if next(model.parameters()).device.type == "cpu":
        # DistributedDataParallel refuses device ids, Detectron2's default, for a model on the CPU.
        options["device_ids"] = None
    return create_ddp_model(model, **options)


def training_precision(cfg: CfgNode) -> torch.dtype:
    """The type that ``SOLVER.AMP`` asks for on ``MODEL.DEVICE``; float32 where it is off.

    Raises:
        ValueError: an unknown type, or float16 on the CPU.
    """
    amp, on_cuda = cfg.SOLVER.AMP, cfg.MODEL.DEVICE.startswith("cuda")
    types = {
        "auto": torch.float16 if on_cuda else torch.bfloat16,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if amp.DTYPE not in types:
        raise ValueError(f"SOLVER.AMP.DTYPE is {amp.DTYPE!r}, not one of {', '.join(types)}")
    if not amp.ENABLED:
        return torch.float32
    if types[amp.DTYPE] == torch.float16 and not on_cuda:
        raise ValueError(f"SOLVER.AMP.DTYPE float16 needs a CUDA device; MODEL.DEVICE is {cfg.MODEL.DEVICE}")
    return types[amp.DTYPE]
