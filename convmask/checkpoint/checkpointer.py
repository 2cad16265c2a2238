"""Detectron2's checkpointer with safe reading, recognition of originals, policies of fitting, and atomic writing."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, OrderedDict
from typing import IO, Any, Literal, cast

import fvcore.common.checkpoint as fvcore_checkpoint
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from convmask.checkpoint.errors import CheckpointError
from convmask.checkpoint.fit import (
    Fit,
    describe,
    diagnose,
    misfit_of_backbone,
    place_leftovers,
    table_of_fresh_layers,
    without_incidental,
)
from convmask.checkpoint.recognition import Checkpoint, State, read_checkpoint

Policy = Literal["finetune", "strict"]

_PARTIAL = ".partial"
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")

# Pixel means on the 0..255 scale that differ by more than this are of other weights.
_MEAN_TOLERANCE = 1.0


class Checkpointer(DetectionCheckpointer):
    """Loads and saves a model and its training state.

    Differences from Detectron2's: files are read without running code from them, those of original releases are
    recognised and converted, what does not fit is an error or a table (see ``policy``), a model is unchanged after an
    error, and an interrupted save leaves the file before it intact.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        policy: Policy = "finetune",
        average: bool = False,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """Wraps a model.

        Args:
            model: the model; its weights are the entry ``model`` of a file.
            save_dir: folder for checkpoints; "" writes none.
            policy: "strict": every tensor of the file and of the model must fit (evaluation, resuming). "finetune":
                what fits is loaded and a table of what starts afresh is logged; only a backbone that does not match is
                an error.
            average: load the moving average of the weights (``ema_model``) where the file has one. Which weights are
                loaded is then logged.
            save_to_disk: whether this process writes; by default the main process only.
            checkpointables: further objects with ``state_dict`` and ``load_state_dict``, by their entries in the file.

        Raises:
            ValueError: an unknown policy.
        """
        if policy not in ("finetune", "strict"):
            raise ValueError(f"policy must be 'finetune' or 'strict', not {policy!r}")
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.policy: Policy = policy
        self.average = average

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, policy: Policy | None = None
    ) -> dict[str, Any]:
        """Loads a file into the model, and the training state that it holds into the checkpointables.

        Args:
            path: as of :func:`convmask.checkpoint.load_file`. "" loads nothing.
            checkpointables: names of the objects to load; None: all of them that the file holds.
            policy: instead of the policy of this object.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: the file cannot be read or does not fit. The model is then as it was before.
        """
        if not path:
            self.logger.info("No checkpoint is given: the model keeps its initial weights")
            return {}
        self.logger.info("Loading %s ...", path)
        checkpoint = read_checkpoint(path, average=self.average)
        self._load_weights(checkpoint, policy or self.policy)
        self._report_average(checkpoint)
        for name in self.checkpointables if checkpointables is None else checkpointables:
            if name in checkpoint.rest:
                self._load_checkpointable(name, checkpoint)
        return checkpoint.rest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the last checkpoint of ``save_dir`` (which must fit entirely) if asked to and there is one.

        Otherwise loads the weights of ``path``, and no training state, under this object's policy. See :meth:`load`.
        """
        if resume and self.has_checkpoint():
            return self.load(self.get_checkpoint_file(), policy="strict")
        return self.load(path, checkpointables=[])

    def get_checkpoint_file(self) -> str:
        """The file that ``last_checkpoint`` in ``save_dir`` names; "" if there is none.

        Raises:
            CheckpointError: ``last_checkpoint`` does not hold the name of a file.
        """
        tag = os.path.join(self.save_dir, "last_checkpoint")
        try:
            path = super().get_checkpoint_file()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{tag}: does not hold the name of a checkpoint") from error
        if path and not os.path.basename(path):
            raise CheckpointError(f"{tag}: is empty, it should name the last checkpoint")
        return path

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Writes ``name.pth``: the model, every checkpointable and ``kwargs``; then names it in ``last_checkpoint``.

        With ``tag`` False it is not named there: resuming does not begin with it.

        A file of that name is replaced only when the new one is complete. Training state that could not be loaded
        again, because it is more than tensors and plain values, is left out with a warning.

        Raises:
            CheckpointError: the file cannot be written. The one before it is intact.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        states |= kwargs
        data = {"model": self.model.state_dict()}
        data |= {key: value for key, value in states.items() if self._can_be_loaded(key, value)}
        data |= {"__author__": "ConvMask", "meta_architecture": type(self.model).__name__}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        self._write(path, data)
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the last checkpoint in the file ``last_checkpoint``, which is replaced at once."""
        self._write(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def forget_last_checkpoint(self) -> None:
        """Makes a run that begins anew in the folder of an earlier one: a resumed run is then this one."""
        if self.save_dir and self.save_to_disk and self.has_checkpoint():
            self.logger.warning(
                "%s holds an earlier training, which this one does not continue (--resume would): its files stay until "
                "this one writes files of the same names",
                self.save_dir,
            )
            self.path_manager.rm(os.path.join(self.save_dir, "last_checkpoint"))

    def remove_partial_files(self) -> None:
        """Deletes what killed processes have left half-written in ``save_dir``."""
        if not self.save_dir or not os.path.isdir(self.save_dir):
            return
        for name in os.listdir(self.save_dir):
            if name.endswith(_PARTIAL):
                self.logger.info("Deleting %s, which was not completed", os.path.join(self.save_dir, name))
                os.remove(os.path.join(self.save_dir, name))

    def thin(self, keep: int, iteration: int) -> None:
        """Deletes the oldest ``model_<iteration>.pth`` of ``save_dir``.

        Args:
            keep: how many stay, at least 1.
            iteration: the newest; files of later ones are of another run and stay.
        """
        numbers = [match for name in self.path_manager.ls(self.save_dir) if (match := _PERIODIC.fullmatch(name))]
        ours = sorted((int(match[1]), match[0]) for match in numbers if int(match[1]) <= iteration)
        last = os.path.basename(self.get_checkpoint_file())
        for _, name in ours[:-keep]:
            if name != last:
                self.path_manager.rm(os.path.join(self.save_dir, name))

    def _load_file(self, f: str) -> dict[str, Any]:
        # Detectron2's own reader runs code from pickles: whoever calls it gets the safe one.
        checkpoint = read_checkpoint(f)
        return {**checkpoint.rest, "model": checkpoint.state, "matching_heuristics": checkpoint.relative}

    def _load_weights(self, checkpoint: Checkpoint, policy: Policy) -> None:
        before = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        try:
            fit = self._copy_into_model(checkpoint)
            if policy == "strict":
                self._demand_complete(checkpoint, fit)
            else:
                self._demand_backbone(checkpoint, fit)
        except CheckpointError:
            self.model.load_state_dict(before, strict=False)
            raise
        self._report(checkpoint, fit)

    def _copy_into_model(self, checkpoint: Checkpoint) -> Fit:
        """Copies every tensor that fits into the model."""
        state = checkpoint.state
        try:
            if checkpoint.relative:
                state = self._match_names(state)
            given = len(without_incidental(state))
            incompatible = fvcore_checkpoint.Checkpointer._load_model(self, {"model": state})
        except Exception as error:
            raise CheckpointError(f"{checkpoint.path}: {checkpoint.kind}: cannot be loaded: {error}") from error
        # a parameter shared by two modules may be stored under one of its names
        missing = fvcore_checkpoint._filter_reused_missing_keys(self.model, incompatible.missing_keys)
        unexpected = [*without_incidental(incompatible.unexpected_keys), *checkpoint.unused]
        misshaped = list(incompatible.incorrect_shapes)
        wrong = {name for name, _, _ in misshaped}
        loaded = given - len(without_incidental(incompatible.unexpected_keys)) - len(wrong)
        missing = [name for name in without_incidental(missing) if name not in wrong]
        return Fit(loaded, without_incidental(self.model.state_dict()), missing, unexpected, misshaped)

    def _match_names(self, state: State) -> State:
        model_state = self.model.state_dict()
        # Detectron2 0.5 logs every name that it matches; what matters is in our own table
        matching = logging.getLogger(align_and_update_state_dicts.__module__)
        disabled, matching.disabled = matching.disabled, True
        try:
            matched = align_and_update_state_dicts(model_state, state, c2_conversion=False)
        finally:
            matching.disabled = disabled
        return place_leftovers(matched, model_state)

    def _demand_complete(self, checkpoint: Checkpoint, fit: Fit) -> None:
        if not fit.complete:
            raise self._misfit("does not fit", checkpoint, fit)

    def _demand_backbone(self, checkpoint: Checkpoint, fit: Fit) -> None:
        if fit.loaded == 0:
            raise self._misfit("has nothing that fits", checkpoint, fit)
        backbone = misfit_of_backbone(fit)
        if not backbone.complete:
            raise self._misfit("has another backbone than", checkpoint, backbone)

    def _misfit(self, verb: str, checkpoint: Checkpoint, fit: Fit) -> CheckpointError:
        lines = [f"{checkpoint.path}: {verb} this {type(self.model).__name__}: {diagnose(fit)}", describe(fit)]
        lines.append(f"  The file holds {checkpoint.kind}. {checkpoint.hint}".rstrip())
        config = checkpoint.config or self._config_beside(checkpoint.path)
        if config:
            lines.append(f"  The config that fits it: {config}")
        return CheckpointError("\n".join(lines))

    def _config_beside(self, path: str) -> str:
        """The ``config.yaml`` that a training left beside its checkpoint; "" where there is none."""
        folder = os.path.dirname(os.path.abspath(path))
        config = os.path.join(os.path.dirname(path), "config.yaml")
        # That of this run is written before anything is loaded, over the one of an earlier run in the same folder.
        own = bool(self.save_dir) and folder == os.path.abspath(self.save_dir)
        return config if not own and os.path.isfile(config) else ""

    def _report(self, checkpoint: Checkpoint, fit: Fit) -> None:
        self.logger.info("%s: %s, %d tensors loaded", checkpoint.path, checkpoint.kind, fit.loaded)
        if checkpoint.hint:
            self.logger.info(checkpoint.hint)
        if fit.missing or fit.misshaped:
            self.logger.warning("Layers that start afresh:\n%s", table_of_fresh_layers(fit))
        if fit.unexpected:
            self.logger.warning("Not used:\n%s", describe(Fit(fit.loaded, fit.names, unexpected=fit.unexpected)))
        if checkpoint.ignored:
            self.logger.info("Not weights, ignored: %s", ", ".join(checkpoint.ignored[:20]))
        self._compare_pixel_mean(checkpoint)

    def _report_average(self, checkpoint: Checkpoint) -> None:
        if self.average and checkpoint.averaged:
            self.logger.info("%s: the moving average of the weights (ema_model) is loaded", checkpoint.path)
        elif self.average:
            self.logger.warning("%s: holds no moving average: its weights are loaded as they are", checkpoint.path)

    def _compare_pixel_mean(self, checkpoint: Checkpoint) -> None:
        there, here = checkpoint.state.get("pixel_mean"), getattr(self.model, "pixel_mean", None)
        if there is None or not isinstance(here, torch.Tensor) or there.numel() != here.numel():
            return
        there, here = there.flatten().float(), here.detach().cpu().flatten().float()
        if (there - here).abs().max() > _MEAN_TOLERANCE:
            self.logger.warning(
                "The weights were trained with PIXEL_MEAN %s, the config has %s: another channel order or scale",
                there.tolist(),
                here.tolist(),
            )

    def _load_checkpointable(self, name: str, checkpoint: Checkpoint) -> None:
        self.logger.info("Loading %s from %s ...", name, checkpoint.path)
        try:
            self.checkpointables[name].load_state_dict(checkpoint.rest.pop(name))
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.path}: its {name} does not belong to this run: {type(error).__name__}: {error}"
            ) from error

    def _can_be_loaded(self, key: str, value: Any) -> bool:
        culprit = _not_plain(value, key)
        if culprit:
            self.logger.warning("Checkpoints leave out '%s': %s, which is never loaded from a file", key, culprit)
        return not culprit

    def _write(self, path: str, content: Any) -> None:
        """Writes text, or anything else by torch.save, under a temporary name; renames it once it is on the disk."""
        local = "://" not in path
        partial = f"{path}{_PARTIAL}" if local else path
        mode = "w" if isinstance(content, str) else "wb"
        failures: list[OSError] = []
        try:
            with self.path_manager.open(partial, mode) as file:
                if isinstance(content, str):
                    file.write(content)
                else:
                    torch.save(content, cast(IO[bytes], _Writer(cast(IO[bytes], file), failures)))
                if local:
                    file.flush()
                    os.fsync(file.fileno())
            if local:
                os.replace(partial, path)
                _sync_folder(os.path.dirname(path))
        except (OSError, RuntimeError) as error:
            cause = failures[0] if failures else error
            reason = (cause.strerror if isinstance(cause, OSError) else None) or cause
            kept = "; what was written before is intact" if local else ""
            raise CheckpointError(f"{path}: cannot be written: {reason}{kept}") from error
        finally:
            # gone already unless something failed
            if local and os.path.exists(partial):
                os.remove(partial)


class _Writer:
    """A file for torch.save, which turns an error of the system ("no space left") into one of its own."""

    def __init__(self, file: IO[bytes], failures: list[OSError]) -> None:
        self._file, self._failures = file, failures

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._failures.append(error)
            raise

    def flush(self) -> None:
        self._file.flush()


def _sync_folder(folder: str) -> None:
    """Makes a renaming durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        # some network file systems know no such thing; the renaming itself is done
        pass
    finally:
        os.close(descriptor)


_PLAIN = (torch.Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device, str, bytes, bool, int, float, type(None))


def _not_plain(value: Any, name: str) -> str:
    """The first part of a value that :func:`convmask.checkpoint.load_file` refuses, in words; "" if there is none."""
    if type(value) in (dict, OrderedDict, Counter):
        return next((found for key, item in value.items() if (found := _not_plain(item, f"{name}.{key}"))), "")
    if type(value) in (list, tuple, set):
        return next((found for item in value if (found := _not_plain(item, f"{name}[]"))), "")
    if type(value) in _PLAIN or (isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU"):
        return ""
    return f"{name} is a {type(value).__module__}.{type(value).__qualname__}"
