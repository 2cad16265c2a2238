"""Which errors are one line."""

from __future__ import annotations

import pytest

from convmask.checkpoint import CheckpointError
from convmask.data.errors import DatasetError
from convmask.engine import ConfigError, one_line_errors

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
