"""Test-time augmentation of every method's quick model: random weights, low thresholds, so that much is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from convmask.config import get_cfg
from convmask.engine import Predictor, Trainer, load_config, prepare
from convmask.inference import TestTimeAugmentation, ViewOptions, views_of, with_test_time_augmentation
from convmask.inference.augmentation import unflipped

FPN, FCN = "MODEL.PANOPTIC_FPN", "MODEL.PANOPTIC_FCN"
LOW = {
    "panoptic_fpn": [f"{FPN}.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.1", f"{FPN}.COMBINE.STUFF_AREA_LIMIT", "16"],
    "panoptic_fcn": [
        *(f"{FCN}.INFERENCE.THING_THRESH", "0.0", f"{FCN}.INFERENCE.STUFF_THRESH", "0.0"),
        *(f"{FCN}.INFERENCE.MASK_SCORE_THRESH", "0.0", f"{FCN}.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.0"),
    ],
    "fcis": ["MODEL.FCIS.AUGMENTATION", "merge"],
    "embed_mask": ["MODEL.EMBED_MASK.INFERENCE.SCORE_THRESH", "0.0"],
    "knet_panoptic": [
        "MODEL.KNET.COMBINE.INSTANCES_CONFIDENCE_THRESH",
        "0.0",
        "MODEL.KNET.COMBINE.OVERLAP_THRESH",
        "0.",
    ],
    "knet_semantic": [],
}


@pytest.fixture(params=LOW, scope="module")
def quick(request: pytest.FixtureRequest) -> tuple[CfgNode, nn.Module]:
    """The config of a quick model, and the model."""
    cfg = load_config(
        f"quick/{request.param}_synthetic.yaml",
        ["MODEL.DEVICE", "cpu", "MODEL.NARROW_RESNET.WIDTH", "8", "DATASETS.TEST", "()", *LOW[request.param]],
    )
    prepare(cfg)
    torch.manual_seed(0)
    return cfg, build_model(cfg).eval()


@pytest.fixture(scope="module")
def image() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 32, 48), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "height": 30, "width": 45}


def augmented(quick: tuple[CfgNode, nn.Module], *sizes: int, flip: bool = False) -> nn.Module:
    cfg = quick[0].clone()
    cfg.merge_from_list(["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.FLIP", flip])
    model = with_test_time_augmentation(cfg, quick[1])
    assert isinstance(model, TestTimeAugmentation) and not model.training
    return model


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return model([inputs])[0]


def in_order(instances: Instances) -> Instances:
    """Without those that have neither a pixel nor a box."""
    seen = instances.pred_masks.flatten(1).any(dim=1) | instances.pred_boxes.nonempty()
    instances = instances[seen]
    return instances[instances.scores.sort(descending=True, stable=True).indices]


def as_semantic(panoptic_seg: Any) -> set[tuple[Any, ...]]:
    """The segments as sets of pixels, whatever their ids are."""
    id_map, segments = panoptic_seg
    return {
        (s["isthing"], s["category_id"], (id_map == s["id"]).numpy().tobytes())
        for s in segments
        if (id_map == s["id"]).any()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    if "instances" in expected:
        ours, theirs = in_order(found["instances"]), in_order(expected["instances"])
        assert len(theirs)
        assert ours.image_size == theirs.image_size
        torch.testing.assert_close(ours.scores, theirs.scores)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        assert torch.equal(ours.pred_masks, theirs.pred_masks)
    if "sem_seg" in expected:
        assert torch.equal(found["sem_seg"].argmax(dim=0), expected["sem_seg"].argmax(dim=0))
    if "panoptic_seg" in expected:
        assert as_semantic(found["panoptic_seg"]) == as_semantic(expected["panoptic_seg"])
        assert found["panoptic_seg"][0].dtype == torch.int32


def test_one_view_of_the_normal_size_gives_the_results_of_the_model(quick: Any, image: dict[str, Any]) -> None:
    plain = results(quick[1], image)
    found = results(augmented(quick, 32), image)
    assert_same(found, plain)
    if "sem_seg" in plain:
        assert torch.equal(found["sem_seg"], plain["sem_seg"])
    # Two views of the same size have to be merged.
    assert_same(results(augmented(quick, 32, 0), image), plain)


@pytest.mark.slow
def test_a_mirrored_image_has_mirrored_results(quick: Any, image: dict[str, Any]) -> None:
    model = augmented(quick, 0, flip=True)
    found, mirrored = results(model, image), results(model, {**image, "image": image["image"].flip(2)})
    if "instances" in found:
        instances = mirrored["instances"]
        boxes = instances.pred_boxes.tensor
        instances.pred_boxes = Boxes(torch.stack([45 - boxes[:, 2], boxes[:, 1], 45 - boxes[:, 0], boxes[:, 3]], 1))
        instances.pred_masks = instances.pred_masks.flip(2)
    if "sem_seg" in found:
        mirrored["sem_seg"] = mirrored["sem_seg"].flip(2)
        torch.testing.assert_close(mirrored["sem_seg"], found["sem_seg"])
        assert found["sem_seg"].min() >= 0 and found["sem_seg"].max() <= 1
    if "panoptic_seg" in found:
        mirrored["panoptic_seg"] = (mirrored["panoptic_seg"][0].flip(1), mirrored["panoptic_seg"][1])
    assert_same(mirrored, found)


class Threshold(nn.Module):
    """Bright pixels are one object and one stuff class: a mirrored image has exactly the mirrored results."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        bright = batched_inputs[0]["image"][0] > 128
        instances = Instances(tuple(bright.shape), scores=torch.tensor([0.75]), pred_classes=torch.tensor([1]))
        instances.pred_masks = bright[None]
        instances.pred_boxes = BitMasks(bright[None]).get_bounding_boxes()
        segments = [{"id": 1, "isthing": True, "category_id": 1, "score": 0.75}]
        labels = torch.stack([~bright, bright]).float()
        return [{"instances": instances, "sem_seg": labels, "panoptic_seg": (bright.int(), segments)}]


def test_mirrored_views_are_turned_back() -> None:
    pixels = torch.zeros(3, 8, 12, dtype=torch.uint8)
    pixels[:, 1:6, 1:4] = 200
    pixels[:, 2:3, 4:9] = 200
    inputs = {"image": pixels}
    model = Threshold().eval()
    assert_same(results(TestTimeAugmentation(model, options=ViewOptions((0,), 100)), inputs), results(model, inputs))
    mirrored = list(views_of(inputs, ViewOptions((0,), 9)))[1]
    only_mirrored = [unflipped(results(model, mirrored.inputs))]
    assert_same(only_mirrored[0], results(model, inputs))


def test_a_model_with_a_rule_of_its_own_merges_panoptic_maps() -> None:
    model = Threshold().eval()
    model.sem_seg_values = "probabilities"
    given: list[Any] = []
    model.merge_panoptic = lambda *parts: given.append(parts) or "merged"
    inputs = {"image": torch.full((3, 4, 4), 200, dtype=torch.uint8)}
    found = results(TestTimeAugmentation(model, options=ViewOptions((0,), 100)), inputs)
    assert found["panoptic_seg"] == "merged"
    assert given[0][0] is found["instances"] and torch.equal(given[0][1], results(model, inputs)["sem_seg"])


def test_in_training_it_is_the_model() -> None:
    class Loss(nn.Module):
        def forward(self, inputs: Any) -> dict[str, int]:
            return {"loss": 1}

    assert TestTimeAugmentation(Loss(), options=ViewOptions((0,), 100)).train()([{}]) == {"loss": 1}


@pytest.mark.parametrize("channels_are_uint8", [True, False])
def test_views_are_resized_as_the_mapper_does(channels_are_uint8: bool) -> None:
    pixels = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    pixels = pixels if channels_are_uint8 else pixels.float()
    state = np.random.get_state()[1].tolist()
    views = list(views_of({"image": pixels, "file_name": "a"}, ViewOptions((20, 0, 80), 90)))
    assert np.random.get_state()[1].tolist() == state
    sizes = [tuple(view.inputs["image"].shape[1:]) for view in views]
    assert sizes == [(20, 30), (20, 30), (40, 60), (40, 60), (60, 90), (60, 90)]
    assert [view.flipped for view in views] == [False, True] * 3
    image = pixels.permute(1, 2, 0).numpy()
    expected = ResizeShortestEdge(20, 90).get_transform(image).apply_image(image).transpose(2, 0, 1)
    assert torch.equal(views[0].inputs["image"], torch.from_numpy(np.ascontiguousarray(expected)))
    assert torch.equal(views[1].inputs["image"], views[0].inputs["image"].flip(2))
    assert torch.equal(views[2].inputs["image"], pixels)
    others = {tuple(view.inputs[key] for key in ("height", "width", "file_name")) for view in views}
    assert others == {(40, 60, "a")}


def test_the_trainer_evaluates_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(DefaultTrainer, "test", classmethod(lambda cls, cfg, model, evaluators: seen.append(model)))
    cfg, model = get_cfg(), nn.Identity()
    Trainer.test(cfg, model)
    cfg.TEST.AUG.ENABLED = True
    Trainer.test(cfg, model)
    model.augments_itself = True
    Trainer.test(cfg, model)
    assert [type(x) for x in seen] == [nn.Identity, TestTimeAugmentation, nn.Identity]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_sizes": ()}, r"TEST\.AUG\.MIN_SIZES is empty"),
        ({"min_sizes": (-1,)}, r"MIN_SIZES has -1"),
        ({"max_size": 0}, r"TEST\.AUG\.MAX_SIZE is 0"),
    ],
)
def test_impossible_views_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewOptions(**{"min_sizes": (0,), "max_size": 10, **values})


def test_an_impossible_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MERGE_THRESH is 1\.5"):
        TestTimeAugmentation(nn.Identity(), options=ViewOptions((0,), 10), merge_threshold=1.5)


def test_the_predictor_gives_views_the_pixels_of_the_mapper() -> None:
    seen: list[torch.Tensor] = []

    class Keeps(nn.Module):
        def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            seen.append(inputs[0]["image"])
            return [{}]

    predictor = Predictor.__new__(Predictor)
    predictor.aug = ResizeShortestEdge([20, 20], 90)
    predictor.input_format = "RGB"
    predictor.model = Keeps()
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    predictor(image)
    rgb = image[:, :, ::-1]
    expected = predictor.aug.get_transform(rgb).apply_image(rgb).transpose(2, 0, 1)
    assert seen[0].dtype == torch.uint8
    assert torch.equal(seen[0], torch.from_numpy(np.ascontiguousarray(expected)))


def test_results_that_no_rule_merges_are_refused() -> None:
    class Proposes(nn.Module):
        def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{"proposals": None}]

    model = TestTimeAugmentation(Proposes().eval(), options=ViewOptions((0,), 100)).eval()
    with pytest.raises(ValueError, match="proposals of several views"):
        model([{"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}])
