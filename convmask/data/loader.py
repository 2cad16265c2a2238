"""Data loaders, with the mapper that reads what ConvMask's datasets hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from convmask.data.batches import Draw, EpochSampler, MicroBatches, orientation_groups
from convmask.data.errors import DatasetError
from convmask.data.mapper import PanopticDatasetMapper
from convmask.utils.random_state import seeded

Mapper = Callable[[dict[str, Any]], Any]

logger = logging.getLogger(__name__)

# A mapper that gives nothing for so many images in a row will not give anything for the next.
_TRIALS = 100


class SeededDataset(Dataset[Any]):
    """Maps the images of a dataset, with random numbers that follow from the draw alone."""

    def __init__(self, records: Sequence[dict[str, Any]], mapper: Mapper, seed: int) -> None:
        """Takes the parts.

        Args:
            records: dataset dicts, or anything that is indexed in the same way.
            mapper: called with a dataset dict. Where it returns None, another image is taken in its place.
            seed: not negative.
        """
        self._records = records
        self._mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        """The number of images."""
        return len(self._records)

    def __getitem__(self, draw: Draw) -> Any:
        """What the mapper returns for an image.

        Raises:
            DatasetError: the mapper returns None for image after image.
        """
        with seeded(self.seed, *draw):
            sample = self._mapper(self._records[draw.image])
        for trial in count():
            if sample is not None:
                return sample
            if trial == _TRIALS:
                raise DatasetError(f"the mapper returns None for {_TRIALS} images in a row")
            key = (self.seed, *draw, trial + 1)
            index = int(np.random.default_rng(key).integers(len(self)))
            with seeded(*key):
                sample = self._mapper(self._records[index])


class TrainLoader:
    """The endless stream of this process's micro-batches, which can begin at any iteration.

    Batches are a pure function of the seed and the iteration, whatever the number of workers, and the random numbers
    of the training process are neither used nor changed.

    Attributes:
        dataset: of the images.
        passes: micro-batches of one iteration of this process.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        *,
        images: int,
        passes: int = 1,
        groups: Sequence[int] | None = None,
        repeat_factors: Sequence[float] | None = None,
        share: float = 1.0,
        workers: int = 0,
    ) -> None:
        """Takes the parts.

        Args:
            dataset: its seed is that of the order, too.
            images: in a micro-batch.
            passes: micro-batches of one iteration of this process.
            groups: see :class:`~convmask.data.batches.MicroBatches`.
            repeat_factors: see :class:`~convmask.data.batches.EpochSampler`, as is ``share``.
            workers: processes that map images; 0: this process does.
        """
        self.dataset = dataset
        self.passes = passes
        self._images = images
        self._groups = groups
        self._order = {"repeat_factors": repeat_factors, "share": share}
        self._workers = workers
        self._first_iteration = 0

    def start_at(self, iteration: int) -> None:
        """The next iterator begins with the first micro-batch of ``iteration``, counted from 0."""
        self._first_iteration = iteration

    def __iter__(self) -> Iterator[list[Any]]:
        """Lists of what the mapper returns."""
        processes = comm.get_world_size()
        sampler = EpochSampler(len(self.dataset), self.dataset.seed, **self._order)  # type: ignore[arg-type]
        batches = MicroBatches(sampler, self._images, self._groups)
        first = self._first_iteration * self.passes * processes + comm.get_rank()
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=_Batches(batches, first, processes),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            # Without one of its own a loader draws from the global generator.
            generator=torch.Generator(),
        )
        return iter(loader)

    def state_dict(self) -> dict[str, int]:
        """What the batches follow from, beside the iteration."""
        return {
            "seed": self.dataset.seed,
            "dataset_size": len(self.dataset),
            "images": self._images,
            "passes": self.passes,
            "processes": comm.get_world_size(),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes the seed of an earlier run; says so in the log where its batches cannot be had again."""
        self.dataset.seed = int(state["seed"])
        own = self.state_dict()
        changed = [f"{name} {state.get(name)} -> {value}" for name, value in own.items() if state.get(name) != value]
        # Two processes of one pass see what one process of two passes does.
        shared = ("dataset_size", "images")
        same_total = own["passes"] * own["processes"] == state.get("passes", 1) * state.get("processes", 1)
        if changed and not (same_total and all(own[name] == state.get(name) for name in shared)):
            logger.warning("the batches from here on are not those of an uninterrupted run: %s", ", ".join(changed))


class _Batches:
    """The batch sampler of a DataLoader: an iterable of lists of draws."""

    def __init__(self, batches: MicroBatches, first: int, step: int) -> None:
        self._batches, self._first, self._step = batches, first, step

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._batches.start(self._first, self._step)


def _as_it_is(batch: list[Any]) -> list[Any]:
    return batch


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> TrainLoader:
    """An endless stream of shuffled batches of ``DATASETS.TRAIN``.

    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` leaves out images without instances only where ``INPUT.TARGETS`` asks for
    instances. ``DATALOADER.ASPECT_RATIO_GROUPING`` goes by the annotated sizes.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER, INPUT, SEED (negative: a random one), SOLVER.IMS_PER_BATCH (of all processes)
            and SOLVER.ACCUMULATION_STEPS.
        mapper: in the place of ``PanopticDatasetMapper(cfg, True)``.

    Returns:
        An iterable of lists of dicts, as :class:`PanopticDatasetMapper` returns them; each list is what one pass of
        this process takes.

    Raises:
        KeyError, DatasetError: a dataset is not registered, cannot be read, or has no image left.
        ValueError: an unknown DATALOADER.SAMPLER_TRAIN, or images that cannot be shared out evenly.
    """
    mapper = mapper or PanopticDatasetMapper(cfg, True)
    records = _training_records(cfg)
    total, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS * comm.get_world_size()
    if total < 1 or parts < 1 or total % parts:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {total}, no multiple of SOLVER.ACCUMULATION_STEPS times the number of processes, "
            f"{cfg.SOLVER.ACCUMULATION_STEPS} x {comm.get_world_size()}"
        )
    listed = isinstance(records, list)
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING and listed
    return TrainLoader(
        SeededDataset(DatasetFromList(records, copy=False) if listed else records, mapper, _data_seed(cfg)),
        images=total // parts,
        passes=cfg.SOLVER.ACCUMULATION_STEPS,
        groups=orientation_groups(records) if grouped else None,
        workers=cfg.DATALOADER.NUM_WORKERS,
        **_sampling(cfg, records),
    )


def _training_records(cfg: CfgNode) -> Any:
    try:
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and "instances" in cfg.INPUT.TARGETS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:
        if "No valid data" not in str(error):
            raise
        raise DatasetError(
            f"datasets {', '.join(cfg.DATASETS.TRAIN)}: no image has an instance, and "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out those without"
        ) from error


def _data_seed(cfg: CfgNode) -> int:
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def _sampling(cfg: CfgNode, records: Any) -> dict[str, Any]:
    """The order that ``DATALOADER.SAMPLER_TRAIN`` asks for, in :class:`TrainLoader`'s arguments."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return {}
    if name == "RepeatFactorTrainingSampler":
        annotated = [
            {"annotations": record.get("annotations") or record.get("segments_info", ())} for record in records
        ]
        count_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        return {"repeat_factors": count_factors(annotated, cfg.DATALOADER.REPEAT_THRESHOLD).tolist()}
    if name == "RandomSubsetTrainingSampler" and "RANDOM_SUBSET_RATIO" in cfg.DATALOADER:
        return {"share": cfg.DATALOADER.RANDOM_SUBSET_RATIO}
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it has to be TrainingSampler, RepeatFactorTrainingSampler or, with a "
        "Detectron2 that has DATALOADER.RANDOM_SUBSET_RATIO, RandomSubsetTrainingSampler"
    )


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None) -> DataLoader[Any]:
    """All images of a dataset once, in order, one in a batch.

    Args:
        cfg: DATALOADER, INPUT.
        dataset_name: a registered dataset.
        mapper: in the place of ``PanopticDatasetMapper(cfg, False)``.

    Returns:
        A loader of lists of one dict, as :class:`PanopticDatasetMapper` returns them.

    Raises:
        KeyError, DatasetError: the dataset is not registered, or cannot be read.
    """
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper or PanopticDatasetMapper(cfg, False))
