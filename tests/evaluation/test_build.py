from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2 import evaluation as detectron2_evaluation
from detectron2.data import DatasetCatalog, MetadataCatalog

from convmask.config import get_cfg
from convmask.evaluation import COCOEvaluator, PanopticEvaluator, SemSegEvaluator, build_evaluator
from convmask.evaluation import ground_truth as ground_truth_module

from .model_outputs import inputs_of, instances_output, panoptic_output


def outputs_of(name, images):
    outputs = []
    for id_map, segments in images:
        things = [s for s in segments if s["category_id"] in (3, 7)]
        masks = np.array([id_map == s["id"] for s in things]).reshape(-1, *id_map.shape)
        labels = np.zeros(id_map.shape, dtype=np.int64)
        for segment in segments:
            labels[id_map == segment["id"]] = {11: 1, 20: 2}.get(segment["category_id"], 0)
        outputs.append(
            {
                **panoptic_output(name, id_map, segments),
                **instances_output(masks, [(3, 7).index(s["category_id"]) for s in things], [0.9] * len(things)),
                "sem_seg": torch.nn.functional.one_hot(torch.as_tensor(labels), 3).permute(2, 0, 1),
            }
        )
    return outputs


@pytest.mark.parametrize("cache", [False, True])
def test_three_tasks_from_one_pass_and_one_reading(small_set, tmp_path, monkeypatch, cache):
    name, _, images = small_set
    read: list[str] = []
    original = ground_truth_module.read_panoptic_map
    monkeypatch.setattr(ground_truth_module, "read_panoptic_map", lambda path: (read.append(path), original(path))[1])
    cfg = get_cfg()
    cfg.TEST.DUMP_PANOPTIC = True
    cfg.TEST.CACHE_GROUND_TRUTH = cache
    outputs = outputs_of(name, images)
    for _ in range(2):
        evaluator = build_evaluator(cfg, name, str(tmp_path / "inference"))
        evaluator.reset()
        for given, output in zip(inputs_of(name), outputs, strict=True):
            evaluator.process([given], [output])
        results = evaluator.evaluate()
    assert list(results) == ["panoptic_seg", "bbox", "segm", "sem_seg"]
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert len(read) == len(images) * (1 if cache else 2)
    assert (tmp_path / "inference" / "panoptic_predictions.json").is_file()


@pytest.mark.parametrize(
    ("kept", "tasks"),
    [("instances", ["bbox", "segm"]), ("sem_seg", ["sem_seg"]), ("panoptic_seg", ["panoptic_seg"])],
)
def test_what_the_model_does_not_predict_is_left_out(small_set, kept, tasks):
    name, _, images = small_set
    evaluator = build_evaluator(get_cfg(), name)
    evaluator.reset()
    evaluator.process(inputs_of(name), [{kept: output[kept]} for output in outputs_of(name, images)])
    assert list(evaluator.evaluate()) == tasks


@pytest.mark.parametrize(
    ("evaluator_type", "expected"),
    [
        ("coco_panoptic_seg", [PanopticEvaluator, COCOEvaluator, SemSegEvaluator]),
        ("coco", [COCOEvaluator]),
        ("sem_seg", [SemSegEvaluator]),
        ("cityscapes_instance", [detectron2_evaluation.CityscapesInstanceEvaluator]),
        ("cityscapes_sem_seg", [detectron2_evaluation.CityscapesSemSegEvaluator]),
        (
            "cityscapes_panoptic_seg",
            [
                PanopticEvaluator,
                detectron2_evaluation.CityscapesSemSegEvaluator,
                detectron2_evaluation.CityscapesInstanceEvaluator,
            ],
        ),
    ],
)
def test_types_of_detectron2(small_set, registered, evaluator_type, expected):
    name, _, _ = small_set
    other = registered(f"of_type_{evaluator_type}")
    DatasetCatalog.register(other, lambda: DatasetCatalog.get(name))
    metadata = {k: v for k, v in MetadataCatalog.get(name).as_dict().items() if k != "name"}
    MetadataCatalog.get(other).set(**{**metadata, "evaluator_type": evaluator_type})
    evaluators = build_evaluator(get_cfg(), other)
    assert [type(evaluator) for evaluator in evaluators._evaluators] == expected


def test_config_reaches_the_evaluators(small_set):
    name, _, _ = small_set
    cfg = get_cfg()
    cfg.TEST.AP_MAX_DETECTIONS = 400
    cfg.INPUT.SEMANTIC_LAYOUT = "all"
    _, coco, semantic = build_evaluator(cfg, name)._evaluators
    assert coco._max_dets_per_image == 400
    assert semantic._class_names == ["disc", "ring", "sky", "wall"]


def test_unknown_dataset_and_type(registered):
    with pytest.raises(ValueError, match="'nowhere' is not registered"):
        build_evaluator(get_cfg(), "nowhere")
    name = registered("of_unknown_type")
    DatasetCatalog.register(name, lambda: [])
    with pytest.raises(ValueError, match=r"evaluator_type None, not one of .*convmask_panoptic"):
        build_evaluator(get_cfg(), name)
    MetadataCatalog.get(name).set(evaluator_type="pose")
    with pytest.raises(ValueError, match="evaluator_type 'pose'"):
        build_evaluator(get_cfg(), name)
