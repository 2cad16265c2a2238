"""The models of the viewer: found in folders, built when they are first used, a few kept."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from convmask.data.errors import DatasetError
from convmask.data.images import read_image
from convmask.demo.methods import Threshold, inner_pictures_of, thresholds_of
from convmask.demo.model import demo_config
from convmask.engine.errors import ConfigError, user_errors
from convmask.engine.predictor import Predictor
from convmask.visualization.segments import Segment, instance_segments, panoptic_segments, semantic_segments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is.

    Attributes:
        name: that it is shown under.
        config_file: of the model.
        weights: a checkpoint.
    """

    name: str
    config_file: str
    weights: str


def model_files(text: str) -> ModelFiles:
    """Reads what the user names a model by: a folder that a training has left, or ``NAME=CONFIG:WEIGHTS``.

    The folder holds ``config.yaml`` and ``model_final.pth``; ``NAME=FOLDER`` gives it a name. CONFIG may be a name of
    this repository or of Detectron2's model zoo.

    Raises:
        ConfigError: a folder without these files, or no such checkpoint.
    """
    name, found, place = text.partition("=")
    if not found:
        name, place = "", text
    config, found, weights = place.rpartition(":")
    if found and weights and not weights.startswith("//"):
        if not Path(weights).is_file():
            raise ConfigError(f"--model {text}: there is no checkpoint {weights}")
        return ModelFiles(name or Path(config).stem, config, weights)
    folder = Path(place).expanduser()
    for file in ("config.yaml", "model_final.pth"):
        if not (folder / file).is_file():
            raise ConfigError(
                f"--model {text}: there is no {folder / file}; give a folder of a training, or NAME=CONFIG:WEIGHTS"
            )
    return ModelFiles(name or folder.resolve().name, str(folder / "config.yaml"), str(folder / "model_final.pth"))


def find_models(folder: str | Path) -> list[ModelFiles]:
    """The models that trainings have left in the folders of ``folder``, by name."""
    folders = sorted(config.parent for config in Path(folder).glob("*/config.yaml"))
    return [model_files(str(path)) for path in folders if (path / "model_final.pth").is_file()]


@dataclass(frozen=True)
class Result:
    """What a model says about an image.

    Attributes:
        objects: in descending order of score, whatever their score; None where the model has no instances.
        regions: of the panoptic map or, where the model has none, of the semantic map; None where it has neither.
        seconds: from the image to the result, without drawing.
    """

    objects: list[Segment] | None
    regions: list[Segment] | None
    seconds: float


@dataclass
class Session:
    """What one open page holds.

    Attributes:
        image: (H, W, 3) BGR.
        problem: why there is no image.
        results: by model, of this image.
        examples: images of data sets that were asked for.
    """

    image: np.ndarray | None = None
    problem: str = "Drop an image, or take one of the data set."
    results: dict[str, Result] = field(default_factory=dict)
    examples: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before it is built.

    Attributes:
        files: where it is.
        cfg: complete.
        thresholds: that can be moved, with their values by the config.
    """

    files: ModelFiles
    cfg: CfgNode
    thresholds: list[tuple[Threshold, float]] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The name of the architecture."""
        return str(self.cfg.MODEL.META_ARCHITECTURE)


class Models:
    """Builds models when they are used and keeps the ``capacity`` that were used last; safe in threads.

    One of them runs at a time: a second caller waits.
    """

    def __init__(
        self, files: Sequence[ModelFiles], capacity: int = 5, opts: Sequence[str] = (), skip_wrong: bool = False
    ) -> None:
        """Reads the configs; no weights yet. Test-time augmentation is off: it has no inner pictures or thresholds.

        Args:
            files: of the models; two of one name are told apart by a number.
            capacity: models in memory.
            opts: ``KEY VALUE ...``, merged into every config.
            skip_wrong: warn of a wrong config and go on without its model, as long as one is left.

        Raises:
            ConfigError: a wrong config; where those are skipped, none is right.
        """
        self.infos: dict[str, ModelInfo] = {}
        wrong: Exception | None = None
        for one in files:
            try:
                cfg = demo_config(one.config_file, one.weights, None, [*opts, "TEST.AUG.ENABLED", "False"])
            except user_errors() as error:
                if not skip_wrong:
                    raise
                logger.warning("without the model %s (%s): %s", one.name, one.config_file, error)
                wrong = error
                continue
            name, number = one.name, 1
            while name in self.infos:
                number += 1
                name = f"{one.name} ({number})"
            self.infos[name] = ModelInfo(one, cfg, [(x, x.read(cfg)) for x in thresholds_of(cfg)])
        if wrong and not self.infos:
            raise wrong
        self._capacity = max(1, capacity)
        self._built: OrderedDict[str, Predictor] = OrderedDict()
        self._lock = threading.Lock()

    def predict(self, name: str, image: np.ndarray, values: Sequence[float] | None = None) -> Result:
        """Runs a model.

        Args:
            name: of the model.
            image: (H, W, 3) uint8 BGR.
            values: of its thresholds, in their order; by default those of the config.

        Raises:
            ConfigError, CheckpointError, OSError: the model cannot be built, or its weights not be read.
        """
        with self._lock:
            predictor = self._ready(name, values)
            start = time.perf_counter()
            prediction = predictor(image)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return _result(prediction, predictor, time.perf_counter() - start)

    def inner_pictures(
        self, name: str, image: np.ndarray, values: Sequence[float] | None = None, chosen: int = 0
    ) -> dict[str, np.ndarray]:
        """Inner pictures of a model, see :func:`~convmask.demo.methods.inner_pictures_of`; arguments as above.

        Args:
            name: of the model.
            image: see :meth:`predict`.
            values: see :meth:`predict`.
            chosen: number of a detection.
        """
        with self._lock:
            predictor = self._ready(name, values)
            inputs = _inputs(predictor, image)
            return inner_pictures_of(predictor.model, inputs, predictor.metadata, chosen)

    def example(self, name: str, number: int) -> tuple[np.ndarray, str]:
        """An image of the data set that the model is tested on, (H, W, 3) BGR, and what to call it.

        Args:
            name: of the model.
            number: of the image; they are taken round and round.

        Raises:
            DatasetError: the set is not known here, or its files are not there.
        """
        sets = self.infos[name].cfg.DATASETS.TEST
        if not sets:
            raise DatasetError(f"{name}: the data set of this model is not known here, so there is no example of it")
        try:
            dicts = DatasetCatalog.get(sets[0])
        except OSError as error:
            raise DatasetError(f"{name}: its data set {sets[0]} is not here: {error}") from error
        index = number % len(dicts)
        return read_image(dicts[index]["file_name"], "BGR"), f"image {index} of {sets[0]}"

    def _ready(self, name: str, values: Sequence[float] | None) -> Predictor:
        """The model, built if it has to be, with the thresholds set."""
        info = self.infos[name]
        if name not in self._built:
            while len(self._built) >= self._capacity:
                self._built.popitem(last=False)
            self._built[name] = Predictor(info.cfg)
        self._built.move_to_end(name)
        predictor = self._built[name]
        # another user may have set others
        for index, (threshold, default) in enumerate(info.thresholds):
            threshold.write(predictor.model, default if values is None else float(values[index]))
        return predictor


def _inputs(predictor: Predictor, image: np.ndarray) -> dict[str, Any]:
    """What the predictor makes of a BGR image for its model."""
    height, width = image.shape[:2]
    channels = image[:, :, ::-1] if predictor.input_format == "RGB" else image
    resized = predictor.aug.get_transform(channels).apply_image(channels)
    tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
    return {"image": tensor, "height": height, "width": width}


def _result(prediction: Mapping[str, Any], predictor: Predictor, seconds: float) -> Result:
    objects = regions = None
    if "instances" in prediction:
        found = instance_segments(prediction["instances"].to("cpu"), predictor.metadata)
        objects = sorted(found, key=lambda segment: -(segment.score or 0.0))
    if "panoptic_seg" in prediction:
        id_map, infos = prediction["panoptic_seg"]
        regions = panoptic_segments(id_map.cpu().numpy(), infos, predictor.metadata)
    elif "sem_seg" in prediction:
        regions = semantic_segments(prediction["sem_seg"], predictor.metadata)
    return Result(objects, regions, seconds)
