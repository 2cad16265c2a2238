"""The list of models, and the pages that show its numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from convmask import model_zoo
from convmask.engine import ConfigError
from convmask.model_zoo.__main__ import main
from convmask.model_zoo.listing import CIRCUMSTANCES
from convmask.model_zoo.names import config_files
from convmask.model_zoo.page import updated


def test_every_config_is_listed_with_method_task_and_data() -> None:
    models = model_zoo.list_models()
    assert [model.name for model in models] == list(config_files())
    by_name = {model.short_name: model for model in models}
    assert by_name["knet_semantic_fcn_R_50_80k"].task == "semantic"
    assert by_name["knet_instance_nuclei"].dataset == "nuclei_val"
    assert (by_name["embed_mask_v1_R_50_1x"].method, by_name["embed_mask_v1_R_50_1x"].task) == ("EmbedMask", "instance")
    for model in models:
        assert model.task in ("panoptic", "instance", "semantic")
        stem = model.short_name
        for task in ("panoptic", "instance", "semantic"):
            # Panoptic FPN and Panoptic FCN have the word in the name of the method
            if f"_{task}_" in stem or (stem.startswith(f"{task}_") and "panoptic" not in stem):
                assert model.task == task, stem


def test_models_can_be_chosen() -> None:
    assert {m.task for m in model_zoo.list_models(task="semantic")} == {"semantic"}
    assert {m.name.split("/")[0] for m in model_zoo.list_models(method="FCIS")} == {"FCIS", "quick"}


def test_results_are_of_configs_and_in_percent(repository: Path) -> None:
    for path in (repository / "configs").glob("*/results.json"):
        for name, entry in json.loads(path.read_text()).items():
            assert (path.parent / f"{name}.yaml").is_file(), f"{path}: {name}"
            assert entry.keys() <= {"weights", "published", "trained"}
            for result in [*entry.get("published", []), entry.get("trained", {})]:
                numbers = [v for k, v in result.items() if k not in (*CIRCUMSTANCES, "source", "data")]
                assert all(isinstance(number, float) and 0 < number < 100 for number in numbers), (path, name)


def test_the_page_is_up_to_date(repository: Path) -> None:
    page = (repository / "docs" / "model_zoo.md").read_text(encoding="utf-8")
    assert updated(page) == page, "run: python -m convmask.model_zoo --page docs/model_zoo.md"
    for model in model_zoo.list_models():
        assert page.count(f"`{model.name}`") == 1


@pytest.mark.parametrize("folder", sorted({name.split("/")[0] for name in config_files()} - {"quick"}))
def test_the_projects_pages_have_the_same_numbers(repository: Path, folder: str) -> None:
    """Every number on the lines of a project's page that name a config, and the other way round."""
    section = (repository / "projects" / folder / "README.md").read_text().split("## Published results")[1]
    section = section.split("\n## ")[0]
    for model in model_zoo.list_models():
        if not model.name.startswith(f"{folder}/"):
            continue
        rows = [line for line in section.splitlines() if f"`{model.short_name}.yaml`" in line and line[0] == "|"]
        recorded = {f"{v:.1f}" for r in model.published for v in r.values() if isinstance(v, float)}
        shown = {n for row in rows for n in re.findall(r"\b\d\d\.\d\b", row.split("|", 2)[2])}
        assert not rows or recorded <= shown or " + " in rows[0], model.name
        if not rows:
            assert all(number in section for number in recorded), model.name


def test_a_new_number_is_written_into_the_page() -> None:
    page = "before\n<!-- models: quick -->\nold\n<!-- end -->\nafter\n"
    new = updated(page)
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert "| `quick/fcis_nuclei.yaml` |" in new
    with pytest.raises(ConfigError, match="no table"):
        updated("nothing")
    with pytest.raises(ConfigError, match="configs/NoSuch"):
        updated(page.replace("quick", "NoSuch"))


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--method", "KNet", "--task", "instance"]) == 0
    printed = capsys.readouterr().out
    assert "knet_instance_R_50_1x" in printed and "34.0" in printed and "knet_panoptic" not in printed
    with pytest.raises(SystemExit):
        main(["--method", "NoSuch"])
    assert "KNet" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("<!-- models: FCIS -->\n<!-- end -->\n")
    assert main(["--page", str(tmp_path / "page.md")]) == 0
    assert "fcis_R_101_voc" in (tmp_path / "page.md").read_text()
