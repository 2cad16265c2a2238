"""What ends a training from outside: one clear message each, and nothing is lost that was written before."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.file_io import PathManager

from convmask.checkpoint import CheckpointError, load_file
from convmask.data.panoptic import register_panoptic_records
from convmask.data.synthetic import CATEGORIES, load_records
from convmask.engine import Trainer, argument_parser, load_config, one_line_errors, prepare, setup

QUICK = "quick/panoptic_fpn_synthetic.yaml"


def config(options: list[str], *more: str) -> CfgNode:
    small = ["DATASETS.TEST", "()", "MODEL.NARROW_RESNET.WIDTH", "8", "SOLVER.CHECKPOINT_PERIOD", "1"]
    cfg = load_config(QUICK, [*options, *small, *more])
    prepare(cfg)
    return cfg


class At(HookBase):
    """Calls a function before an iteration."""

    def __init__(self, iteration: int, function: Callable[[], None]) -> None:
        self._iteration, self._function = iteration, function

    def before_step(self) -> None:
        if self.trainer.iter == self._iteration:
            self._function()


@contextmanager
def largest_file(size: int) -> Iterator[Callable[[], None]]:
    """Inside, calling what is yielded lets no file grow beyond ``size`` bytes: to a writer it is a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_full_disk(tiny_options: list[str], capsys: pytest.CaptureFixture[str], logged: Callable[[], str]) -> None:
    cfg = config(tiny_options, "SOLVER.MAX_ITER", "3")
    trainer = Trainer(cfg)
    with largest_file(100_000) as limit:
        trainer.register_hooks([At(1, limit)])
        with pytest.raises(SystemExit) as stop, one_line_errors():
            trainer.train()
    assert stop.value.code == 1
    output = Path(cfg.OUTPUT_DIR)
    line = error_line(capsys)
    assert line == (
        f"error: {output}/model_0000001.pth: cannot be written: File too large; what was written before is intact"
    )
    assert sorted(path.name for path in output.glob("model_*")) == ["model_0000000.pth"]
    assert f"{output}/model_0000000.pth is complete: --resume goes on from there" in logged()
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 1
    again.train()


def test_the_systems_reason_is_told_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convmask.checkpoint import Checkpointer, checkpointer

    def full(self: object, data: bytes) -> int:
        error = OSError(28, "No space left on device")
        self._failures.append(error)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(checkpointer._Writer, "write", full)
    with pytest.raises(CheckpointError, match=r"model\.pth: cannot be written: No space left on device; what"):
        Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def files_on_disk(tmp_path: Path) -> Iterator[tuple[str, list[Path]]]:
    """The name of a set of four images, and the files that hold them."""
    records, images = load_records("panoptic_val")[:4], []
    for number, record in enumerate(records):
        images.append(tmp_path / f"{number}.png")
        with PathManager.open(record["file_name"], "rb") as file:
            images[-1].write_bytes(file.read())
        record["file_name"] = str(images[-1])
    name = "images_that_vanish"
    register_panoptic_records(name, CATEGORIES, lambda: records)
    yield name, images
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_data_set_that_vanishes(
    tiny_options: list[str],
    files_on_disk: tuple[str, list[Path]],
    capsys: pytest.CaptureFixture[str],
    logged: Callable[[], str],
    workers: str,
) -> None:
    name, images = files_on_disk

    def vanish() -> None:
        for path in images:
            path.unlink()

    more = ("DATASETS.TRAIN", f"('{name}',)", "SOLVER.MAX_ITER", "20", "DATALOADER.NUM_WORKERS", workers)
    trainer = Trainer(config(tiny_options, *more))
    trainer.register_hooks([At(1, vanish)])
    with pytest.raises(SystemExit) as stop, one_line_errors():
        trainer.train()
    assert stop.value.code == 1
    line = error_line(capsys)
    assert any(f"'{path}'" in line for path in images) and "Traceback" not in line
    last = trainer.checkpointer.get_checkpoint_file()
    assert f"{last} is complete" in logged()
    assert load_file(last)["iteration"] < 20


def test_a_new_run_in_an_old_folder_is_not_continued_as_the_old_one(
    tiny_options: list[str], logged: Callable[[], str]
) -> None:
    cfg = config(tiny_options, "SOLVER.MAX_ITER", "1")
    Trainer(cfg).train()
    output = Path(cfg.OUTPUT_DIR)
    before = (output / "model_final.pth").read_bytes()
    Trainer(cfg).resume_or_load(resume=False)
    assert "holds an earlier training" in logged()
    assert not (output / "last_checkpoint").exists()
    assert (output / "model_final.pth").read_bytes() == before
    # Killed now, and resumed, it begins.
    third = Trainer(cfg)
    third.resume_or_load(resume=True)
    assert third.start_iter == 0


def test_a_module_of_ones_own_is_imported_first(tiny_options: list[str], tmp_path: Path) -> None:
    module = tmp_path / "my_sets_of_train_net.py"
    module.write_text(
        "from convmask.data.panoptic import register_panoptic_records\n"
        "from convmask.data.synthetic import CATEGORIES, load_records\n"
        "register_panoptic_records('set_of_ones_own', CATEGORIES, lambda: load_records('panoptic_val')[:2])\n"
    )
    sets = ["DATASETS.TRAIN", "('set_of_ones_own',)", "DATASETS.TEST", "('set_of_ones_own',)"]
    arguments = ["--config-file", QUICK, "--import", str(module), *tiny_options, *sets]
    cfg = setup(argument_parser().parse_args(arguments))
    assert cfg.DATASETS.TRAIN == ("set_of_ones_own",)
