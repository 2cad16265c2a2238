from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from convmask.benchmark import ModelOptions, benchmark_config, check_options, count_config, table_of
from convmask.benchmark.images import images_of_dataset, images_of_files, in_batches, middle_size, random_images
from convmask.checkpoint import CheckpointError
from convmask.demo.model import has_weights
from convmask.engine import ConfigError

from .networks import narrow_config, noise


def test_the_record_of_a_config() -> None:
    cfg = narrow_config("embed_mask")
    images = noise((64, 96), (64, 64), (96, 96))
    calls: list[int] = []
    record = benchmark_config(cfg, images, warmup=1, repeats=4, progress=lambda: calls.append(1))
    assert json.loads(json.dumps(record)) == record
    assert len(calls) == 4
    assert (record["model"], record["weights"], record["images"], record["size"]) == ("EmbedMask", None, 3, [64, 96])
    assert (record["precision"], record["batch_size"], record["compiled"], record["device"]) == (
        *("float32", 1, None),
        "cpu",
    )
    counts = count_config(cfg, 64, 96)
    assert [record[key] for key in ("parameters", "flops", "activations")] == [
        counts[task][""] for task in ("params", "flops", "activations")
    ]
    assert list(record["stages_ms"]) == ["preprocess", "backbone", "heads", "postprocess", "transfer"]
    for spread in (*record["stages_ms"].values(), record["total_ms"], record["stages_total_ms"]):
        assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]
    means = sum(spread["mean"] for spread in record["stages_ms"].values())
    assert means == pytest.approx(record["stages_total_ms"]["mean"], rel=1e-3)
    assert record["images_per_second"] == pytest.approx(1000 / record["total_ms"]["median"], rel=1e-3)
    # a feature map of stride 2, at least, and much less than a process has in all
    assert 0.1 < record["peak_memory_mib"] < 200
    model = build_model(cfg)
    assert record["weights_mib"] == sum(x.element_size() * x.numel() for x in model.state_dict().values()) / 2**20
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["threads"] == torch.get_num_threads()

    table = table_of([{"name": "mine", **record}])
    assert "| mine" in table and "| float32, batch 1, eager" in table and "64 x 96 |" in table
    assert "All weights are random" in table and "4 calls on 3 images" in table


def test_weights_of_a_backbone_are_told_from_those_of_a_model(repository: Path) -> None:
    cfg = narrow_config("embed_mask")
    for weights in ("", "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"):
        cfg.MODEL.WEIGHTS = weights
        assert not has_weights(cfg)
    for weights in ("model.pth", "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/x/1/model_final_1.pkl"):
        cfg.MODEL.WEIGHTS = weights
        assert has_weights(cfg)
    # whatever the configs of the methods begin with
    found = set()
    for path in (repository / "configs").rglob("*.yaml"):
        found.update(re.findall(r'^  WEIGHTS: "?([^"\n]+)"?$', path.read_text(), re.MULTILINE))
    assert any("openmmlab" in weights for weights in found) and any("Swin" in weights for weights in found)
    for weights in found:
        cfg.MODEL.WEIGHTS = weights
        assert not has_weights(cfg), weights


def test_precision_batch_weights_and_compiled_parts(tmp_path: Path) -> None:
    cfg = narrow_config("embed_mask")
    torch.manual_seed(5)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    options = ModelOptions("bfloat16", 2, "eager")
    kept = {"counts": False, "memory": False, "warmup": 0, "repeats": 1}
    record = benchmark_config(cfg, noise((64, 64)), options=options, **kept)
    assert (record["weights"], record["batch_size"], record["precision"]) == (cfg.MODEL.WEIGHTS, 2, "bfloat16")
    assert record["images_per_second"] == pytest.approx(2000 / record["total_ms"]["median"], rel=1e-3)
    assert record["flops"] is record["peak_memory_mib"] is None
    assert "backbone" in record["stages_ms"] and "heads" in record["stages_ms"]
    table = table_of([{"name": "mine", **record}])
    assert "bfloat16, batch 2, compiled by eager" in table and "random" not in table

    cfg.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        benchmark_config(cfg, noise((64, 64)), **kept)


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (ModelOptions("float64"), "cpu", "precision 'float64' is not one of float32, float16, bfloat16"),
        (ModelOptions(batch_size=0), "cpu", "batch size 0 is less than 1"),
        (ModelOptions("float16"), "cpu", "precision 'float16' needs a CUDA device"),
        (ModelOptions(compiled="fast"), "cpu", "no backend 'fast' of torch.compile"),
        (ModelOptions(), "cuda", "device 'cuda': this machine has no CUDA device"),
        (ModelOptions(compiled="inductor"), "cpu", "'inductor' needs a C"),
    ],
)
def test_what_cannot_be_run(options: ModelOptions, device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        check_options(options, device)


def test_repeats_have_to_be_some() -> None:
    with pytest.raises(ConfigError, match="0 repeats after 3"):
        benchmark_config(narrow_config("embed_mask"), repeats=0)


def test_several_views_are_not_measured() -> None:
    cfg = narrow_config("embed_mask", "TEST.AUG.ENABLED", "True")
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED"):
        benchmark_config(cfg)


def test_images_from_files_are_resized_as_in_tests(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :40]).save(tmp_path / "b.png")
    cfg = narrow_config("embed_mask", "INPUT.MIN_SIZE_TEST", "80", "INPUT.MAX_SIZE_TEST", "100")
    first, second = images_of_files(cfg, [str(tmp_path)], 5)
    assert first["image"].shape == (3, 67, 100) and (first["height"], first["width"]) == (40, 60)
    assert second["image"].shape == (3, 80, 80)
    assert middle_size([first, second]) == (80, 80)
    assert [[x["image"].shape[1] for x in batch] for batch in in_batches([first, second, first], 2)] == [
        *([67, 80], [67, 67]),
    ]
    cfg.INPUT.MIN_SIZE_TEST = 0
    (unchanged,) = images_of_files(cfg, [str(tmp_path / "a.png")], 1)
    assert np.array_equal(unchanged["image"].numpy(), pixels[:, :, ::-1].transpose(2, 0, 1))
    with pytest.raises(ConfigError, match=r"no images in .*nothing"):
        images_of_files(cfg, [str(tmp_path / "nothing")], 1)


def test_images_of_a_dataset(few_images: str) -> None:
    cfg = narrow_config("embed_mask", "DATASETS.TEST", f"('{few_images}',)")
    images = images_of_dataset(cfg, 3)
    assert len(images) == 3 and all(x.keys() == {"image", "height", "width"} for x in images)
    cfg.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is empty"):
        images_of_dataset(cfg, 3)


def test_noise_has_the_size_of_the_config() -> None:
    cfg = narrow_config("embed_mask", "INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TEST", "48")
    before = torch.get_rng_state()
    first, second = random_images(cfg, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first["image"].shape == (3, 32, 48) and first["image"].dtype == torch.uint8
    assert not torch.equal(first["image"], second["image"])
    assert random_images(cfg, 1, (8, 16))[0]["image"].shape == (3, 8, 16)
