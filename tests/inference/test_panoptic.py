from __future__ import annotations

import torch
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances

from convmask.inference import panoptic_segmentation


def random_instances(count: int, height: int = 40, width: int = 50) -> Instances:
    instances = Instances((height, width))
    instances.scores = torch.rand(count)
    instances.pred_classes = torch.randint(0, 3, (count,))
    instances.pred_masks = torch.rand(count, height, width) > 0.6
    return instances


def test_equals_detectron2() -> None:
    torch.manual_seed(1)
    for count in (0, 1, 12):
        instances, sem_seg = random_instances(count), torch.randn(4, 40, 50)
        ids, segments = panoptic_segmentation(instances, sem_seg, stuff_area_limit=30, score_threshold=0.2)
        expected, expected_segments = combine_semantic_and_instance_outputs(instances, sem_seg.argmax(0), 0.5, 30, 0.2)
        assert torch.equal(ids, expected)
        assert segments == expected_segments


def test_any_order_of_labels_gives_the_same_segments() -> None:
    torch.manual_seed(2)
    instances, separated = random_instances(5), torch.randn(4, 40, 50)
    # a layout with two thing labels, 1 and 3; stuff classes 1, 2, 3 have the labels 4, 0, 2
    everything = torch.full((5, 40, 50), -100.0)
    everything[[4, 0, 2]] = separated[1:]
    everything[3] = separated[0]
    everything[1, :, 25:] = separated[0, :, 25:]
    expected = panoptic_segmentation(instances, separated, stuff_area_limit=1)
    ids, segments = panoptic_segmentation(instances, everything, stuff_area_limit=1, stuff_labels=(4, 0, 2))
    assert torch.equal(ids, expected[0])
    assert segments == expected[1]
    assert {s["category_id"] for s in segments if not s["isthing"]} == {1, 2, 3}


def test_no_stuff_class_at_all() -> None:
    instances = random_instances(0)
    ids, segments = panoptic_segmentation(instances, torch.randn(3, 40, 50), stuff_area_limit=1, stuff_labels=())
    assert not ids.any()
    assert segments == []
