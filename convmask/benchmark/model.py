"""What a config's model costs at inference: counts, memory, and the time of each stage, as a record for json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from convmask.benchmark.counts import count_config
from convmask.benchmark.images import Input, in_batches, middle_size, random_images
from convmask.benchmark.machine import describe_machine
from convmask.benchmark.memory import extra_memory, in_fresh_process
from convmask.benchmark.timing import Spread, StageTimes, time_stages
from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.user_modules import import_user_module
from convmask.demo.model import has_weights
from convmask.engine.errors import ConfigError, errors_of_config
from convmask.engine.model_options import compile_parts
from convmask.inference.stages import STAGES, Stages, stages_of

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run.

    Attributes:
        precision: "float32", or autocasting (AMP) to "float16" or "bfloat16".
        batch_size: images a call.
        compiled: a backend of ``torch.compile`` for the dense parts, those that are registered with the class of the
            model (:mod:`convmask.inference.stages`); None: eager.
    """

    precision: str = "float32"
    batch_size: int = 1
    compiled: str | None = None

    def __str__(self) -> str:
        """For the row of a table."""
        return run_name(asdict(self))


def run_name(options: Mapping[str, Any]) -> str:
    """Of the fields of :class:`ModelOptions`, which a record has too."""
    mode = f"compiled by {options['compiled']}" if options["compiled"] else "eager"
    return f"{options['precision']}, batch {options['batch_size']}, {mode}"


def check_options(options: ModelOptions, device: str) -> None:
    """Makes sure that a model can be run so on a device.

    Raises:
        ConfigError: it cannot; the message names the option and its value.
    """
    if options.precision not in PRECISIONS:
        raise ConfigError(f"precision {options.precision!r} is not one of {', '.join(PRECISIONS)}")
    if options.batch_size < 1:
        raise ConfigError(f"batch size {options.batch_size} is less than 1")
    on_cuda = device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: this machine has no CUDA device")
    if options.precision == "float16" and not on_cuda:
        raise ConfigError(f"precision 'float16' needs a CUDA device; the device is {device!r}: take 'bfloat16'")
    if options.precision == "bfloat16" and on_cuda and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"precision 'bfloat16': {torch.cuda.get_device_name(device)} has none")
    backends = torch._dynamo.list_backends(None)
    if options.compiled is not None and options.compiled not in backends:
        raise ConfigError(f"there is no backend {options.compiled!r} of torch.compile, but {', '.join(backends)}")
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl"))
    if options.compiled == "inductor" and not on_cuda and not any(map(shutil.which, compilers)):
        raise ConfigError("torch.compile's backend 'inductor' needs a C++ compiler on the CPU: there is no g++ here")


def benchmark_config(
    cfg: CfgNode,
    images: Sequence[Input] | None = None,
    *,
    options: ModelOptions | None = None,
    warmup: int = 3,
    repeats: int = 20,
    counts: bool = True,
    memory: bool = True,
    imports: Sequence[str] = (),
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measures the inference of a config's model on ``MODEL.DEVICE``.

    ``MODEL.WEIGHTS`` are loaded where it names those of a whole model. With random weights, or noise for images, there
    is little to post-process, or too much: that stage then says nothing about a trained model.

    Args:
        cfg: complete, see :func:`convmask.engine.prepare`; not changed.
        images: dicts of Detectron2 with ``image`` (3, H, W) as the network sees it and ``height`` and ``width`` of the
            result; by default one of noise in the size of the config.
        options: see :class:`ModelOptions`.
        warmup: calls that do not count, at least; every batch is seen once.
        repeats: calls that count. They go through the batches in turn, so that the spread is also that of the images.
        counts: also parameters, FLOPs and activations, of the image of median area.
        memory: also the peak, of the first batch; on the CPU in a process of its own, eager only, since a compiler
            takes more than a model.
        imports: modules and files that register what the config names, for that process.
        progress: called after every call that counts.

    Returns:
        Plain values: ``model`` (name of the class), ``weights`` (None: random), ``images`` (number), ``size`` (height,
        width of the median one), ``precision``, ``batch_size``, ``compiled``, ``device``; ``parameters``, ``flops``,
        ``activations`` or None; ``peak_memory_mib``, above what is there with the model, or None; ``weights_mib``;
        ``stages_ms``: of each stage ``median``, ``lower`` and ``upper`` quartile and ``mean`` of a call;
        ``stages_total_ms``, the same of what the stages of a call add up to; ``total_ms`` of undisturbed calls;
        ``images_per_second`` by its median; ``first_call_ms``; ``warmup``, ``repeats``; ``machine``
        (:func:`~convmask.benchmark.machine.describe_machine`).

    Raises:
        ConfigError: see :func:`check_options`; no model can be built from the config; ``repeats`` is less than 1; the
            model needs more memory than there is.
        CheckpointError: the weights are unreadable, or of another model.
    """
    options = options or ModelOptions()
    device = cfg.MODEL.DEVICE
    check_options(options, device)
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED: what is measured is one view; set it to False")
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"{repeats} repeats after {warmup} to warm up: at least 1 and 0 are needed")
    images = list(images or random_images(cfg))
    batches = in_batches(images, options.batch_size)
    size = middle_size(images)
    counted = count_config(cfg, *size) if counts else {}
    peak = _peak_on_cpu(cfg, batches[0], options, imports) if memory and device == "cpu" else None
    model = load_model(cfg, options)
    with running(options, device):
        times = time_stages(model, batches, device=device, warmup=warmup, repeats=repeats, progress=progress)
        if memory and device != "cpu":
            peak = extra_memory(lambda: model(batches[0]), device)
    return {
        "model": type(model).__name__,
        "weights": cfg.MODEL.WEIGHTS if has_weights(cfg) else None,
        "images": len(images),
        "size": list(size),
        **asdict(options),
        "device": device,
        "parameters": counted["params"][""] if counts else None,
        "flops": counted["flops"][""] if counts else None,
        "activations": counted["activations"][""] if counts else None,
        "peak_memory_mib": peak,
        "weights_mib": sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 2**20,
        **_times(times),
        "images_per_second": 1000 * options.batch_size / times.total.median,
        "warmup": warmup,
        "repeats": repeats,
        "machine": describe_machine(device),
    }


def load_model(cfg: CfgNode, options: ModelOptions) -> nn.Module:
    """The model in evaluation mode, its dense parts compiled if they are to be.

    Raises:
        ConfigError, CheckpointError: see :func:`benchmark_config`.
    """
    torch.manual_seed(0)
    with errors_of_config("the model"):
        model = build_model(cfg).eval()
    if has_weights(cfg):
        Checkpointer(model, policy="strict", average=cfg.SOLVER.EMA.ENABLED).load(cfg.MODEL.WEIGHTS)
    if options.compiled:
        compile_dense_parts(model, options.compiled)
    return model


def compile_dense_parts(model: nn.Module, backend: str = "inductor", fullgraph: bool = False) -> tuple[str, ...]:
    """Compiles, in place, what is registered as dense with the class of a model; "backbone" where nothing is.

    Args:
        model: of a meta-architecture.
        backend: of ``torch.compile``.
        fullgraph: a part that is not one graph is an error when it is called.

    Returns:
        The names of the parts.

    Raises:
        ValueError: there is no such backend.
    """
    names = (stages_of(model) or Stages()).compiled
    return compile_parts(model, names, backend, fullgraph=fullgraph)


@contextmanager
def running(options: ModelOptions, device: str) -> Iterator[None]:
    """Without gradients and in the precision of the options."""
    dtype = PRECISIONS[options.precision]
    half = dtype != torch.float32
    with torch.no_grad(), torch.autocast(torch.device(device).type, dtype if half else None, enabled=half):
        yield


def _times(times: StageTimes) -> dict[str, Any]:
    def plain(spread: Spread) -> dict[str, float]:
        return {name: round(value, 4) for name, value in spread._asdict().items()}

    order = [*(name for name in STAGES if name in times.stages), *(name for name in times.stages if name not in STAGES)]
    return {
        "stages_ms": {name: plain(times.stages[name]) for name in order},
        "stages_total_ms": plain(times.stages_total),
        "total_ms": plain(times.total),
        "first_call_ms": round(times.first, 4),
    }


def _peak_on_cpu(cfg: CfgNode, batch: list[Input], options: ModelOptions, imports: Sequence[str]) -> float | None:
    if options.compiled:
        return None
    # as arrays: tensors would be sent through shared memory, which a process counts as its own when it reads them
    arrays = [{**image, "image": image["image"].numpy()} for image in batch]
    try:
        return in_fresh_process(_first_call, cfg, arrays, options, list(imports), torch.get_num_threads())
    except BrokenProcessPool:
        raise ConfigError("the process that measures memory was killed: the model needs more than there is") from None


def _first_call(
    cfg: CfgNode, batch: list[dict[str, Any]], options: ModelOptions, imports: Sequence[str], threads: int
) -> float:
    """The extra memory of a model's first call. Runs in a process that has done nothing else."""
    torch.set_num_threads(threads)
    get_cfg()  # registers the methods
    for module in imports:
        import_user_module(module)
    model = load_model(cfg, options)
    tensors = [{**image, "image": torch.from_numpy(image["image"])} for image in batch]
    with running(options, "cpu"):
        return extra_memory(lambda: model(tensors))
