"""The optimizer that a config asks for."""

from __future__ import annotations

import re
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

FULL_MODEL = "full_model"
_EMBEDDING = re.compile(r"(^|\.)relative_position_bias_table$")


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer named by ``SOLVER.OPTIMIZER`` over the trainable parameters of ``model``.

    ``"SGD"`` is Detectron2's own. ``"ADAMW"`` is decoupled Adam (Loshchilov & Hutter, 2019) with the same rules for
    parameter groups: ``SOLVER.WEIGHT_DECAY_NORM``, ``BIAS_LR_FACTOR``, ``WEIGHT_DECAY_BIAS``, ``CLIP_GRADIENTS``; and
    two more: ``BACKBONE_MULTIPLIER``, ``WEIGHT_DECAY_EMBED``. ``CLIP_GRADIENTS.CLIP_TYPE`` may also be "full_model":
    the norm of all gradients together is clipped, where Detectron2's "norm" clips that of each parameter.

    Raises:
        ValueError: another name, or SGD with one of the rules that it does not have.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name == "SGD":
        own = cfg.SOLVER.BACKBONE_MULTIPLIER != 1 or cfg.SOLVER.WEIGHT_DECAY_EMBED >= 0
        if own or cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == FULL_MODEL:
            raise ValueError(
                'SOLVER.BACKBONE_MULTIPLIER, WEIGHT_DECAY_EMBED and CLIP_GRADIENTS.CLIP_TYPE "full_model" need '
                'SOLVER.OPTIMIZER "ADAMW"'
            )
        return build_sgd(cfg, model)
    if name != "ADAMW":
        raise ValueError(f'SOLVER.OPTIMIZER is {name!r}; it has to be "SGD" or "ADAMW"')
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    whole = clipping.ENABLED and clipping.CLIP_TYPE == FULL_MODEL
    optimizer = _clipping_the_whole(cfg) if whole else maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    parameters = _with_own_rules(parameters, cfg, model)
    return optimizer(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def _clipping_the_whole(cfg: CfgNode) -> type[torch.optim.AdamW]:
    value, norm_type = cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE

    class AdamWWithFullModelClipping(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, value, norm_type)
            return super().step(closure)

    return AdamWWithFullModelClipping


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
            parts.setdefault((name.startswith(prefix), bool(_EMBEDDING.search(name))), []).append(parameter)
        for (in_backbone, is_embedding), members in parts.items():
            part = {**group, "params": members}
            if in_backbone:
                part["lr"] = group.get("lr", cfg.SOLVER.BASE_LR) * multiplier
            if is_embedding and embedding_decay >= 0:
                part["weight_decay"] = embedding_decay
            result.append(part)
    return result
