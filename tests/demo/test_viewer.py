"""The viewer without its page: which models there are, how they are kept, and what is drawn of a result."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from convmask.checkpoint import CheckpointError
from convmask.demo.local_page import POLICY, LocalPage
from convmask.demo.models import Models, Result, Session, find_models, model_files
from convmask.demo.view import confident, figure_html, gallery_html, legend, picture, rows, summary, table_html
from convmask.engine import ConfigError
from convmask.visualization.segments import Segment, instance_segments

SIZE = (20, 30)


def segment(name: str, score: float | None, is_thing: bool = True, side: int = 5) -> Segment:
    return Segment(np.ones((side, side), bool), 1, 2, name, score, (200, 10, int(100 * (score or 0))), is_thing)


RESULT = Result(
    [segment("cat", 0.9), segment("dog & <b>", 0.4)],
    [segment("cat", 0.9), segment("cat", 0.35), segment("sky", None, False, 10)],
    0.0125,
)


class Attack:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_models_are_named_by_folders_and_by_files(tmp_path: Path) -> None:
    for name in ("b", "a", "unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        if name != "unfinished":
            (tmp_path / name / "model_final.pth").touch()
    assert [files.name for files in find_models(tmp_path)] == ["a", "b"]
    assert find_models(tmp_path / "none") == []
    folder, weights = tmp_path / "a", str(tmp_path / "b" / "model_final.pth")
    assert model_files(str(folder)).weights == str(folder / "model_final.pth")
    assert model_files(f"mine={folder}").name == "mine"
    files = model_files(f"K-Net=quick/knet.yaml:{weights}")
    assert (files.name, files.config_file, files.weights) == ("K-Net", "quick/knet.yaml", weights)
    assert model_files(f"quick/knet.yaml:{weights}").name == "knet"
    for wrong in (str(tmp_path / "unfinished"), str(tmp_path / "none"), "x=quick/knet.yaml:none.pth"):
        with pytest.raises(ConfigError, match=f"--model {re.escape(wrong)}: there is no "):
            model_files(wrong)


def test_models_are_built_late_kept_and_set_back(model_folder: Path) -> None:
    files = [model_files(f"one={model_folder}"), model_files(f"one={model_folder}")]
    models = Models(files, capacity=1)
    assert list(models.infos) == ["one", "one (2)"] and not models._built
    image, label = models.example("one", 5)
    assert label == "image 1 of few_synthetic_images" and image.dtype == np.uint8
    result = models.predict("one", image)
    assert result.objects is not None and result.regions is not None and result.seconds > 0
    scores = [x.score for x in result.objects]
    assert scores == sorted(scores, reverse=True)

    (score, default), *others = models.infos["one"].thresholds
    values = [0.99, *(value for _, value in others)]
    assert score.path == "combine_options.score_threshold"
    models.predict("one", image, values)
    model = models._built["one"].model
    assert model.combine_options["score_threshold"] == 0.99
    assert models.inner_pictures("one", image)  # another page, with the values of the config
    assert model.combine_options["score_threshold"] == default
    models.predict("one (2)", image)
    assert list(models._built) == ["one (2)"]


def test_a_checkpoint_executes_nothing(model_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"model": Attack(marker)}, model_folder / "model_final.pth")
    models = Models([model_files(str(model_folder))])
    with pytest.raises(CheckpointError, match=r"model_final\.pth"):
        models.predict("model", np.zeros((64, 64, 3), np.uint8))
    assert not marker.exists()


def test_a_yaml_that_would_execute_code_is_refused(model_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (model_folder / "config.yaml").write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ConfigError):
        Models([model_files(str(model_folder))])
    assert not marker.exists()


def test_augmentation_is_off(model_folder: Path) -> None:
    models = Models([model_files(str(model_folder))], opts=["TEST.AUG.ENABLED", "True"])
    assert not models.infos["model"].cfg.TEST.AUG.ENABLED


def test_a_wrong_config_that_was_found_is_skipped(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "model_final.pth").touch()
    (wrong / "config.yaml").write_text("NO_SUCH_KEY: 1\n")
    with caplog.at_level("WARNING", logger="convmask.demo.models"):
        assert list(Models(find_models(tmp_path), skip_wrong=True).infos) == ["model"]
    assert "without the model wrong" in caplog.text
    for options in ({}, {"skip_wrong": True}):
        with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
            Models([model_files(str(wrong))], **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--side", "0"), ("--side", "-5"), ("--keep", "0"), ("--port", "0"), ("--port", "70000")),
        *(("--max-megabytes", "0"), ("--max-megabytes", "nan")),
        *(("--max-megapixels", "-1"), ("--max-megapixels", "inf")),
    ],
)
def test_limits_are_checked(
    script: Callable[[str], ModuleType], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script("app").parse_arguments([option, value])
    assert stop.value.code == 2
    assert f"{option} {value}" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_other_names_of_this_machine_are_refused(script: Callable[[str], ModuleType], host: str) -> None:
    pytest.importorskip("gradio", reason="the optional package gradio is not installed")

    class Blocks:
        options: dict[str, Any]

        def queue(self, **_: Any) -> Blocks:
            return self

        def launch(self, **options: Any) -> tuple[None, str, None]:
            self.options = options
            return None, "address", None

    app, blocks = script("app"), Blocks()
    page = SimpleNamespace(blocks=blocks, limits=SimpleNamespace(bytes=1))
    app.serve(page, app.parse_arguments(["--host", host]), wait=False)
    # IPv6 as in an address of the browser
    assert blocks.options["server_name"] == ("[::1]" if ":" in host else host)
    reached: list[bytes] = []

    async def end(scope: Any, *_: Any) -> None:
        reached.append(dict(scope["headers"])[b"host"])

    async def send(_: Any) -> None:
        pass

    first = blocks.options["app_kwargs"]["middleware"][0]
    for name in (b"127.0.0.1:7860", b"localhost:7860", b"[::1]:7860", b"evil.example:7860"):
        asyncio.run(first.cls(end, **first.kwargs)({"type": "http", "headers": [(b"host", name)]}, None, send))
    assert reached == [b"127.0.0.1:7860", b"localhost:7860", b"[::1]:7860"]


def test_images_of_data_sets_are_reduced_too(script: Callable[[str], ModuleType], model_folder: Path) -> None:
    pytest.importorskip("gradio", reason="the optional package gradio is not installed")
    app = script("app")
    page = app.build(app.parse_arguments(["--model", str(model_folder), "--side", "32"]))
    session = Session()
    page.take_example(session, 0.5, ["model"])
    assert session.image is not None and max(session.image.shape) == 32


def test_a_threshold_leaves_stuff_and_drops_objects() -> None:
    assert [x.name for x in confident(RESULT.regions or [], 0.5)] == ["cat", "sky"]
    assert summary(RESULT, 0.5) == "1 object, 2 regions, 12 ms"
    assert summary(RESULT, 0.0) == "2 objects, 3 regions, 12 ms"
    (row,) = rows("m", RESULT, 0.5, SIZE)
    assert row == ("m", "cat", "0.900", "25", "4.2 %", "2, 1, 5, 5")
    assert rows("m", RESULT, 1.0, SIZE) == []
    # a semantic model has regions alone
    assert [row[1:4] for row in rows("m", Result(None, RESULT.regions, 0.1), 0.95, SIZE)] == [("sky", "", "100")]


def test_names_are_no_html() -> None:
    table = table_html(rows("<i>", RESULT, 0.0, SIZE))
    assert "dog &amp; &lt;b&gt;" in table and "<b>" not in table and "<i>" not in table
    assert table.count("<tr>") == 3
    assert "No objects" in table_html([])
    shown = legend([segment("<script>", 0.5)], 0.0, SIZE)
    assert "&lt;script&gt;" in shown and "<script>" not in shown
    assert "&lt;" in figure_html(np.zeros((4, 4, 3), np.uint8), "<")
    assert gallery_html({}) == "" and gallery_html({"a": np.zeros((4, 4, 3), np.uint8)}).count("<img") == 1


def test_a_legend_counts_objects_and_areas() -> None:
    shown = legend(RESULT.regions or [], 0.0, SIZE)
    items = [re.sub(r"<[^>]*>", "", item) for item in shown.split("<li>")[1:]]
    assert items == ["cat &times; 2" + "8.3 %", "sky" + "16.7 %"]
    assert "linear-gradient" in shown  # the two cats differ in colour
    assert legend([], 0.0, SIZE) == ""


def test_what_is_drawn_follows_the_threshold() -> None:
    image = np.full((*SIZE, 3), 90, np.uint8)
    instances = Instances(SIZE)
    instances.pred_masks = torch.zeros(1, *SIZE, dtype=torch.bool)
    instances.pred_masks[0, 4:12, 5:15] = True
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 4.0, 15.0, 12.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.6]), torch.tensor([0])
    segments = instance_segments(instances, Metadata(thing_classes=["cat"]))
    shown, hidden = (picture(image, segments, threshold) for threshold in (0.5, 0.7))
    assert shown.shape == hidden.shape == (SIZE[0] * 16, SIZE[1] * 16, 3)
    assert (hidden == 90).all() and (shown[8 * 16, 10 * 16] != 90).any()


def test_every_response_forbids_the_browser_to_load_from_elsewhere() -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(LocalPage(page)({"type": "http"}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-security-policy"] == POLICY.encode() and headers[b"a"] == b"b"
    assert "http" not in POLICY and "*" not in POLICY


def test_without_a_model_the_way_out_is_told(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="the optional package gradio is not installed")
    with pytest.raises(SystemExit) as stop:
        script("app").main(["--output", str(tmp_path)])
    assert stop.value.code == 1
    assert "make demo" in capsys.readouterr().err


def test_without_gradio_its_installation_is_told(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = script("app")
    monkeypatch.setattr(app, "gr", None)
    with pytest.raises(SystemExit):
        app.main([])
    assert "pip install --no-build-isolation -e '.[viewer]'" in capsys.readouterr().err
