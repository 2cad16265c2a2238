from __future__ import annotations

import logging
from collections.abc import Callable

import pytest


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Everything that has been logged so far; also after another test has set up Detectron2's log."""
    for name in ("convmask", "fvcore", "detectron2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.INFO, logger=name)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)
