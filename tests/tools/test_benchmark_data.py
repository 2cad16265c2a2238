from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/benchmark_data.py")


def test_it_times_images_and_steps(
    tool: ModuleType, tiny_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["--workers", "0", "1", "--batches", "2", "--steps", "2"]
    tool.main(["--config-file", "quick/panoptic_fpn_synthetic.yaml", *counts, *tiny_options])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    for workers, row in enumerate(rows):
        numbers = [float(word) for word in row if word not in ("│", "%")]
        assert numbers[0] == workers and numbers[1] > 0 and numbers[2] > 0 and 0 <= numbers[3] < 100


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--workers", "-1"], "must not be negative"), (["--import", "nowhere"], "no module")]
)
def test_wrong_arguments_are_one_line(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--config-file", "quick/panoptic_fpn_synthetic.yaml", *arguments])
    assert message in capsys.readouterr().err
