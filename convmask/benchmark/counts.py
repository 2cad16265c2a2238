"""Parameters, FLOPs and activations of a model, module by module, by fvcore."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
from torch import nn

from convmask.engine.errors import errors_of_config

TASKS = ("params", "flops", "activations")


def count_config(
    cfg: CfgNode, height: int, width: int, tasks: Sequence[str] = TASKS, seed: int = 0
) -> dict[str, dict[str, int]]:
    """:func:`count` of a config's model with random weights on the CPU, for an image of the given size.

    Heads that work on regions get as many as the config allows.

    Args:
        cfg: complete, see :func:`convmask.engine.prepare`; not changed.
        height: in pixels, as the network sees it.
        width: in pixels.
        tasks: of ``TASKS``.
        seed: of weights and image.

    Raises:
        ConfigError: no model can be built from the config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(seed)
    with errors_of_config("the model"):
        model = build_model(cfg)
    return count(model, faint_image(cfg, height, width), tasks)


def count(model: nn.Module, image: torch.Tensor, tasks: Sequence[str] = TASKS) -> dict[str, dict[str, int]]:
    """The counts of each task by name of the module; "" is the whole model.

    FLOPs count a multiplication with its addition as one. Activations are the output values of convolutions and matrix
    products. Both are of one forward pass without the post-processing.

    Args:
        model: takes Detectron2's list of dicts. Set to evaluation mode.
        image: (3, H, W), 0 to 255.
        tasks: of ``TASKS``.
    """
    model.eval()
    counts: dict[str, dict[str, int]] = {}
    if "params" in tasks:
        counts["params"] = dict(parameter_count(model))
    traced = _traceable(model, image)
    for task, analysis_type in (("flops", FlopCountAnalysis), ("activations", ActivationCountAnalysis)):
        if task in tasks:
            analysis = analysis_type(traced, traced.flattened_inputs)
            # element-wise operations are left out, as Detectron2's analysis does
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                by_module = analysis.by_module()
            counts[task] = {
                name.removeprefix("model").removeprefix("."): int(value)
                for name, value in by_module.items()
                if name.split(".")[0] in ("", "model")
            }
            counts[task][""] = int(by_module["model"])
    return counts


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) that images are resized to in tests; MIN_SIZE_TEST 0 leaves them as they are: COCO's then."""
    return (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) if cfg.INPUT.MIN_SIZE_TEST else (800, 1333)


def faint_image(cfg: CfgNode, height: int, width: int) -> torch.Tensor:
    """Noise (3, height, width) around the mean colour, 0 to 255.

    It is faint, so that a network without training keeps its activations in a range in which it proposes boxes.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return mean + 0.01 * std * torch.randn(3, height, width)


def _traceable(model: nn.Module, image: torch.Tensor) -> TracingAdapter:
    """The network without its post-processing, which no paper counts, as far as the model can leave it out.

    Of Detectron2's models it is an option; ours that have ``predict`` give their heads' outputs by it.
    """

    def forward(model: nn.Module, inputs: list[dict[str, Any]]) -> Any:
        if "do_postprocess" in inspect.signature(model.inference).parameters:
            return model.inference(inputs, do_postprocess=False)
        # a semantic K-Net has no kernel head to predict with
        if hasattr(model, "predict") and getattr(model, "sem_seg_head", None) is None:
            return model.predict(model.preprocess_image(inputs).tensor)
        return model(inputs)

    return TracingAdapter(model, [{"image": image}], forward, allow_non_tensor=True)
