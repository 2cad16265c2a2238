"""Checks a command of a page without running it: that its program takes it, and that what it names is there."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from detectron2.config import CfgNode

from convmask.engine import argument_parser, find_config, load_config
from convmask.engine.config_files import merge_options

from .pages import ROOT, strip_environment

# Nothing of the project is in what these do.
FOREIGN = {"cat", "cd", "export", "git", "grep", "head", "ls", "mkdir", "pytest", "source", "tail", "tensorboard"}
# Folders of the clone: a path in one of them has to be there.
FOLDERS = (
    "configs",
    "tools",
    "demo",
    "docs",
    "projects",
    "requirements",
    "packaging",
    "benchmarks",
    "tests",
    "convmask",
)


class CommandError(AssertionError):
    """A command that would not work as it stands on the page."""


class _Parsed(Exception):  # noqa: N818  no error: it carries the result out
    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def commands(text: str) -> list[str]:
    """The commands of a block, one line each."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def check(command: str, own_files: set[str]) -> None:
    """Checks one command.

    Args:
        command: in one line.
        own_files: names of the files that the page's blocks are, such as ``"cells.yaml"``.

    Raises:
        CommandError: says what is wrong.
    """
    if re.match(r"\w+=\$\(", command):  # a variable of a shell script
        return
    words = shlex.split(strip_environment(command), comments=True)
    if not words:
        return
    if words[0] == "srun":
        words = words[words.index("torchrun") :]
    program, arguments = words[0], words[1:]
    _check_paths(arguments)
    if program == "make":
        _check_make(arguments)
    elif program == "pip":
        _check_pip(arguments)
    elif program == "torchrun":
        _check_torchrun(arguments, own_files)
    elif program in ("python", "python3", ".venv/bin/python"):
        _check_python(arguments, own_files)
    elif program not in FOREIGN:
        raise CommandError(f"{program!r} is no program that the tests know: {command}")


def _check_paths(arguments: list[str]) -> None:
    for argument in arguments:
        # NAME=CONFIG:WEIGHTS of the viewer
        path = (argument.partition("=")[2] or argument).partition(":")[0]
        in_clone = "/" in path and path.partition("/")[0] in FOLDERS and not re.search(r"[<*{]", path)
        if in_clone and not (ROOT / path).exists():
            raise CommandError(f"there is no {path}")


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        known = rf"\$\({name}\)|^{name} \?=" if is_variable else rf"^{re.escape(name)}:"
        if not re.search(known, makefile, flags=re.MULTILINE):
            raise CommandError(f"the Makefile has no {'variable' if is_variable else 'target'} {name}")


def _check_pip(arguments: list[str]) -> None:
    if arguments[0] not in ("install", "uninstall", "wheel"):
        raise CommandError(f"pip {arguments[0]}")
    for option, value in itertools.pairwise(arguments):
        if option in ("-r", "--requirement", "-e", "--editable") and not (ROOT / value).exists():
            raise CommandError(f"pip: there is no {value}")


def _check_torchrun(arguments: list[str], own_files: set[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = _parse(lambda: get_args_parser().parse_args(arguments))
    _check_python([parsed.training_script, *parsed.training_script_args], own_files)


def _check_python(arguments: list[str], own_files: set[str]) -> None:
    while arguments[:1] == ["-W"]:
        arguments = arguments[2:]
    if arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            raise CommandError(f"there is no module {arguments[1]}")
        return
    script, arguments = arguments[0], ["0" if word == "N" else word for word in arguments[1:]]
    if script in own_files:
        return
    if not (ROOT / script).is_file():
        raise CommandError(f"there is no {script}")
    _check_config(parse(script, arguments), own_files)


@functools.cache
def _script(path: str) -> ModuleType:
    name = "documented_" + re.sub(r"\W", "_", path)
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str((ROOT / path).parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def _parse(function: object) -> argparse.Namespace:
    assert callable(function)
    messages: list[str] = []
    with mock.patch.object(
        argparse.ArgumentParser, "_print_message", lambda self, text, file=None: messages.append(text)
    ):
        try:
            return function()
        except SystemExit as error:
            raise CommandError(messages[-1].strip() if messages else "the program ends") from error


def parse(script: str, arguments: list[str]) -> argparse.Namespace:
    """What a script's own parser makes of the arguments.

    Raises:
        CommandError: it refuses them.
    """
    if script == "train_net.py":
        return _parse(lambda: argument_parser().parse_args(arguments))
    module = _script(script)
    if hasattr(module, "parse_arguments"):
        return _parse(lambda: module.parse_arguments(arguments))
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: object = None, namespace: object = None) -> None:
        raise _Parsed(original(self, arguments))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            _parse(module.main)
        except _Parsed as parsed:
            return parsed.arguments
    raise CommandError(f"{script} parses no arguments")


@functools.cache
def _config(name: str) -> CfgNode:
    return load_config(name)


def _check_config(arguments: argparse.Namespace, own_files: set[str]) -> None:
    name = getattr(arguments, "config_file", None) or getattr(arguments, "config", None) or ""
    # A run's own config, or one of the page, is not there yet.
    absent = name in own_files or "..." in name or "<" in name or name.startswith("output/") or name == "config.yaml"
    if name and not absent:
        find_config(name)
    options = list(getattr(arguments, "opts", None) or [])
    pairs = [pair for pair in zip(options[::2], options[1::2], strict=True) if pair[1] != "..."]
    if pairs:
        cfg = _config("" if absent else name).clone()
        merge_options(cfg, [word for pair in pairs for word in pair])


def own_file(folder: Path, name: str, text: str) -> None:
    """Writes a block that is a file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
