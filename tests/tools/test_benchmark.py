from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

NARROW = ["MODEL.NARROW_RESNET.WIDTH", "8"]


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/benchmark.py")


def test_every_combination_is_measured(
    tool: ModuleType, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repository / "configs" / "quick" / "embed_mask_synthetic.yaml")
    file, page = tmp_path / "all.json", tmp_path / "all.md"
    options = ["--size", "64", "64", "--batch-size", "1", "2", "--repeats", "1", "--warmup", "0", "--no-memory"]
    files = ["--json", str(file), "--markdown", str(page)]
    assert tool.main(["--config-file", config, *options, *files, *NARROW]) == 0
    content = json.loads(file.read_text())
    assert content["failed"] == {}
    assert [record["batch_size"] for record in content["records"]] == [1, 2]
    for record in content["records"]:
        assert record["name"] == "embed_mask_synthetic" and record["size"] == [64, 64]
        assert record["kind_of_images"] == "noise" and record["flops"] > 1e7 and record["total_ms"]["median"] > 0
    assert page.read_text() == capsys.readouterr().out
    assert "embed_mask_synthetic | float32, batch 2, eager" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config-file", "quick/fcis_synthetic.yaml", "--precision", "float16"], "'float16' needs a CUDA device"),
        (["--config-file", "quick/fcis_synthetic.yaml", "--batch-size", "0"], "batch size 0"),
        (["--config-file", "quick/fcis_synthetic.yaml", "--repeats", "0"], "--repeats is at least 1"),
        (["--config-file", "quick/fcis_synthetic.yaml", "--size", "0", "8"], "--size and --threads are at least 1"),
        (["--config-file", "none.yaml"], "no config file 'none.yaml'"),
        (["--all", "nowhere"], "no configs below 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_before_work_starts(
    tool: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(options)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_weights_can_be_asked_for(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {DEVICE: cpu, WEIGHTS: model.pth}\nVERSION: 2\n")
    (tmp_path / "model_final.pth").touch()
    arguments = ["--config-file", str(path)]
    assert tool.read_config(str(path), tool.parse_arguments(arguments)).MODEL.WEIGHTS == "model.pth"
    args = tool.parse_arguments([*arguments, "--weights", ""])
    assert tool.read_config(str(path), args).MODEL.WEIGHTS == ""
    assert str(tmp_path / "model_final.pth") not in tool.command_for(path, args, "records.json")


def test_every_config_is_checked_before_the_first_is_measured(
    tool: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("work has started"))
    with pytest.raises(SystemExit):
        tool.main(["--all", str(repository / "configs" / "quick"), "--precision", "float32", "float16"])
    assert "embed_mask_nuclei: precision 'float16' needs a CUDA device" in capsys.readouterr().err


def test_a_failing_config_does_not_lose_the_others(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of the configs are stood in for; the slow test has real ones."""
    for name in ("a", "b", "run/config", "Base-a"):
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MODEL: {DEVICE: cpu}\nVERSION: 2\n")
    (tmp_path / "configs" / "run" / "model_final.pth").touch()
    stages = {"backbone": {"median": 2.0}}
    total = {"median": 3.0, "lower": 2.5, "upper": 4.0}
    record = {"name": "?", "precision": "float32", "batch_size": 4, "compiled": None, "size": [8, 8], "images": 4}
    record |= {"parameters": None, "flops": None, "activations": None, "peak_memory_mib": 7.0, "weights": None}
    record |= {"stages_ms": stages, "total_ms": total, "images_per_second": 1.0, "repeats": 2}
    record["machine"] = tool.benchmark_config.__globals__["describe_machine"]()
    commands: list[list[str]] = []

    def process(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        options = tool.parse_arguments(command[2:])
        if Path(options.config_file).stem == "b":
            return subprocess.CompletedProcess(command, 1, "", "INFO: begun\nerror: b cannot be\n")
        if Path(options.config_file).stem == "config":
            # what was measured before is there already
            assert len(json.loads((tmp_path / "all.json").read_text())["records"]) == 1
            return subprocess.CompletedProcess(command, -9, "", "")
        Path(options.json).write_text(json.dumps({"records": [record], "failed": {}}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", process)
    options = ["--batch-size", "4", "--size", "8", "8", "--mode", "compiled", "eager", "--no-counts", "--repeats", "2"]
    assert tool.main(["--all", str(tmp_path / "configs"), *options, "--json", str(tmp_path / "all.json"), *NARROW]) == 1
    output = capsys.readouterr()
    content = json.loads((tmp_path / "all.json").read_text())
    assert [found["name"] for found in content["records"]] == ["a"]
    assert content["failed"] == {"b": "b cannot be", "run": "ended by signal 9"}
    assert "| a " in output.out and "failed: b: b cannot be" in output.err
    # every option of the command line reaches the processes
    expected = vars(tool.parse_arguments(["--config-file", "x", *options, *NARROW]))
    for command, weights in zip(commands, (None, None, "model_final.pth"), strict=True):
        found = vars(tool.parse_arguments(command[2:]))
        assert (found["weights"] and Path(found["weights"]).name) == weights
        differing = {key for key in expected if expected[key] != found[key]}
        assert differing - {"weights"} == {"config_file", "json"}


@pytest.mark.slow
def test_all_configs_of_a_folder(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    quick = repository / "configs" / "quick"
    (folder / "good.yaml").write_text(f"_BASE_: {quick / 'embed_mask_synthetic.yaml'}\n")
    (folder / "bad.yaml").write_text(f"_BASE_: {quick / 'fcis_synthetic.yaml'}\nMODEL: {{ROI_HEADS: {{NAME: X}}}}\n")
    command = [sys.executable, str(repository / "tools" / "benchmark.py"), "--all", str(folder), "--size", "64", "64"]
    command += ["--repeats", "1", "--warmup", "0", "--json", str(tmp_path / "all.json"), *NARROW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "failed: bad: the model cannot be built from this config" in done.stderr
    content = json.loads((tmp_path / "all.json").read_text())
    assert [record["name"] for record in content["records"]] == ["good"] and list(content["failed"]) == ["bad"]
    assert content["records"][0]["peak_memory_mib"] > 0
    assert "| good" in done.stdout
