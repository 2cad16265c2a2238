"""The evaluators of a dataset, chosen by the ``evaluator_type`` of its metadata."""

from __future__ import annotations

from collections.abc import Callable

from detectron2 import evaluation as detectron2_evaluation
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from convmask.evaluation.coco import COCOEvaluator
from convmask.evaluation.ground_truth import PanopticGroundTruth
from convmask.evaluation.panoptic import PanopticEvaluator
from convmask.evaluation.semantic import SemSegEvaluator
from convmask.evaluation.voc_instances import VOCInstanceEvaluator

EvaluatorBuilder = Callable[[CfgNode, str, "str | None"], list[DatasetEvaluator]]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluators:
    """Builds what evaluates a dataset in one pass over it.

    ConvMask's panoptic datasets get panoptic quality, AP and semantic IoU; each leaves out what the model does not
    predict. Detectron2's types of datasets get the same evaluators where there are such, else Detectron2's own.

    Args:
        cfg: reads ``TEST.AP_MAX_DETECTIONS``, ``TEST.BOUNDARY_AP``, ``TEST.DUMP_PANOPTIC``, ``TEST.DUMP_SEMANTIC``,
            ``TEST.CACHE_GROUND_TRUTH`` and ``INPUT.SEMANTIC_LAYOUT``.
        dataset_name: a registered dataset.
        output_dir: for predictions in COCO's formats; by default nothing is written.

    Raises:
        ValueError: the dataset is not registered, its ``evaluator_type`` is unknown, or ``TEST.DUMP_PANOPTIC`` is set
            without ``output_dir``.
    """
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(f"dataset {dataset_name!r} is not registered")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in _BUILDERS:
        raise ValueError(
            f"dataset {dataset_name!r} has the evaluator_type {evaluator_type!r}, not one of {sorted(_BUILDERS)}"
        )
    return DatasetEvaluators(_BUILDERS[evaluator_type](cfg, dataset_name, output_dir))


_kept: dict[str, PanopticGroundTruth] = {}


def _ground_truth(cfg: CfgNode, dataset_name: str) -> PanopticGroundTruth:
    """The dataset's annotations; with ``TEST.CACHE_GROUND_TRUTH`` one object for all evaluations of this process."""
    if not cfg.TEST.CACHE_GROUND_TRUTH:
        return PanopticGroundTruth(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    # Another metadata object means that the name was registered anew.
    if dataset_name not in _kept or _kept[dataset_name].metadata is not metadata:
        _kept[dataset_name] = PanopticGroundTruth(dataset_name, cache=True)
    return _kept[dataset_name]


def _coco(
    cfg: CfgNode, dataset_name: str, output_dir: str | None, ground_truth: PanopticGroundTruth | None = None
) -> DatasetEvaluator:
    return COCOEvaluator(
        dataset_name,
        output_dir=output_dir,
        max_dets_per_image=cfg.TEST.AP_MAX_DETECTIONS,
        ground_truth=ground_truth,
        boundary=cfg.TEST.BOUNDARY_AP,
    )


def _semantic(
    cfg: CfgNode, dataset_name: str, output_dir: str | None, ground_truth: PanopticGroundTruth | None = None
) -> DatasetEvaluator:
    return SemSegEvaluator(
        dataset_name,
        output_dir=output_dir if cfg.TEST.DUMP_SEMANTIC else None,
        layout=cfg.INPUT.SEMANTIC_LAYOUT,
        ground_truth=ground_truth,
    )


def _panoptic_of(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> list[DatasetEvaluator]:
    """All three, which share one reading of the annotations."""
    ground_truth = _ground_truth(cfg, dataset_name)
    dump = cfg.TEST.DUMP_PANOPTIC
    return [
        PanopticEvaluator(dataset_name, output_dir, dump=dump, ground_truth=ground_truth),
        _coco(cfg, dataset_name, output_dir, ground_truth),
        _semantic(cfg, dataset_name, output_dir, ground_truth),
    ]


def _cityscapes_panoptic(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> list[DatasetEvaluator]:
    return [
        PanopticEvaluator(dataset_name, output_dir, dump=cfg.TEST.DUMP_PANOPTIC),
        detectron2_evaluation.CityscapesSemSegEvaluator(dataset_name),
        detectron2_evaluation.CityscapesInstanceEvaluator(dataset_name),
    ]


_BUILDERS: dict[str, EvaluatorBuilder] = {
    "convmask_panoptic": _panoptic_of,
    "coco_panoptic_seg": _panoptic_of,
    "coco": lambda cfg, name, output_dir: [_coco(cfg, name, output_dir)],
    "convmask_voc_instances": lambda cfg, name, output_dir: [VOCInstanceEvaluator(name), _coco(cfg, name, output_dir)],
    "sem_seg": lambda cfg, name, output_dir: [_semantic(cfg, name, output_dir)],
    "cityscapes_panoptic_seg": _cityscapes_panoptic,
    "cityscapes_instance": lambda cfg, name, output_dir: [detectron2_evaluation.CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda cfg, name, output_dir: [detectron2_evaluation.CityscapesSemSegEvaluator(name)],
    "pascal_voc": lambda cfg, name, output_dir: [detectron2_evaluation.PascalVOCDetectionEvaluator(name)],
    "lvis": lambda cfg, name, output_dir: [detectron2_evaluation.LVISEvaluator(name, output_dir=output_dir)],
}
