"""Each method's stages, told apart by a clock that only the network's own layers move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from convmask.benchmark.timing import time_stages
from convmask.inference.stages import StageClock, observed, register_stages, stages_of, unclaimed_stage

from .networks import NETWORKS, narrow_model, noise

# Layers that work on what was found, not on the whole map.
AFTER_THE_HEADS = ("thing_embedding", "stuff_embedding")


class Layers:
    """A clock that ticks once for each call of a layer, and the calls by the stage that they are expected in."""

    def __init__(self, model: nn.Module) -> None:
        self.time = 0.0
        self.expected: dict[str, float] = {}
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, name=name: self.tick(name))

    def tick(self, name: str) -> None:
        top = name.split(".")[0]
        stage = "backbone" if top == "backbone" else "postprocess" if top in AFTER_THE_HEADS else "heads"
        self.expected[stage] = self.expected.get(stage, 0.0) + 1
        self.time += 1


def values_of(outputs: list[dict[str, Any]]) -> list[torch.Tensor]:
    values = []
    for output in outputs:
        values += [output["sem_seg"]] if "sem_seg" in output else []
        values += list(output["panoptic_seg"][:1]) if "panoptic_seg" in output else []
        values += [output["instances"].scores, output["instances"].pred_masks] if "instances" in output else []
    return values


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_of_every_method(name: str) -> None:
    model, batch = narrow_model(name), noise((64, 96), (64, 64))
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    with torch.no_grad():
        expected = values_of(model(batch))
    layers = Layers(model)
    clock = StageClock(lambda: layers.time)
    with torch.no_grad(), observed(model, clock), clock.stage(unclaimed_stage(model)):
        found = values_of(model(batch))
    # the same layers in the same stages, and nothing that belongs to none
    assert {stage: seconds for stage, seconds in clock.seconds.items() if seconds} == layers.expected
    assert clock.seconds.keys() == {"preprocess", "backbone", "heads", "postprocess"}
    assert layers.expected["backbone"] >= 20 and layers.expected["heads"] > 3
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # nothing is left
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes


def test_stages_add_up_to_the_call() -> None:
    clock = StageClock(itertools.count().__next__)
    with clock.stage("postprocess"):  # 0
        with clock.stage("heads"):  # 1
            with clock.stage("backbone"):  # 2 to 3
                pass
            with pytest.raises(KeyError), clock.stage("backbone"):  # 4 to 5
                raise KeyError
        # 6
        with clock.stage("preprocess"):  # 7 to 8
            pass
    # 9
    assert clock.seconds == {"postprocess": 3, "heads": 3, "backbone": 2, "preprocess": 1}
    assert sum(clock.seconds.values()) == 9


class Plain(nn.Module):
    """Without registered stages."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 3)
        self.decoder = nn.Conv2d(2, 1, 1)

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"sem_seg": self.decode(self.backbone(x["image"][None].float()))[0]} for x in batch]

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.decoder(features)


def test_a_class_that_says_nothing_has_backbone_and_rest() -> None:
    assert stages_of(Plain()) is None
    # every look at the clock takes a second: two for a call, and one more for each stage that begins or ends
    times = time_stages(Plain(), [noise((8, 8))], warmup=1, repeats=4, now=itertools.count().__next__)
    medians = {name: spread.median for name, spread in times.stages.items()}
    assert medians == {"rest": 2000, "backbone": 1000, "transfer": 1000}
    # between the model's stage and that of the transfer the clock is looked at and nothing runs
    assert times.stages_total == (4000, 4000, 4000, 4000)
    assert times.total.median == 1000


def test_a_class_inherits_stages_and_may_have_its_own() -> None:
    register_stages(heads=("decode",), preprocess=())(Plain)

    class Derived(Plain):
        pass

    try:
        assert stages_of(Derived()) == stages_of(Plain())
        register_stages(heads=("decoder", "none.at.all"))(Derived)
        for model, heads in ((Plain(), "decode"), (Derived(), "decoder")):
            clock = StageClock()
            with observed(model, clock):
                assert ("decode" in vars(model)) == (heads == "decode")
                model(noise((8, 8)))
            assert clock.seconds.keys() == {"backbone", "heads"}
    finally:
        from convmask.inference import stages

        for kind in (Plain, Derived):
            del stages._REGISTERED[kind]


def test_compiled_parts_stay_compiled() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Plain()
    model.backbone.compile(backend=backend)
    model.decode = torch.compile(model.decode, backend=backend)
    batch, clock = noise((8, 8)), StageClock()
    expected = model(batch)[0]["sem_seg"]
    assert len(graphs) == 2
    compiled = model.backbone._compiled_call_impl, model.decode
    register_stages(heads=("decode",))(Plain)
    try:
        with observed(model, clock):
            assert torch.equal(model(batch)[0]["sem_seg"], expected)
    finally:
        from convmask.inference import stages

        del stages._REGISTERED[Plain]
    assert len(graphs) == 2, "traced once more, with what observes in it"
    assert clock.seconds.keys() == {"backbone", "heads"}
    assert (model.backbone._compiled_call_impl, model.decode) == compiled
