from __future__ import annotations

import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data import class_counts
from convmask.data.class_counts import categories_of, register_class_counts, set_class_counts
from convmask.data.errors import DatasetError
from convmask.data.panoptic import register_panoptic_records
from convmask.data.semantic import register_semantic

CATEGORIES = [{"id": i, "name": f"thing {i}", "isthing": 1} for i in range(1, 6)]
CATEGORIES += [{"id": i, "name": f"stuff {i}", "isthing": 0} for i in range(10, 13)]


@pytest.fixture(autouse=True)
def datasets(monkeypatch):
    monkeypatch.setattr(class_counts, "_registry", dict(class_counts._registry))
    register_panoptic_records("p3_panoptic", CATEGORIES, list)
    register_panoptic_records("p3_other", CATEGORIES[1:], list)
    register_semantic("p3_semantic", "images", "labels", ["a", "b", "c"])


def _config(architecture, *train, **keys):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.DATASETS.TRAIN = train
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def test_panoptic_fpn_of_detectron2(caplog):
    cfg = _config("PanopticFPN", "p3_panoptic")
    cfg.freeze()
    with caplog.at_level(logging.INFO):
        set_class_counts(cfg)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (5, 4)
    assert cfg.is_frozen()
    assert "MODEL.ROI_HEADS.NUM_CLASSES = 5, MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "dataset", "key", "count"),
    [
        ("GeneralizedRCNN", "p3_panoptic", "MODEL.ROI_HEADS.NUM_CLASSES", 5),
        ("RetinaNet", "p3_panoptic", "MODEL.RETINANET.NUM_CLASSES", 5),
        ("SemanticSegmentor", "p3_panoptic", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4),
        ("SemanticSegmentor", "p3_semantic", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3),
        ("SemanticSegmentor", "cityscapes_fine_sem_seg_train", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19),
        ("GeneralizedRCNN", "cityscapes_fine_instance_seg_train", "MODEL.ROI_HEADS.NUM_CLASSES", 8),
        ("GeneralizedRCNN", "voc_2007_train", "MODEL.ROI_HEADS.NUM_CLASSES", 20),
    ],
)
def test_detectron2s_architectures_and_datasets(architecture, dataset, key, count):
    cfg = _config(architecture, dataset)
    set_class_counts(cfg)
    assert class_counts._value(cfg, key) == count


def test_layout_with_all_classes():
    cfg = _config("SemanticSegmentor", "p3_panoptic", **{"INPUT.SEMANTIC_LAYOUT": "all"})
    set_class_counts(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 8


def test_the_first_test_set_counts_where_there_is_no_training_set():
    cfg = _config("GeneralizedRCNN")
    cfg.DATASETS.TEST = ("p3_panoptic",)
    set_class_counts(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5


def test_contradictions_are_refused_unless_switched_off():
    cfg = _config("PanopticFPN", "p3_panoptic", **{"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19})
    with pytest.raises(DatasetError, match=r"MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 19 .* 'p3_panoptic' has 4"):
        set_class_counts(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    cfg.MODEL.NUM_CLASSES_FROM_DATASET = False
    set_class_counts(cfg)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (80, 19)
    cfg = _config("PanopticFPN", "p3_panoptic", **{"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4})
    set_class_counts(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5


def test_training_sets_must_agree():
    with pytest.raises(DatasetError, match="'p3_panoptic' and 'p3_other' have different classes: 5 and 4 things"):
        set_class_counts(_config("PanopticFPN", "p3_panoptic", "p3_other"))
    register_panoptic_records("p3_same", CATEGORIES, list)
    set_class_counts(_config("PanopticFPN", "p3_panoptic", "p3_same"))


def test_counts_that_the_dataset_lacks_are_refused():
    with pytest.raises(DatasetError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES .* 'p3_semantic' does not have"):
        set_class_counts(_config("PanopticFPN", "p3_semantic"))


def test_registered_keys_and_functions():
    register_class_counts("P3Net", {"MODEL.RETINANET.NUM_CLASSES": "all", "MODEL.ROI_HEADS.NUM_CLASSES": "stuff"})
    cfg = _config("P3Net", "p3_panoptic")
    set_class_counts(cfg)
    assert (cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == (8, 3)
    register_class_counts("P3Net", lambda cfg, categories: {"MODEL.ROI_HEADS.NUM_CLASSES": 2 * categories.num_things})
    cfg = _config("P3Net", "p3_panoptic")
    set_class_counts(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    with pytest.raises(ValueError, match=r"\['thing'\]"):
        register_class_counts("P3Net", {"MODEL.RETINANET.NUM_CLASSES": "thing"})  # type: ignore[dict-item]
    register_class_counts("P3Net", {"MODEL.NOBODY.NUM_CLASSES": "things"})
    with pytest.raises(DatasetError, match=r"no config key MODEL\.NOBODY\.NUM_CLASSES"):
        set_class_counts(_config("P3Net", "p3_panoptic"))


def test_unknown_architectures_are_left_alone(caplog):
    cfg = _config("P3Unknown", "p3_panoptic")
    set_class_counts(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert "none are registered for P3Unknown" in caplog.text


def test_unknown_datasets_are_errors():
    with pytest.raises(DatasetError, match="'p3_nobody' is not registered"):
        set_class_counts(_config("PanopticFPN", "p3_nobody"))


def test_classes_that_a_dataset_names_when_loaded():
    def load() -> list:
        MetadataCatalog.get("p3_lazy").thing_classes = ["a", "b"]
        return []

    DatasetCatalog.register("p3_lazy", load)
    assert categories_of("p3_lazy").num_things == 2
    DatasetCatalog.register("p3_nameless", list)
    with pytest.raises(DatasetError, match="neither thing_classes nor stuff_classes"):
        categories_of("p3_nameless")


@pytest.mark.parametrize("name", ["coco_2017_train_panoptic_separated", "coco_2017_train_panoptic"])
def test_both_forms_of_detectron2s_coco_panoptic(name):
    categories = categories_of(name)
    assert (categories.num_things, categories.num_stuff) == (80, 53)
    assert categories.semantic_label(92, "all") == 80
    assert categories.semantic_label(92, "separated") == 1


def test_train_ids_of_detectron2s_cityscapes():
    categories = categories_of("cityscapes_fine_panoptic_train")
    assert categories.semantic_label(7, "all") == 0
    assert categories.semantic_label(33, "all") == 18
    assert categories.thing_labels("all") == tuple(range(11, 19))
