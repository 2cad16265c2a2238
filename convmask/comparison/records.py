"""What is kept of each method between the steps of a comparison: a folder with one json file a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convmask.engine.errors import ConfigError
from convmask.utils.files import write_atomically


@dataclass(frozen=True)
class Settings:
    """What all methods of a comparison have in common.

    Attributes:
        data: "nuclei" or "synthetic", the end of the configs' names.
        budget: seconds of training.
        clock: by which clock, see :data:`convmask.engine.budget.CLOCKS`.
        opts: ``KEY VALUE ...``, merged into every config.
    """

    data: str
    budget: float
    clock: str
    opts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As a record holds it: json has lists, not tuples."""
        return {**asdict(self), "opts": list(self.opts)}


class MethodFolder:
    """The folder of one method.

    Attributes:
        path: the folder; a training writes its checkpoints, metrics and log here too.
    """

    def __init__(self, comparison: str | os.PathLike[str], method: str) -> None:
        """Takes the folder of the comparison and the short name of the method."""
        self.path = Path(comparison) / method

    def read(self, step: str) -> dict[str, Any] | None:
        """The record of a step, None if it has not been done.

        Raises:
            ConfigError: the file is not json.
        """
        path = self.path / f"{step}.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no record of a comparison: {error}") from error

    def write(self, step: str, record: Mapping[str, Any]) -> None:
        """Keeps the record of a step."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / f"{step}.json", json.dumps(dict(record), indent=1).encode())

    def training_of(self, settings: Settings) -> dict[str, Any] | None:
        """The record of the training with these settings, None if there is none yet.

        Raises:
            ConfigError: there is one with other settings.
        """
        record = self.read("training")
        if record is None:
            return None
        if record["settings"] != settings.as_json():
            raise ConfigError(
                f"{self.path} holds a training with other settings ({record['settings']}, not {settings.as_json()}): "
                "name another --output"
            )
        return record
