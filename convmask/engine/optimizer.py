"""The optimizer that a config asks for, and its learning rate."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import Tensor

logger = logging.getLogger(__name__)

_POSITIONS = re.compile(r"(^|\.)relative_position_bias_table$")


def scale_learning_rate(cfg: CfgNode) -> CfgNode:
    """Scales ``SOLVER.BASE_LR`` with the batch: the linear scaling rule (Goyal et al., arXiv 1706.02677, section 2.1).

    Returns:
        ``cfg`` if ``SOLVER.REFERENCE_IMS_PER_BATCH`` is 0 or the batch is of that size. Else a copy with the scaled
        rate, whose reference is its own batch, so that scaling it again changes nothing.

    Raises:
        ValueError: a negative reference.
    """
    reference, images = cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0:
        raise ValueError(f"SOLVER.REFERENCE_IMS_PER_BATCH is {reference}; it has to be 0 or a number of images")
    if reference in (0, images):
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    before = cfg.SOLVER.BASE_LR
    cfg.SOLVER.BASE_LR = before * images / reference
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = images
    logger.info("SOLVER.BASE_LR %g is for %d images; for %d it is %g", before, reference, images, cfg.SOLVER.BASE_LR)
    if frozen:
        cfg.freeze()
    return cfg


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer named by ``SOLVER.OPTIMIZER`` over the trainable parameters of ``model``.

    ``"SGD"`` has Detectron2's keys, ``"ADAMW"`` is decoupled Adam (Loshchilov & Hutter, 2019). Both have Detectron2's
    rules for parameter groups: ``SOLVER.WEIGHT_DECAY_NORM``, ``BIAS_LR_FACTOR``, ``WEIGHT_DECAY_BIAS``; and two more:
    ``BACKBONE_MULTIPLIER``, ``WEIGHT_DECAY_EMBED``. Parameters of the same rule are one group, whose update is a few
    operations instead of some for each parameter.

    With ``SOLVER.CLIP_GRADIENTS.ENABLED`` gradients are clipped before each update. Its ``CLIP_TYPE``: "value" cuts
    each element to plus or minus ``CLIP_VALUE``; "norm" scales the gradient of each parameter whose norm of order
    ``NORM_TYPE`` is above ``CLIP_VALUE`` down to it; "full_model" does so with all gradients and their common norm.

    Raises:
        ValueError: another optimizer or kind of clipping.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    options: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    groups = _merged(_with_own_rules([{**options, **group} for group in groups], cfg, model))
    if solver.OPTIMIZER == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **options
        )
    elif solver.OPTIMIZER == "ADAMW":
        # Four times as fast on the CPU. On CUDA the default is fast, and lets gradients be clipped after unscaling.
        fused = True if all(parameter.is_cpu for parameter in model.parameters()) else None
        optimizer = torch.optim.AdamW(groups, fused=fused, **options)
    else:
        raise ValueError(f'SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it has to be "SGD" or "ADAMW"')
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED:
        if clip.CLIP_TYPE not in _CLIPPERS:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}, not one of {', '.join(_CLIPPERS)}"
            )
        clipper = partial(_CLIPPERS[clip.CLIP_TYPE], limit=clip.CLIP_VALUE, order=clip.NORM_TYPE)
        # With a gradient scaler this is called after the gradients have been unscaled.
        optimizer.register_step_pre_hook(partial(_clip, clipper))
    return optimizer


def _with_own_rules(groups: list[dict[str, Any]], cfg: CfgNode, model: torch.nn.Module) -> list[dict[str, Any]]:
    """The groups, cut where ``BACKBONE_MULTIPLIER`` or ``WEIGHT_DECAY_EMBED`` tells their parameters apart."""
    multiplier, embedding_decay = cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.SOLVER.WEIGHT_DECAY_EMBED
    if multiplier == 1 and embedding_decay < 0:
        return groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    below_fpn = any(name.startswith("backbone.bottom_up.") for name in names.values())
    prefix = "backbone.bottom_up." if below_fpn else "backbone."
    result = []
    for group in groups:
        parts: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            parts.setdefault((name.startswith(prefix), bool(_POSITIONS.search(name))), []).append(parameter)
        for (in_backbone, is_embedding), members in parts.items():
            part = {**group, "params": members}
            if in_backbone:
                part["lr"] = group["lr"] * multiplier
            if is_embedding and embedding_decay >= 0:
                part["weight_decay"] = embedding_decay
            result.append(part)
    return result


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of equal options become one, in the order of their first parameters."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        options = {name: value for name, value in group.items() if name != "params"}
        merged = found.setdefault(tuple(sorted(options.items())), {"params": [], **options})
        merged["params"] += group["params"]
    return list(found.values())


def _clip(clipper: Callable[[list[Tensor]], None], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clipper([parameter for parameter in parameters if parameter.grad is not None])


def _clip_values(parameters: list[Tensor], limit: float, order: float) -> None:
    torch.nn.utils.clip_grad_value_(parameters, limit)


def _clip_each(parameters: list[Tensor], limit: float, order: float) -> None:
    gradients = [parameter.grad for parameter in parameters]
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients, order))
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1.0).unbind()))


def _clip_together(parameters: list[Tensor], limit: float, order: float) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, limit, order)


_CLIPPERS = {"value": _clip_values, "norm": _clip_each, "full_model": _clip_together}
