"""Against recorded outputs of the original release (two images, one batch, narrow ResNet-50-FPN).

The record was made on two threads. Where two threads and the processor round as then, which equal kernel maps show,
centres and regions agree within 1e-4 on all levels. Elsewhere they cannot: with the recorded random weights the first
deformable convolution of the position head moves its taps by up to 3500 cells on P3, so that one unit in the last place
of P3 changes the logits there by up to 0.005. ``test_golden_panoptic_fcn_in_double_precision`` checks that this is
rounding and no difference of the models: in double precision the recorded logits are up to 0.008 off, as ours are.
Positions on P3, and gradients that pass through the position head's deformable convolutions, then have the tolerances
below. Everything after the heads is compared from the recorded head outputs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch import nn

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.projects.panoptic_fcn.checkpoint import convert_original
from convmask.projects.panoptic_fcn.heads import HeadOutputs

Record = dict[str, np.ndarray]
LEVELS = ("p3", "p4", "p5", "p6", "p7")
KINDS = ("centers", "regions", "kernels")
SIZE = (384, 448)
# Centres and regions on P3: most cells agree, few do not. The greatest difference is of two results that are each off
# by about P3_ROUNDING.
P3_MEDIAN, P3_MAXIMUM = 1e-4, 0.03
# How far the record is from double precision on P3, at most and at the median, and on other levels.
P3_ROUNDING, P3_ROUNDING_MEDIAN, ROUNDING = 1e-2, 3e-5, 2e-5
# Our root mean square error is at most so many times the record's, whatever the processor and the threads.
ERROR_RATIO = 2.0
# Gradient norms of what the taps depend on, relative; two threads instead of one change them by as much.
ILL_CONDITIONED = ("backbone.", "position_head.tower.")
# Of these, at most so many are beyond 1e-3 where the processor rounds as the recording one.
ILL_CONDITIONED_NORMS = 4
ILL_CONDITIONED_TOLERANCE = 0.05
# Pixels of one mask whose probability is the threshold up to rounding.
BORDER_PIXELS = 3
KEYS = {
    "MODEL.SEMANTIC_FPN.": "MODEL.PANOPTIC_FCN.SEMANTIC_FPN.",
    "MODEL.POSITION_HEAD.CONVS_DIM": "MODEL.PANOPTIC_FCN.POSITION_HEAD.CONVS_DIM",
    "MODEL.KERNEL_HEAD.": "MODEL.PANOPTIC_FCN.KERNEL_HEAD.",
    "MODEL.FEATURE_ENCODER.": "MODEL.PANOPTIC_FCN.FEATURE_ENCODER.",
    "MODEL.POSITION_HEAD.THING.NUM_CLASSES": "MODEL.PANOPTIC_FCN.NUM_CLASSES",
    "MODEL.POSITION_HEAD.STUFF.NUM_CLASSES": "MODEL.PANOPTIC_FCN.STUFF.NUM_CLASSES",
    "MODEL.INFERENCE.COMBINE.STUFF_AREA_LIMIT": "MODEL.PANOPTIC_FCN.COMBINE.STUFF_AREA_LIMIT",
    "MODEL.INFERENCE.COMBINE.INST_THRESH": "MODEL.PANOPTIC_FCN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
}


@pytest.fixture(scope="module")
def same_rounding(record: Record, outputs: HeadOutputs) -> bool:
    """Whether the features of P3 are the recorded ones to the last bit."""
    return np.array_equal(outputs.kernels[0].numpy(), record["eval/kernels/p3"])


@pytest.fixture(scope="module")
def record(golden: Any) -> Record:
    return golden("panoptic_fcn")


def narrow_config(record: Record, repository: Path, name: str) -> CfgNode:
    """A config with the record's overrides by our keys."""
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "PanopticFCN" / f"{name}.yaml"))
    overrides = json.loads(str(record["cfg_overrides"]))
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        prefix = next((prefix for prefix in KEYS if key.startswith(prefix)), "")
        if not prefix and key == "MODEL.SEM_SEG_HEAD.NUM_CLASSES":
            continue
        cfg.merge_from_list([KEYS.get(prefix, "") + key.removeprefix(prefix), value])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    return cfg


def released_weights(record: Record) -> dict[str, torch.Tensor]:
    return {key[2:]: torch.from_numpy(value) for key, value in record.items() if key.startswith("w/")}


@pytest.fixture(scope="module")
def model(record: Record, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model = build_model(narrow_config(record, repository, "panoptic_fcn_R_50_1x"))
    path = tmp_path_factory.mktemp("released") / "original.pth"
    torch.save({"model": released_weights(record)}, path)
    Checkpointer(model, policy="strict").load(str(path))
    return model


def unpacked(masks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(masks, axis=-1, count=SIZE[1]).astype(bool))


def batch(record: Record) -> list[dict[str, Any]]:
    inputs = []
    for prefix in ("in/0", "in/1"):
        masks = BitMasks(unpacked(record[f"{prefix}/masks"]))
        instances = Instances(SIZE, gt_masks=masks, gt_boxes=masks.get_bounding_boxes())
        instances.gt_classes = torch.from_numpy(record[f"{prefix}/classes"])
        sem_seg = torch.from_numpy(record[f"{prefix}/sem_seg"].astype(np.int64))
        inputs.append(
            {"image": torch.from_numpy(record[f"{prefix}/image"]), "instances": instances, "sem_seg": sem_seg}
        )
    return inputs


@pytest.fixture(scope="module")
def outputs(record: Record, model: nn.Module) -> HeadOutputs:
    with torch.no_grad():
        return model.eval().predict(model.preprocess_image(batch(record)[:1]).tensor)


@pytest.fixture(scope="module")
def prediction(record: Record, model: nn.Module) -> dict[str, Any]:
    """What follows the heads, of the recorded head outputs."""
    lists = ([torch.from_numpy(record[f"eval/{kind}/{name}"][0]) for name in LEVELS] for kind in KINDS)
    recorded = HeadOutputs(*lists, torch.from_numpy(record["eval/encoded"][0]))
    with torch.no_grad():
        return model.eval().postprocess(*model.masks_of(recorded), 4, SIZE, SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_panoptic_fcn_levels(record: Record, outputs: HeadOutputs, same_rounding: bool, kind: str) -> None:
    for name, found in zip(LEVELS, getattr(outputs, kind), strict=True):
        difference = np.abs(found.numpy() - record[f"eval/{kind}/{name}"])
        if name == "p3" and kind != "kernels" and not same_rounding:
            assert np.median(difference) <= P3_MEDIAN
            assert difference.max() <= P3_MAXIMUM
        else:
            assert difference.max() <= 1e-4, name


def test_golden_panoptic_fcn_in_double_precision(record: Record, model: nn.Module, outputs: HeadOutputs) -> None:
    """The record is near the truth, on P3 up to its rounding, and our single precision is as near as the record is."""
    precise = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        truth = precise.predict(precise.preprocess_image(batch(record)[:1]).tensor)
    for kind in KINDS:
        levels = zip(LEVELS, getattr(truth, kind), getattr(outputs, kind), strict=True)
        for name, exact, found in levels:
            assert exact.dtype == torch.float64
            ours = (found - exact).abs().numpy()
            recorded = np.abs(record[f"eval/{kind}/{name}"] - exact.numpy())
            ill_conditioned = name == "p3" and kind != "kernels"
            assert recorded.max() <= (P3_ROUNDING if ill_conditioned else ROUNDING), (kind, name)
            assert np.median(recorded) <= P3_ROUNDING_MEDIAN, (kind, name)
            assert np.sqrt(np.mean(ours**2)) <= ERROR_RATIO * np.sqrt(np.mean(recorded**2)), (kind, name)


def test_golden_panoptic_fcn_encoded_feature(record: Record, outputs: HeadOutputs) -> None:
    np.testing.assert_allclose(outputs.encoded.numpy(), record["eval/encoded"], atol=1e-4, rtol=0)


def test_golden_panoptic_fcn_losses_and_gradients(record: Record, model: nn.Module, same_rounding: bool) -> None:
    model.train()
    model.zero_grad()
    losses = model(batch(record))
    expected = {key.removeprefix("loss/"): value for key, value in record.items() if key.startswith("loss/")}
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-4), name
    sum(losses.values()).backward()
    norms = json.loads(str(record["grad_norms"]))
    # the names of the release, by those here
    names = convert_original({name: torch.full((1, 1), index) for index, name in enumerate(norms)})
    released = list(norms)
    found = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == names.keys()
    beyond = []
    for name, index in names.items():
        if found[name] != pytest.approx(norms[released[int(index)]], rel=1e-3):
            beyond.append(name)
        tolerance = ILL_CONDITIONED_TOLERANCE if name.startswith(ILL_CONDITIONED) else 1e-3
        assert found[name] == pytest.approx(norms[released[int(index)]], rel=tolerance), name
    assert not same_rounding or len(beyond) <= ILL_CONDITIONED_NORMS, beyond


def test_golden_panoptic_fcn_whole_model(record: Record, model: nn.Module) -> None:
    """From the image: what does not hang on P3."""
    result = model.eval()(batch(record)[:1])[0]
    np.testing.assert_allclose(result["instances"].scores[:20].numpy(), record["eval/inst_scores"][:20], atol=1e-3)
    assert (result["sem_seg"].argmax(0).numpy() != record["eval/sem_seg"]).sum() <= BORDER_PIXELS
    assert (result["panoptic_seg"][0].numpy() != record["eval/panoptic_seg"]).mean() <= 0.01


def test_golden_panoptic_fcn_instances(record: Record, prediction: dict[str, Any]) -> None:
    instances = prediction["instances"]
    np.testing.assert_array_equal(instances.pred_classes.numpy(), record["eval/inst_classes"])
    np.testing.assert_allclose(instances.scores.numpy(), record["eval/inst_scores"], atol=1e-4, rtol=0)
    differing = (instances.pred_masks != unpacked(record["eval/inst_masks"])).flatten(1).sum(dim=1)
    assert differing.max() <= BORDER_PIXELS
    boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    torch.testing.assert_close(instances.pred_boxes.tensor, boxes.tensor, rtol=0, atol=0)


def test_golden_panoptic_fcn_semantic_map(record: Record, prediction: dict[str, Any]) -> None:
    assert (prediction["sem_seg"].argmax(0).numpy() != record["eval/sem_seg"]).sum() <= BORDER_PIXELS


def test_golden_panoptic_fcn_panoptic_map(record: Record, prediction: dict[str, Any]) -> None:
    ids, segments = prediction["panoptic_seg"]
    assert (ids.numpy() != record["eval/panoptic_seg"]).sum() <= BORDER_PIXELS
    expected = json.loads(str(record["eval/panoptic_info"]))
    assert len(segments) == len(expected)
    for found, wanted in zip(segments, expected, strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            tolerance = {"score": 1e-4, "area": BORDER_PIXELS}.get(key, 0)
            assert found[key] == pytest.approx(value, abs=tolerance), (key, found, wanted)
