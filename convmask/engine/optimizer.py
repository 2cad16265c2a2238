"""The optimizer that a config asks for, and its learning rate."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

logger = logging.getLogger(__name__)


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

    ``"SGD"`` is Detectron2's own. ``"ADAMW"`` is decoupled Adam (Loshchilov & Hutter, 2019) with the same rules for
    parameter groups: ``SOLVER.WEIGHT_DECAY_NORM``, ``BIAS_LR_FACTOR``, ``WEIGHT_DECAY_BIAS``, ``CLIP_GRADIENTS``.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` is one of Detectron2's, or "full_model": all gradients are multiplied by one
    factor where their common norm (of order ``NORM_TYPE``) exceeds ``CLIP_VALUE``.

    Raises:
        ValueError: another name.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return _optimizer(cfg, model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = _optimizer(cfg, model)
    # With a gradient scaler this is called after the gradients have been unscaled.
    optimizer.register_step_pre_hook(partial(_clip_together, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE))
    return optimizer


def _clip_together(
    optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, *, max_norm: float, norm_type: float
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def _optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    name = cfg.SOLVER.OPTIMIZER
    if name == "SGD":
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
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
