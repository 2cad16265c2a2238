"""The class counts of a model, taken from the dataset."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from convmask.data.categories import Category, PanopticCategories, SemanticCategories, palette_color
from convmask.data.errors import DatasetError

# "stuff+1": labels of the semantic layout "separated", which begins with "things". "all": those of the other layout.
Count = Literal["things", "stuff", "stuff+1", "all"]
CountFunction = Callable[[CfgNode, PanopticCategories], dict[str, int]]

_COUNTS: dict[str, Callable[[PanopticCategories], int]] = {
    "things": lambda categories: categories.num_things,
    "stuff": lambda categories: categories.num_stuff,
    "stuff+1": lambda categories: categories.num_semantic("separated"),
    "all": lambda categories: categories.num_semantic("all"),
}
_registry: dict[str, CountFunction] = {}
_logger = logging.getLogger(__name__)


def register_class_counts(meta_architecture: str, keys: Mapping[str, Count] | CountFunction) -> None:
    """Says which config keys of a meta-architecture are class counts.

    Args:
        meta_architecture: as in ``MODEL.META_ARCHITECTURE``.
        keys: dotted key to what it counts; or a function of the config and the categories of the dataset that returns
            dotted key to number, for keys that depend on other keys.

    Raises:
        ValueError: a count is none of ``Count``.
    """
    if callable(keys):
        _registry[meta_architecture] = keys
        return
    unknown = set(keys.values()) - _COUNTS.keys()
    if unknown:
        raise ValueError(f"class counts of {meta_architecture}: {sorted(unknown)} is not one of {sorted(_COUNTS)}")
    fixed = dict(keys)
    _registry[meta_architecture] = lambda cfg, categories: {
        key: _COUNTS[count](categories) for key, count in fixed.items()
    }


def set_class_counts(cfg: CfgNode) -> None:
    """Sets every class count of ``MODEL.META_ARCHITECTURE`` from the dataset, in place, and logs what it set.

    The dataset is the first of ``DATASETS.TRAIN``, or of ``DATASETS.TEST`` where that is empty; all training sets must
    have the same classes. Does nothing where ``MODEL.NUM_CLASSES_FROM_DATASET`` is off, or no dataset is named.

    Raises:
        DatasetError: a dataset is unknown or unreadable, the training sets differ, or the config holds a count that is
            neither its default nor the dataset's.
    """
    names = tuple(cfg.DATASETS.TRAIN) or tuple(cfg.DATASETS.TEST)[:1]
    if not cfg.MODEL.NUM_CLASSES_FROM_DATASET or not names:
        return
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture not in _registry:
        _logger.warning("Class counts are left as they are: none are registered for %s", architecture)
        return
    categories = categories_of(names[0])
    for other in names[1:]:
        _check_same_classes(names[0], categories, other, categories_of(other))
    counts = _registry[architecture](cfg, categories)
    defaults = _default_config()
    for key, count in counts.items():
        _check_count(key, count, _value(cfg, key), _value(defaults, key), names[0])
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list([item for pair in counts.items() for item in pair])
    if frozen:
        cfg.freeze()
    _logger.info("Class counts from dataset %s: %s", names[0], ", ".join(f"{k} = {n}" for k, n in counts.items()))


def categories_of(name: str) -> PanopticCategories:
    """The categories of a registered dataset, ConvMask's, Detectron2's or of one's own.

    Instance-only sets have no stuff; semantic-only sets are :class:`SemanticCategories`.

    Raises:
        DatasetError: the dataset is not registered, cannot be read, or its metadata names no classes.
    """
    if name not in DatasetCatalog.list():
        raise DatasetError(f"dataset {name!r} is not registered")
    metadata = MetadataCatalog.get(name)
    if metadata.get("categories") is None and not (metadata.get("thing_classes") or metadata.get("stuff_classes")):
        try:
            # Detectron2 fills in the class names of a COCO json when it is loaded.
            DatasetCatalog.get(name)
        except (OSError, AssertionError, ValueError, KeyError) as error:
            raise DatasetError(f"dataset {name!r} cannot be read for its classes: {error}") from error
    categories = metadata.get("categories")
    return categories if isinstance(categories, PanopticCategories) else _from_class_names(name, metadata)


def _from_class_names(name: str, metadata: Metadata) -> PanopticCategories:
    """Categories of a set whose metadata hold what Detectron2 defines only."""
    things, stuff = metadata.get("thing_classes") or [], metadata.get("stuff_classes") or []
    thing_ids = metadata.get("thing_dataset_id_to_contiguous_id")
    stuff_ids = metadata.get("stuff_dataset_id_to_contiguous_id")
    if things and stuff and thing_ids is not None and stuff_ids is not None:
        return _from_id_maps(things, stuff, thing_ids, stuff_ids)
    if stuff and (not things or "sem_seg" in metadata.get("evaluator_type", "")):
        return SemanticCategories.from_names(stuff, metadata.get("stuff_colors"))
    if things:
        made = tuple(Category(i, thing, True, palette_color(i)) for i, thing in enumerate(things))
        return PanopticCategories(made, (), tuple(range(len(made))))
    raise DatasetError(f"dataset {name!r} has neither thing_classes nor stuff_classes in its metadata")


def _from_id_maps(
    things: list[str], stuff: list[str], thing_ids: Mapping[int, int], stuff_ids: Mapping[int, int]
) -> PanopticCategories:
    # In Detectron2's "separated" sets category id 0 stands for "things"; in its "standard" ones both lists hold all.
    standard = len(things) > len(thing_ids)
    skipped = {} if standard else {0: 0}
    entries = [{"id": i, "name": things[index], "isthing": 1} for i, index in thing_ids.items()]
    entries += [
        {"id": i, "name": stuff[index], "isthing": 0} for i, index in stuff_ids.items() if skipped.get(i) != index
    ]
    return PanopticCategories.from_coco(entries, "category_id" if standard else "things_first")


def _check_same_classes(name: str, classes: PanopticCategories, other: str, others: PanopticCategories) -> None:
    for kind in ("things", "stuff"):
        first = [category.name for category in getattr(classes, kind)]
        second = [category.name for category in getattr(others, kind)]
        if first != second:
            differing = next((pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]), None)
            detail = f", the first difference being {differing}" if differing else ""
            raise DatasetError(
                f"DATASETS.TRAIN: {name!r} and {other!r} have different classes: "
                f"{len(first)} and {len(second)} {kind}{detail}"
            )


def _check_count(key: str, count: int, value: Any, default: Any, name: str) -> None:
    if count < 1:
        raise DatasetError(f"{key} counts classes that dataset {name!r} does not have: its number would be {count}")
    if value not in (count, default):
        raise DatasetError(
            f"{key} is {value} in the config, but dataset {name!r} has {count}. Leave the key out, or set "
            "MODEL.NUM_CLASSES_FROM_DATASET to False"
        )


def _value(cfg: CfgNode, key: str) -> Any:
    try:
        return functools.reduce(lambda node, part: node[part], key.split("."), cfg)
    except KeyError as error:
        raise DatasetError(f"class counts of {cfg.MODEL.META_ARCHITECTURE}: there is no config key {key}") from error


@functools.cache
def _default_config() -> CfgNode:
    # The methods' config functions import this module.
    from convmask.config import get_cfg

    return get_cfg()


def _semantic_count(cfg: CfgNode, categories: PanopticCategories) -> dict[str, int]:
    layout = cfg.INPUT.get("SEMANTIC_LAYOUT", "separated")
    return {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": categories.num_semantic(layout)}


register_class_counts("GeneralizedRCNN", {"MODEL.ROI_HEADS.NUM_CLASSES": "things"})
register_class_counts("RetinaNet", {"MODEL.RETINANET.NUM_CLASSES": "things"})
register_class_counts("SemanticSegmentor", _semantic_count)
register_class_counts(
    "PanopticFPN", {"MODEL.ROI_HEADS.NUM_CLASSES": "things", "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "stuff+1"}
)
