"""Each method's function of tensors gives what the model itself predicts, and can be exported."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convmask.export import ExportError, wrap
from convmask.export.check import difference, predicted
from convmask.export.program import (
    check_requirements,
    export_program,
    onnx_bytes,
    onnx_runner,
    program_bytes,
    program_runner,
)
from convmask.inference import TestTimeAugmentation, ViewOptions

from .models import OPTIONS, photograph, random_model

VARIANTS = [
    *((name, ()) for name in OPTIONS),
    ("panoptic_fpn_synthetic", ("MODEL.PANOPTIC_FPN.TASK", "semantic")),
    ("panoptic_fpn_synthetic", ("INPUT.SEMANTIC_LAYOUT", "all", "MODEL.PANOPTIC_FPN.GROUPED_FPN", "True")),
    (
        "panoptic_fpn_synthetic",
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    ),
    ("panoptic_fcn_synthetic", ("MODEL.PANOPTIC_FCN.INFERENCE.SIMILAR_THRESH", "1.5")),
    (
        "panoptic_fcn_synthetic",
        ("MODEL.PANOPTIC_FCN.INFERENCE.MATRIX_NMS", "True", "MODEL.PANOPTIC_FCN.STUFF.KERNEL_AVERAGE", "region"),
    ),
    ("panoptic_fcn_synthetic", ("MODEL.PANOPTIC_FCN.KERNEL_HEAD.DEFORM", "True")),
    ("fcis_synthetic", ("MODEL.FCIS.CONVENTION", "chainercv")),
    ("fcis_synthetic", ("MODEL.FCIS.VOTING.PROCEDURE", "cpu", "MODEL.FCIS.SEPARATE_MAPS", "True")),
    ("fcis_synthetic", ("MODEL.FCIS.VOTING.ENABLED", "False", "MODEL.FCIS.PASTE", "detectron2")),
    (
        "embed_mask_synthetic",
        ("MODEL.EMBED_MASK.INFERENCE.MASK_VALUES", "logarithm", "MODEL.EMBED_MASK.INFERENCE.MASK_CELLS", "wide"),
    ),
    ("embed_mask_synthetic", ("MODEL.META_ARCHITECTURE", "ConvMaskFCOS")),
]


def arrays(outputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_function_gives_what_the_model_predicts(name: str, options: tuple[str, ...]) -> None:
    model = random_model(name, *options)
    wrapper = wrap(model)
    for height, width, number in ((64, 96, 0), (75, 61, 1)):
        image = photograph(height, width, number)
        with torch.no_grad():
            outputs = arrays(wrapper(image))
        expected = predicted(model, image)
        found = difference(expected, outputs)
        assert found.within_tolerance, found
        assert list(outputs) == list(wrapper.outputs)
        if "instances" in expected:
            assert found.instances > 0
            assert outputs["valid"].sum() == found.instances
            left = ~outputs["valid"]
            assert not outputs["scores"][left].any() and (outputs["classes"][left] == -1).all()
        if "panoptic_seg" in expected:
            assert expected["panoptic_seg"][1], "nothing is compared"


def test_a_difference_is_noticed() -> None:
    model = random_model("panoptic_fpn_synthetic")
    image = photograph(64, 96)
    expected = predicted(model, image)
    with torch.no_grad():
        right = arrays(wrap(model)(image))

    def changed(name: str, change: Any) -> Any:
        outputs = {key: value.copy() for key, value in right.items()}
        change(outputs[name])
        return difference(expected, outputs)

    def flip(masks: np.ndarray) -> None:
        masks[0] ^= True

    def add(index: Any, value: float) -> Any:
        def change(values: np.ndarray) -> None:
            values[index] += value

        return change

    assert difference(expected, right).within_tolerance
    assert changed("scores", add(0, 5e-3)).missing == 2
    assert changed("classes", add(0, 100)).missing == 2
    assert changed("boxes", add((0, 0), 0.25)).boxes == pytest.approx(0.25, abs=1e-3)
    assert changed("masks", flip).masks > 0.01
    assert changed("sem_seg", add((0, 0, 0), 5.0)).sem_seg > 1e-3
    assert changed("panoptic_seg", add(slice(0, 32), 50)).panoptic == pytest.approx(0.5, abs=0.01)


def test_models_that_cannot_be_exported_say_why() -> None:
    with pytest.raises(ExportError, match=r"Linear cannot be exported: there are exports of .*FCIS"):
        wrap(nn.Linear(1, 1))
    with pytest.raises(ExportError, match="PAD_PROPOSALS"):
        wrap(random_model("fcis_synthetic", "MODEL.FCIS.PAD_PROPOSALS", "True"))
    with pytest.raises(ExportError, match="TRUE_POSITIONS"):
        options = ["MODEL.PANOPTIC_FCN.INFERENCE.TRUE_POSITIONS", "True", "INPUT.TARGETS_IN_TEST", "True"]
        wrap(random_model("panoptic_fcn_synthetic", *options))
    with pytest.raises(ExportError, match=r"TEST\.AUG\.ENABLED"):
        wrap(TestTimeAugmentation(nn.Linear(1, 1), options=ViewOptions((0,), 100)))


def test_what_is_missing_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ExportError, match=r"--format pt2 needs torch 2\.7 or later; this is 2\.5\.1"):
        check_requirements(["pt2"])
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_requirements(["pt2"])
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install --no-build-isolation"):
        check_requirements(["onnx"], running=True)


def needs(*formats: str) -> None:
    try:
        check_requirements(formats, running=True)
    except ExportError as error:
        pytest.skip(str(error))


def exported(name: str, dynamic: bool) -> tuple[nn.Module, Any, Any]:
    model = random_model(name)
    wrapper = wrap(model)
    return model, wrapper, export_program(wrapper, (64, 96), dynamic)


# Each takes 5 to 10 seconds of one core, and ONNX 20.
FAST = {"embed_mask_synthetic"}
IN_ONNX = {"panoptic_fcn_synthetic"}
METHODS = [name for name in OPTIONS if name != "fcis_fpn_synthetic"]
FIXED = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in METHODS if name not in IN_ONNX
]


@pytest.mark.parametrize("name", FIXED)
def test_a_program_of_fixed_size(name: str) -> None:
    needs("pt2")
    model, _, program = exported(name, dynamic=False)
    image = photograph(64, 96)
    with torch.no_grad():
        outputs = arrays(program.module()(image))
    assert difference(predicted(model, image), outputs).within_tolerance
    assert not [node for node in program.graph.nodes if "convmask" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_onnx_and_a_saved_program_of_all_sizes(name: str) -> None:
    needs("pt2", "onnx")
    if name not in IN_ONNX and "CONVMASK_ALL_EXPORTS" not in os.environ:
        pytest.skip("takes 20 seconds: set CONVMASK_ALL_EXPORTS=1")
    model, wrapper, program = exported(name, dynamic=True)
    names = list(wrapper.outputs)
    runners = program_runner(program_bytes(program)), onnx_runner(onnx_bytes(program, names), names)
    least = wrapper.least_side
    for number, (height, width) in enumerate([(least, least + 32), (least + 32, least), (least + 64, least + 64)]):
        image = photograph(height, width, number)
        expected = predicted(model, image)
        for run in runners:
            found = difference(expected, run(image))
            if name == "panoptic_fcn_synthetic":
                # Random weights, thrice as large as drawn, carry rounding through kernels and two normalisations
                # further than trained ones, whose maps are the same: stuff of nearly the same score changes places.
                assert found.sem_seg <= 5e-3 and found.panoptic <= 0.05, (height, width, found)
                found = replace(found, sem_seg=0.0, panoptic=0.0)
            assert found.within_tolerance, (height, width, found)
