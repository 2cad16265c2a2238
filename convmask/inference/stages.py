"""Where a model's inference spends its time, stage by stage, without a line about it in the model's own code.

A meta-architecture says once, beside its class, which of its modules and methods belong to which stage:

    @register_stages(heads=("predict",), compiled=("backbone", "heads"))
    @META_ARCH_REGISTRY.register()
    class MyModel(nn.Module): ...

While :func:`observed` is entered, each of these parts tells a :class:`StageClock` when it begins and ends. Time counts
for the innermost part only, and what no part claims is post-processing, so that the stages of a call add up to it.
Outside of :func:`observed` the model is what it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, SemanticSegmentor
from torch import nn

PREPROCESS, BACKBONE, HEADS, POSTPROCESS, TRANSFER, REST = (
    "preprocess",
    "backbone",
    "heads",
    "postprocess",
    "transfer",
    "rest",
)
# "transfer" is that of results to the CPU, which a model's call does not do; "preprocess" includes that of images.
STAGES = (PREPROCESS, BACKBONE, HEADS, POSTPROCESS, TRANSFER)

Class = TypeVar("Class", bound=type[nn.Module])


@dataclass(frozen=True)
class Stages:
    """Parts of a model by stage: dotted names of modules ("roi_heads.mask_head") and methods ("sem_seg_head.layers").

    A part may lie inside of another one of another stage. Parts that a variant of the model lacks are passed over.

    Attributes:
        backbone: with the feature pyramid.
        heads: from features to the outputs of the last layers; proposals, which layers follow, are among them.
        preprocess: images to the device, normalised and padded.
        postprocess: what lies inside of heads but is none of them. Whatever no stage claims is post-processing too.
        compiled: parts that ``torch.compile`` takes as full graphs, and that hold no part of another stage.
    """

    backbone: tuple[str, ...] = ("backbone",)
    heads: tuple[str, ...] = ()
    preprocess: tuple[str, ...] = ("preprocess_image",)
    postprocess: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ("backbone",)

    def parts(self) -> dict[str, str]:
        """The stage of each part."""
        by_stage = {
            PREPROCESS: self.preprocess,
            BACKBONE: self.backbone,
            HEADS: self.heads,
            POSTPROCESS: self.postprocess,
        }
        return {name: stage for stage, names in by_stage.items() for name in names}


_REGISTERED: dict[type[nn.Module], Stages] = {}


def register_stages(**parts: tuple[str, ...]) -> Callable[[Class], Class]:
    """A decorator of meta-architectures, for them and for their subclasses without one; see :class:`Stages`."""
    stages = Stages(**parts)

    def register(meta_architecture: Class) -> Class:
        _REGISTERED[meta_architecture] = stages
        return meta_architecture

    return register


def stages_of(model: nn.Module) -> Stages | None:
    """What is registered for the class of a model, or for the nearest class that it derives from."""
    return next((_REGISTERED[kind] for kind in type(model).__mro__ if kind in _REGISTERED), None)


class StageClock:
    """Adds up the time of each stage. One stage runs at a time: entering another interrupts the one before.

    Attributes:
        seconds: by stage, in the order in which they began.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Begins with nothing.

        Args:
            now: seconds. For a GPU it waits until all work is done: :func:`convmask.benchmark.timing.clock_of`.
        """
        self.seconds: dict[str, float] = {}
        self._now = now
        self._running: list[str] = []
        self._last = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside counts for this stage, but for stages that are entered inside."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = self._now()
        if self._running:
            running = self._running[-1]
            self.seconds[running] = self.seconds.get(running, 0.0) + now - self._last
        self._last = now


@contextmanager
def observed(model: nn.Module, clock: StageClock) -> Iterator[None]:
    """Inside, calls of ``model`` are split into stages; outside, nothing is left of it.

    ``model(inputs)`` itself has to be called in ``clock.stage("postprocess")``: :func:`unclaimed_stage` says which. A
    model of a class without registered stages is split into "backbone" and "rest". Compiled parts stay compiled.
    """
    stages = stages_of(model)
    parts = stages.parts() if stages else dict.fromkeys(Stages().backbone, BACKBONE)
    with ExitStack() as stack:
        for name, stage in parts.items():
            place = _place(model, name)
            if place is not None:
                stack.enter_context(_replaced(*place, clock, stage))
        yield


def unclaimed_stage(model: nn.Module) -> str:
    """The stage of what no part of the model claims."""
    return POSTPROCESS if stages_of(model) else REST


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The owner and the attribute through which a part is called; None where there is no such part."""
    *path, last = name.split(".")
    owner: Any = model
    for step in path:
        owner = getattr(owner, step, None)
    part = getattr(owner, last, None)
    if isinstance(part, nn.Module):
        # what a call of the module goes through; not hooks, which Module.compile would compile with the module
        return part, "_compiled_call_impl"
    return (owner, last) if callable(part) else None


@contextmanager
def _replaced(owner: nn.Module, attribute: str, clock: StageClock, stage: str) -> Iterator[None]:
    own = vars(owner).get(attribute)
    function = getattr(owner, attribute) or owner._call_impl

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.stage(stage):
            return function(*args, **kwargs)

    setattr(owner, attribute, timed)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, own)


_REGION_HEADS = ("proposal_generator", "roi_heads")
_SUPPRESSION = ("roi_heads.box_predictor.inference",)
_REGION_LAYERS = ("proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head.layers")
register_stages(heads=_REGION_HEADS, postprocess=_SUPPRESSION, compiled=("backbone", *_REGION_LAYERS))(GeneralizedRCNN)
register_stages(
    heads=(*_REGION_HEADS, "sem_seg_head.layers"),
    postprocess=_SUPPRESSION,
    compiled=("backbone", "sem_seg_head.layers", *_REGION_LAYERS),
)(PanopticFPN)
register_stages(heads=("sem_seg_head.layers",), compiled=("backbone", "sem_seg_head.layers"))(SemanticSegmentor)
register_stages(heads=("head",), compiled=("backbone", "head"))(RetinaNet)
