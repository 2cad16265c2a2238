"""Code on the pages works: Python runs, commands are accepted by their programs, YAML is a config."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import convmask
from convmask.checkpoint import recognition
from convmask.data import class_counts
from convmask.data.loader import build_test_loader
from convmask.data.panoptic import register_panoptic_records
from convmask.data.synthetic import CATEGORIES, load_records
from convmask.engine import find_config, load_config, prepare

from .commands import CommandError, check, commands, own_file
from .pages import LANGUAGES, PROGRAMS, ROOT, Block, blocks, inline_code, is_shell, pages, read, strip_environment


def own_files(page: str) -> set[str]:
    return {block.file_name for block in blocks(page)} - {""}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: as empty as a user's, with the clone's configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def registries() -> Iterator[None]:
    """What examples register is gone after the test."""
    convmask.register_all()  # what methods register stays
    kept = [dict(registry) for registry in (recognition._CONVERTERS, class_counts._registry)]
    names = set(DatasetCatalog.list())
    yield
    for registry, content in zip((recognition._CONVERTERS, class_counts._registry), kept, strict=True):
        registry.clear()
        registry.update(content)
    for name in set(DatasetCatalog.list()) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def a_model_and_its_data() -> dict[str, Any]:
    """Panoptic FPN with random weights, and four images of the set my_val."""
    register_panoptic_records("my_val", CATEGORIES, lambda: load_records("panoptic_val")[:2])
    options = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('my_val',)", "DATALOADER.NUM_WORKERS", "0"]
    cfg = load_config("quick/panoptic_fpn_synthetic.yaml", options)
    prepare(cfg)
    return {"cfg": cfg, "model": build_model(cfg).eval(), "loader": build_test_loader(cfg, "my_val")}


def a_model_and_its_file() -> dict[str, Any]:
    """A small module and a checkpoint of it."""
    model = torch.nn.Linear(3, 2)
    torch.save({"model": model.state_dict()}, "model_final.pth")
    return {"model": model}


# What a page may ask for with <!-- given: ... -->.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "cfg, model, loader, and the set my_val": a_model_and_its_data,
    "a model, and model_final.pth of it": a_model_and_its_file,
}


def python_pages() -> list[str]:
    return [page for page in pages() if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", python_pages())
def test_python_runs(page: str, workplace: Path, registries: None) -> None:
    """The blocks of a page run one after the other, so that a later one may use what an earlier one has made."""
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        if block.language != "python":
            continue
        # as long a prefix of empty lines as puts the lines of an error where they are on the page
        tree = ast.parse("\n" * block.line + block.text, page)
        if block.file_name:
            own_file(workplace, block.file_name, block.text)
        if block.not_run or block.takes_arguments:
            continue
        names.update(GIVEN[block.given]() if block.given else {})
        run(tree, block, names)


def run(tree: ast.Module, block: Block, names: dict[str, Any]) -> None:
    """Runs a block, and compares the values of expressions with those that comments beside them state."""
    lines = block.text.splitlines()
    for statement in tree.body:
        stated = None
        if isinstance(statement, ast.Expr) and statement.end_lineno is not None:
            stated = stated_value(lines[statement.end_lineno - 1 - block.line])
        if isinstance(statement, ast.Expr) and stated is not None:
            value = eval(compile(ast.Expression(statement.value), block.page, "eval"), names)
            assert value == stated[0], f"{block.page}:{statement.lineno}: {ast.unparse(statement)} is {value!r}"
        else:
            exec(compile(ast.Module([statement], []), block.page, "exec"), names)


def stated_value(line: str) -> tuple[Any] | None:
    """The value in a comment, ``# 5`` or ``# number of things: 5``; None where it is no literal."""
    _, is_comment, comment = line.partition("  # ")
    try:
        return (ast.literal_eval(comment.rpartition(": ")[2].strip()),) if is_comment else None
    except (ValueError, SyntaxError):
        return None


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("x  # 5", (5,)),
        ("x  # things: (1, 2)", ((1, 2),)),
        ("x  # (1, 2) and 3", None),
        ("x  # None", (None,)),
        ("x", None),
    ],
)
def test_values_in_comments_are_read(line: str, value: tuple[Any] | None) -> None:
    assert stated_value(line) == value


def test_a_wrong_value_in_a_comment_is_noticed() -> None:
    block = Block("page.md", 3, "python", "x = 2\nx + 1  # 4\n")
    with pytest.raises(AssertionError, match=r"page\.md:5: x \+ 1 is 3"):
        run(ast.parse("\n" * 3 + block.text), block, {})


def shell_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page) if is_shell(block)]


@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_commands_are_accepted(block: Block) -> None:
    for command in commands(block.text):
        check(command, own_files(block.page))


def inline_commands() -> list[tuple[str, str]]:
    """Commands in the lines of a page, not mere mentions of an option."""
    found = [(page, code, strip_environment(code).split(" ")) for page in pages() for code in inline_code(read(page))]
    return [
        (page, code)
        for page, code, words in found
        if (words[0] in ("make", "pip") and len(words) > 1)
        or (words[0] in PROGRAMS and any(word == "-m" or word.endswith(".py") for word in words))
    ]


@pytest.mark.parametrize(("page", "command"), inline_commands())
def test_commands_in_the_text_are_accepted(page: str, command: str) -> None:
    check(command, own_files(page))


def test_languages_are_known() -> None:
    found = [(block.page, block.line, block.language) for page in pages() for block in blocks(page)]
    assert [entry for entry in found if entry[2] not in LANGUAGES | {"make"}] == []


@pytest.mark.parametrize("page", pages())
def test_yaml_and_json_are_what_they_seem(page: str, workplace: Path) -> None:
    for number, block in enumerate(blocks(page)):
        if block.language == "yaml":
            (workplace / f"{number}.yaml").write_text(block.text)
            load_config(find_config(str(workplace / f"{number}.yaml")))
        elif block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python train_net.py --config-file configs/quick/absent.yaml", "there is no configs/quick/absent.yaml"),
        ("python train_net.py --config absent.yaml --no-such-option", "no config file 'absent.yaml'|no-such-option"),
        ("python tools/absent.py", "there is no tools/absent.py"),
        ("python tools/analyze_model.py --config-file configs/quick/fcis_synthetic.yaml --dept x", "invalid int value"),
        ("python demo/demo.py --input a.jpg", "--config-file"),
        ("python benchmarks/bench_mask_voting.py --absent 3", "--absent"),
        ("make absent", "no target absent"),
        ("make demo ABSENT=1", "no variable ABSENT"),
        ("pip install -r requirements/absent.txt", "there is no requirements/absent.txt"),
        ("torchrun --nproc-per-node 8 train_net.py --absent", "absent"),
        ("python -m convmask.absent", "there is no module"),
        ("no-such-program", "no program"),
        ("python train_net.py --config-file configs/quick/fcis_synthetic.yaml SOLVER.MAXITER 3", "SOLVER.MAXITER"),
        ("python train_net.py --config-file configs/quick/fcis_synthetic.yaml SOLVER.MAX_ITER x", "SOLVER.MAX_ITER x"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, problem: str) -> None:
    with pytest.raises((CommandError, ValueError), match=problem):
        check(command, set())


def test_blocks_and_their_marks_are_found() -> None:
    text = "x\n\n<!-- not run: takes\nhours -->\n```python\nx = 1\n```\n\n- y\n  ```bash\n  make demo\n  ```\n"
    first, second = blocks("page.md", text)
    script = Block("page.md", 1, "python", "# draw.py PHOTO OUTPUT\nimport sys\n")
    assert script.file_name == "draw.py" and script.takes_arguments
    assert not Block("page.md", 1, "python", "# draw.py\n").takes_arguments
    assert (first.line, first.language, first.text, first.not_run) == (5, "python", "x = 1\n", "takes\nhours")
    assert (second.language, second.text, second.not_run) == ("bash", "  make demo\n", "")
