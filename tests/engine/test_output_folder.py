from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convmask.engine import ConfigError, argument_parser, output_folder, setup
from convmask.engine.output_folder import claim_output_folder

fcntl = pytest.importorskip("fcntl")

# Locks the folder as another run does, without importing that much.
_OTHER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("process 12 on there")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_made_and_can_be_claimed_again_by_the_same_process(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    claim_output_folder(str(folder))
    claim_output_folder(str(folder))
    assert f"process {os.getpid()} on" in (folder / output_folder.LOCK_FILE).read_text()


def test_another_run_in_the_folder_is_named_and_nothing_of_it_touched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("the other's")
    lock = tmp_path / output_folder.LOCK_FILE
    command = [sys.executable, "-c", _OTHER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"OUTPUT_DIR {tmp_path}: another run \(process 12 on there\)"):
            setup(argument_parser().parse_args(["OUTPUT_DIR", str(tmp_path)]))
        assert sorted(path.name for path in tmp_path.iterdir()) == [output_folder.LOCK_FILE, "config.yaml"]
        assert (tmp_path / "config.yaml").read_text() == "the other's"
        other.kill()
        other.wait()
    # The lock of a process that was killed is gone with it.
    claim_output_folder(str(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*/file/run: cannot be written to: Not a directory"):
        claim_output_folder(str(tmp_path / "file" / "run"))


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: str) -> None:
        raise OSError(30, os.strerror(30), path)

    monkeypatch.setattr(output_folder, "open", refuse, raising=False)
    with pytest.raises(ConfigError, match=r"cannot be written to: Read-only file system"):
        claim_output_folder(str(tmp_path / "run"))
