"""The list of all configs, with what is published about them and what was trained with this repository."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from convmask.engine import load_config
from convmask.model_zoo.names import config_files, results_of

# How a training came to its results, and no result.
CIRCUMSTANCES = ("iterations", "images", "time")
# Where the methods that can do several tasks say which.
_TASK_KEYS = {"KNet": "MODEL.KNET.TASK", "ConvMaskPanopticFPN": "MODEL.PANOPTIC_FPN.TASK"}
_TASKS = {"FCIS": "instance", "EmbedMask": "instance", "PanopticFCN": "panoptic"}


@dataclass(frozen=True)
class Model:
    """A config and what is known about it.

    Attributes:
        name: below ``configs``.
        method: ``MODEL.META_ARCHITECTURE``, without the prefix that ours have where Detectron2 has one of that name.
        task: "panoptic", "instance" or "semantic".
        dataset: the first of ``DATASETS.TEST``.
        weights: where trained weights are, "" if no place is known.
        published: results by others: "source", "data", and metrics in percent.
        trained: a training with this repository: "iterations", "images" (a batch), "time", and metrics in percent.
    """

    name: str
    method: str
    task: str
    dataset: str
    weights: str = ""
    published: Sequence[Mapping[str, Any]] = field(default=())
    trained: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short_name(self) -> str:
        """The name without folder and ending, which no other config has."""
        return self.name.rpartition("/")[2].removesuffix(".yaml")


def task_of(cfg: CfgNode) -> str:
    """Which task the model of a config is for: "panoptic", "instance" or "semantic"."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _TASK_KEYS:
        return str(functools.reduce(lambda node, part: node[part], _TASK_KEYS[architecture].split("."), cfg))
    return _TASKS.get(architecture, "panoptic")


@functools.cache
def _all_models() -> tuple[Model, ...]:
    models = []
    for name, path in config_files().items():
        cfg = load_config(str(path))
        method = cfg.MODEL.META_ARCHITECTURE.removeprefix("ConvMask")
        dataset = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
        models.append(Model(name, method, task_of(cfg), dataset, **results_of(name)))
    return tuple(models)


def list_models(method: str | None = None, task: str | None = None) -> list[Model]:
    """All configs, or those of one method ("PanopticFCN") or task ("panoptic", "instance", "semantic").

    Reads every config once, which takes a few seconds.
    """
    return [m for m in _all_models() if method in (None, m.method) and task in (None, m.task)]


def metrics_text(result: Mapping[str, Any]) -> str:
    """``"PQ 39.4, box AP 37.6"``: the numbers of a result."""
    numbers = {key: value for key, value in result.items() if key not in (*CIRCUMSTANCES, "source", "data")}
    return ", ".join(f"{key} {value:.1f}" for key, value in numbers.items())


def published_text(model: Model) -> str:
    """Every published result with where it is from."""
    return "; ".join(f"{metrics_text(r)} ({r['source']}, {r['data']})" for r in model.published)


def table(models: Sequence[Model]) -> str:
    """A Markdown table with a row for each model."""
    rows = [[m.short_name, m.method, m.task, m.dataset, published_text(m), metrics_text(m.trained)] for m in models]
    headers = ["name", "method", "task", "data", "published", "trained by us"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
