from __future__ import annotations

import importlib
import sys
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch

import convmask
from convmask.utils import collect_env


def test_report_names_what_is_installed() -> None:
    report = collect_env.collect()
    assert report["convmask"].startswith(convmask.__version__)
    assert report["torch"].startswith(torch.__version__)
    assert report["detectron2"].startswith(f"{detectron2.__version__}, from ")
    assert report["numpy"].startswith(np.__version__)
    assert str(torch.get_num_threads()) in report["threads"]
    for name in ("torchvision", "fvcore", "iopath", "pycocotools", "panopticapi", "cv2", "scipy"):
        assert report[name][0].isdigit() or report[name].startswith("opencv"), (name, report[name])
    assert not any(text.startswith("broken") for text in report.values()), report


@pytest.mark.parametrize("loaded", [True, False])
def test_report_says_why_the_operators_are_not_loaded(monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    ops = importlib.import_module("convmask.ops")
    monkeypatch.setattr(ops, "extension_status", lambda: (loaded, "the reason"))
    text = collect_env.collect()["operators"]
    assert text.endswith(": the reason") and text.startswith("compiled" if loaded else "not compiled")


@pytest.mark.parametrize("module", ["torch", "torchvision", "cv2", "panopticapi", "detectron2", "convmask.ops"])
@pytest.mark.parametrize("error", [ModuleNotFoundError("gone"), OSError("undefined symbol: x\nmore"), SystemExit(1)])
def test_a_missing_or_broken_piece_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, module: str, error: BaseException
) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None):
        if name == module:
            raise error
        return real(name, package)

    monkeypatch.setattr(collect_env.importlib, "import_module", import_module)
    text = collect_env.collect()["operators" if module == "convmask.ops" else module]
    assert text.startswith("missing (gone" if isinstance(error, ModuleNotFoundError) else "broken (")
    assert "\n" not in text


def test_origin_of_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collect_env._detectron2_origin(tmp_path) == "from a checkout"
    installed = tmp_path / "site-packages" / "detectron2"
    installed.mkdir(parents=True)

    class Distribution:
        text: str | None = None

        def read_text(self, name: str) -> str | None:
            return self.text

    monkeypatch.setattr(collect_env.importlib.metadata, "distribution", lambda name: Distribution)
    monkeypatch.setattr(Distribution, "read_text", classmethod(lambda cls, name: cls.text))
    assert collect_env._detectron2_origin(installed) == "from a wheel"
    Distribution.text = '{"vcs_info": {"vcs": "git", "commit_id": "02b5c4e295e990042a714712c21dc79b731e8833"}}'
    assert collect_env._detectron2_origin(installed) == "from GitHub, commit 02b5c4e295e9"
    (installed / "_C.py").touch()
    assert collect_env._detectron2_origin(installed) == "from the registry's archive"


def test_two_opencv_packages_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "_version", lambda name: "4.13" if "contrib" not in name else None)
    assert "two packages with the same files break each other" in collect_env.collect()["cv2"]


def test_tools_that_are_not_there_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env.shutil, "which", lambda name: None)
    monkeypatch.setattr(collect_env.Path, "is_file", lambda path: False)
    assert collect_env._compiler() == collect_env._nvcc() == "missing"


def test_a_compiler_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!{sys.executable}\nprint('cc 1.2')\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert collect_env._compiler() == f"cc 1.2 ({compiler})"


def test_format_aligns_the_columns() -> None:
    assert collect_env.format_report({"a": "x", "long": "y"}) == "a     x\nlong  y"
