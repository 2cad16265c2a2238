from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data.annotation_masks import transform_mask
from convmask.data.categories import PanopticCategories
from convmask.data.errors import DatasetError
from convmask.data.images import read_image, read_panoptic_map
from convmask.data.mapper import PanopticDatasetMapper

HARD = "synthetic_panoptic_hard_val"
SIZES = st.sampled_from([(0,), (64,), (200,)])


def configure(**changes: Any) -> PanopticDatasetMapper:
    """``INPUT`` keys, with "__" for "."."""
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (HARD,)
    for key, value in {"MIN_SIZE_TRAIN": (0,), **changes}.items():
        cfg.merge_from_list([f"INPUT.{key.replace('__', '.')}", value])
    return PanopticDatasetMapper(cfg, changes.get("is_train", True))


def expected_labels(record: dict[str, Any], layout: str) -> np.ndarray:
    """The semantic map before augmentation, segment by segment."""
    categories: PanopticCategories = MetadataCatalog.get(HARD).categories
    ids = read_panoptic_map(record["pan_seg_file_name"])
    labels = np.full(ids.shape, 255, dtype=np.uint8)
    for segment in record["segments_info"]:
        if layout == "separated":
            label = 0 if segment["isthing"] else segment["category_id"]
        elif segment["iscrowd"]:
            label = 255
        else:
            label = segment["category_id"] + (0 if segment["isthing"] else categories.num_things - 1)
        labels[ids == segment["id"]] = label
    return labels


class Recorder(T.AugmentationList):
    """Remembers what it applied."""

    def __call__(self, aug_input: Any) -> T.TransformList:
        self.applied = super().__call__(aug_input)
        return self.applied


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    index=st.integers(0, 47),
    layout=st.sampled_from(["separated", "all"]),
    size=SIZES,
    crop=st.booleans(),
    jitter=st.booleans(),
    turn=st.booleans(),
    flip=st.sampled_from(["horizontal", "vertical", "none"]),
    require=st.booleans(),
    share=st.sampled_from([0.7, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_all_targets_move_alike(
    index: int,
    layout: str,
    size: tuple[int],
    crop: bool,
    jitter: bool,
    turn: bool,
    flip: str,
    require: bool,
    share: float,
    seed: int,
) -> None:
    mapper = configure(
        MIN_SIZE_TRAIN=size,
        SEMANTIC_LAYOUT=layout,
        CROP__ENABLED=crop,
        CROP__SIZE=(0.6, 0.5),
        CROP__REQUIRE_INSTANCE=require,
        CROP__SINGLE_CATEGORY_MAX_AREA=share,
        SCALE_JITTER__ENABLED=jitter,
        SCALE_JITTER__TARGET_SIZE=(96, 128),
        SCALE_JITTER__CROP_SIZE=(80, 112),
        ROTATE_90=turn,
        RANDOM_FLIP=flip,
        COLOR_AUG_SSD=False,
    )
    mapper.augmentations = Recorder(mapper.augmentations.augs)
    record = DatasetCatalog.get(HARD)[index]
    np.random.seed(seed)
    output = mapper(record)

    applied = mapper.augmentations.applied
    image = applied.apply_image(read_image(record["file_name"], "BGR"))
    np.testing.assert_array_equal(output["image"].numpy(), image.transpose(2, 0, 1))
    # Padding of an 8-bit map differs between versions of Detectron2, so what is padded is found by a map of its own.
    inside = applied.apply_segmentation(np.ones((record["height"], record["width"]), dtype=np.uint8)) == 1
    labels = applied.apply_segmentation(expected_labels(record, layout))
    np.testing.assert_array_equal(output["sem_seg"].numpy(), np.where(inside, labels, 255))

    ids = read_panoptic_map(record["pan_seg_file_name"])
    instances = output["instances"]
    masks = []
    for segment in record["segments_info"]:
        mask = applied.apply_segmentation((ids == segment["id"]).astype(np.uint8)) == 1
        if segment["isthing"] and not segment["iscrowd"] and mask.any():
            masks.append((segment["category_id"], mask))
    assert instances.gt_classes.tolist() == [category for category, _ in masks]
    for found, (_, mask) in zip(instances.gt_masks.tensor.numpy(), masks, strict=True):
        np.testing.assert_array_equal(found, mask)
    check_consistency(output, layout)


def check_consistency(output: dict[str, Any], layout: str) -> None:
    instances, labels = output["instances"], output["sem_seg"]
    assert isinstance(instances.gt_masks, BitMasks)
    assert instances.image_size == tuple(output["image"].shape[1:]) == tuple(labels.shape)
    assert (output["image"].dtype, labels.dtype) == (torch.uint8, torch.int64)
    tight = instances.gt_masks.get_bounding_boxes().tensor
    assert torch.equal(instances.gt_boxes.tensor, tight)
    assert (instances.gt_masks.tensor.sum(dim=0) <= 1).all()
    for mask, category in zip(instances.gt_masks.tensor, instances.gt_classes.tolist(), strict=True):
        assert labels[mask].unique().tolist() == [0 if layout == "separated" else category]
    if layout == "all":
        things = labels < 5
        assert torch.equal(things, instances.gt_masks.tensor.any(dim=0))


def test_an_image_without_instances_has_empty_ones() -> None:
    record = DatasetCatalog.get(HARD)[0]
    assert not record["annotations"]
    output = configure()(record)
    instances = output["instances"]
    assert len(instances) == 0
    assert instances.gt_masks.tensor.shape == (0, record["height"], record["width"])
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    assert (output["sem_seg"] > 0).all()


def test_only_the_targets_asked_for() -> None:
    record = DatasetCatalog.get(HARD)[1]
    assert "sem_seg" not in configure(TARGETS=("instances",))(record)
    assert "instances" not in configure(TARGETS=("sem_seg",))(record)
    assert {"image", "height", "width", "file_name", "image_id"} <= set(configure(TARGETS=())(record))
    assert "annotations" not in configure()(record)


def test_the_record_stays_as_it_is() -> None:
    record = DatasetCatalog.get(HARD)[1]
    before = copy.deepcopy(record)
    configure()(record)
    assert record == before


def test_inference_resizes_the_image_only() -> None:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 50
    output = PanopticDatasetMapper(cfg, False)(DatasetCatalog.get(HARD)[3])
    assert min(output["image"].shape[1:]) == 50
    assert (output["height"], output["width"]) == (128, 96) or min(output["height"], output["width"]) > 50
    assert not {"instances", "sem_seg", "annotations"} & set(output)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"INPUT\.TARGETS has \['boxes'\]"):
        configure(TARGETS=("boxes",))
    with pytest.raises(ValueError, match="'mixed'"):
        configure(SEMANTIC_LAYOUT="mixed")
    with pytest.raises(ValueError, match="categories"):
        PanopticDatasetMapper(True, augmentations=[], image_format="BGR", semantic_layout="all")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A picture of 20x30 pixels, a semantic file, and annotations of every form."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    labels = rng.integers(0, 4, (20, 30), dtype=np.uint8)
    labels[:5] = 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    mask = np.zeros((20, 30), dtype=np.uint8, order="F")
    mask[12, 17] = 1
    rle = mask_util.encode(mask)
    crowd = mask_util.encode(np.ones((20, 30), dtype=np.uint8, order="F"))
    annotations = [
        {"segmentation": [[3.0, 4.0, 12.0, 4.0, 12.0, 15.0, 3.0, 15.0]], "category_id": 7},
        {"segmentation": {**rle, "counts": rle["counts"].decode()}, "category_id": 2},
        {"segmentation": crowd, "category_id": 2, "iscrowd": 1},
    ]
    for annotation in annotations:
        annotation.update(bbox=[0, 0, 30, 20], bbox_mode=BoxMode.XYWH_ABS)
    return {
        "image": {"file_name": str(tmp_path / "image.png"), "image_id": 1, "height": 20, "width": 30},
        "labels": labels,
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "annotations": annotations,
    }


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_instance_only(files: dict[str, Any], mask_format: str) -> None:
    mapper = configure(MASK_FORMAT=mask_format, RANDOM_FLIP="none")
    output = mapper({**files["image"], "annotations": files["annotations"]})
    assert "sem_seg" not in output
    instances = output["instances"]
    assert instances.gt_classes.tolist() == [7, 2]
    assert instances.gt_boxes.tensor.tolist() == [[3, 4, 12, 15], [17, 12, 18, 13]]
    assert instances.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [99, 1]
    assert len(mapper({**files["image"], "annotations": []})["instances"]) == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), size=SIZES, require=st.booleans())
def test_instances_move_with_the_image(files: dict[str, Any], seed: int, size: tuple[int], require: bool) -> None:
    mapper = configure(
        MIN_SIZE_TRAIN=size, CROP__ENABLED=True, CROP__SIZE=(0.5, 0.5), CROP__REQUIRE_INSTANCE=require, ROTATE_90=True
    )
    mapper.augmentations = Recorder(mapper.augmentations.augs)
    np.random.seed(seed)
    output = mapper({**files["image"], "annotations": files["annotations"]})
    target = tuple(output["image"].shape[1:])
    masks = [
        transform_mask(annotation["segmentation"], mapper.augmentations.applied, (20, 30), target)
        for annotation in files["annotations"][:2]
    ]
    masks = [mask for mask in masks if mask.any()]
    np.testing.assert_array_equal(output["instances"].gt_masks.tensor.numpy(), np.array(masks).reshape(-1, *target))
    # Where the image is made smaller, the one pixel may vanish.
    assert masks or not require or size == (64,)


def test_boxes_alone(files: dict[str, Any]) -> None:
    boxes = [[3.5, 4, 9, 11], [28, 12, 4, 3], [5, 5, 0, 4]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": k, "iscrowd": 0} for k, box in enumerate(boxes)
    ]
    annotations.append({**annotations[0], "iscrowd": 1})
    np.random.seed(0)
    found = set()
    for _ in range(8):
        instances = configure(MIN_SIZE_TRAIN=(40,))({**files["image"], "annotations": annotations})["instances"]
        assert not instances.has("gt_masks")
        assert instances.gt_classes.tolist() == [0, 1]
        found.add(tuple(map(tuple, instances.gt_boxes.tensor.tolist())))
    assert found == {((7, 8, 25, 30), (56, 24, 60, 30)), ((35, 8, 53, 30), (0, 24, 4, 30))}
    cropped = configure(CROP__ENABLED=True, CROP__SIZE=(0.2, 0.2), CROP__REQUIRE_INSTANCE=True)
    assert all(len(cropped({**files["image"], "annotations": annotations})["instances"]) for _ in range(8))


def test_semantic_only(files: dict[str, Any]) -> None:
    record = {**files["image"], "sem_seg_file_name": files["sem_seg_file_name"]}
    output = configure(RANDOM_FLIP="none")(record)
    assert "instances" not in output
    np.testing.assert_array_equal(output["sem_seg"].numpy(), files["labels"])
    mapper = configure(SCALE_JITTER__ENABLED=True, SCALE_JITTER__MIN_SCALE=0.5, SCALE_JITTER__CROP_SIZE=(2000, 2100))
    padded = mapper(record)["sem_seg"]
    assert padded.shape == (2000, 2100)
    assert padded.unique().tolist() == [0, 1, 2, 3, 255]


def test_another_ignore_label_becomes_255(files: dict[str, Any]) -> None:
    mapper = PanopticDatasetMapper(True, augmentations=[], image_format="RGB", ignore_label=3)
    output = mapper({**files["image"], "sem_seg_file_name": files["sem_seg_file_name"]})
    np.testing.assert_array_equal(output["sem_seg"].numpy(), np.where(files["labels"] == 3, 255, files["labels"]))


def test_instances_and_a_semantic_file(files: dict[str, Any]) -> None:
    """As Detectron2's "separated" panoptic sets have them, with a panoptic file that is for the evaluation."""
    record = {
        **files["image"],
        "annotations": files["annotations"],
        "sem_seg_file_name": files["sem_seg_file_name"],
        "pan_seg_file_name": "absent.png",
        "segments_info": [],
    }
    output = configure(RANDOM_FLIP="none")(record)
    np.testing.assert_array_equal(output["sem_seg"].numpy(), files["labels"])
    assert output["instances"].gt_classes.tolist() == [7, 2]


def test_an_image_without_annotations(files: dict[str, Any]) -> None:
    assert not {"instances", "sem_seg"} & set(configure()(files["image"]))


def test_errors_name_the_image(files: dict[str, Any], tmp_path: Path) -> None:
    mapper = configure()
    with pytest.raises(DatasetError, match=r"image\.png.*\(30, 20\)"):
        mapper({**files["image"], "width": 31})
    with pytest.raises(DatasetError, match=r"absent\.png"):
        mapper({**files["image"], "file_name": str(tmp_path / "absent.png")})
    with pytest.raises(DatasetError, match=r"image\.png.*annotations\[1\]\.segmentation"):
        mapper({**files["image"], "annotations": [files["annotations"][0], {"category_id": 0, "bbox": [0, 0, 1, 1]}]})
    for wrong in ({"bbox": [0, 0, 1, 1]}, {"bbox": [0, 0, 1], "bbox_mode": BoxMode.XYWH_ABS}):
        with pytest.raises(DatasetError, match=r"image\.png.*annotations\[0\]: bbox"):
            mapper({**files["image"], "annotations": [{"category_id": 0, **wrong}]})
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(small)
    with pytest.raises(DatasetError, match=r"image\.png.*small\.png' has 4x4 pixels, its image 30x20"):
        mapper({**files["image"], "pan_seg_file_name": str(small), "segments_info": []})
    with pytest.raises(DatasetError, match=r"image\.png.*segment id"):
        segments = [{"id": 0, "category_id": 0, "isthing": True}]
        panoptic = tmp_path / "panoptic.png"
        Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(panoptic)
        mapper({**files["image"], "pan_seg_file_name": str(panoptic), "segments_info": segments})


@pytest.mark.parametrize("name", ["coco_2017_train_panoptic", "cityscapes_fine_panoptic_train"])
def test_standard_panoptic_sets_of_detectron2_are_refused(name: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (HARD, name)
    with pytest.raises(DatasetError, match=f"dataset '{name}' numbers things and stuff together"):
        PanopticDatasetMapper(cfg, True)
    PanopticDatasetMapper(cfg, False)
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_separated",)
    PanopticDatasetMapper(cfg, True)


def test_real_panoptic_data(dataset_root: Any) -> None:
    root = dataset_root("nuclei")
    from convmask.data.panoptic import load_panoptic

    categories = PanopticCategories.from_coco(
        [{"id": 1, "name": "nucleus", "isthing": 1}]
        + [{"id": k, "name": f"background {k}", "isthing": 0} for k in (2, 3, 4)]
    )
    records = load_panoptic(
        str(root / "images"), str(root / "panoptic_val.json"), str(root / "panoptic"), lambda _: categories
    )
    mapper = configure(CROP__ENABLED=True, CROP__TYPE="absolute", CROP__SIZE=(200, 200), ROTATE_90=True)
    for record in records[:6]:
        check_consistency(mapper(record), "separated")
