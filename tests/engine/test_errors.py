"""Which errors are one line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from convmask.checkpoint import CheckpointError
from convmask.data.errors import DatasetError
from convmask.engine import ConfigError, one_line_errors
from convmask.engine.errors import errors_of_config, without_logged_tracebacks

_OF_USERS = [
    ConfigError("a wrong key"),
    DatasetError("a wrong key"),
    CheckpointError("a wrong key"),
    FloatingPointError("a wrong key"),
    FileNotFoundError("a wrong key"),
]


@pytest.mark.parametrize("error", _OF_USERS, ids=lambda error: type(error).__name__)
def test_mistakes_of_users_end_with_a_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: a wrong key\n"


def test_debug_shows_them_in_full() -> None:
    with pytest.raises(ConfigError), one_line_errors(debug=True):
        raise ConfigError("a wrong key")


def test_errors_of_the_program_pass() -> None:
    with pytest.raises(TypeError), one_line_errors():
        raise TypeError("a bug")


def test_ctrl_c_has_its_own_exit_code() -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130


def test_of_an_error_in_a_loader_process_only_the_message_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    remote = "Caught DatasetError in DataLoader worker process 0.\nTraceback:\n  frame\n"
    with pytest.raises(SystemExit), one_line_errors():
        raise DatasetError(f"{remote}convmask.data.errors.DatasetError: image 'a.png' does not exist")
    assert capsys.readouterr().err == "error: image 'a.png' does not exist\n"


def test_a_process_that_was_killed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 12345, -9, "SIGKILL")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: process 1 terminated with signal SIGKILL\n"


def test_a_process_that_has_ended_itself_has_said_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ProcessExitedException("process 1 terminated with exit code 3", 1, 12345, 3)
    assert stop.value.code == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("TASK 'x' is not one of a, b"), "the model .* this config: TASK 'x' is not one of a, b$"),
        (KeyError("p9"), r"KeyError: 'p9' \(--debug shows where\)$"),
        (AssertionError(), r": AssertionError \(--debug shows where\)$"),
    ],
)
def test_what_cannot_be_built_is_a_wrong_config(error: Exception, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught, errors_of_config("the model"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [DatasetError("a wrong file"), TypeError("a bug")], ids=lambda e: type(e).__name__)
def test_other_errors_while_building_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, errors_of_config("the model"):
        raise error
    assert caught.value is error


def test_logged_tracebacks_of_mistakes_reach_the_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("convmask.test_errors")
    file = logging.FileHandler(tmp_path / "log.txt")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(sys.stdout), file])
    monkeypatch.setattr(logger, "propagate", False)
    with without_logged_tracebacks():
        for error in (FloatingPointError("diverged"), TypeError("a bug")):
            try:
                raise error
            except Exception:
                logger.exception("Exception during training:")
    logger.error("afterwards")
    file.close()
    shown, written = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert "diverged" not in shown and "a bug" in shown and "afterwards" in shown
    assert "diverged" in written and "a bug" in written
