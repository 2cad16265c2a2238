"""The viewer's page in a headless Chromium, with a model of random weights."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the optional package gradio is not installed")

# Milliseconds; generous, for machines with other work to do.
PATIENCE = 120_000


@pytest.fixture
def address(
    script: Callable[[str], ModuleType], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Where the page is served."""
    app = script("app")
    for name, value in {**app.SETTINGS, "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}.items():
        monkeypatch.setitem(os.environ, name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", f"tiny={model_folder}", "--port", str(port), "--max-megabytes", "0.5", "--opts"]
    args = app.parse_arguments([*arguments, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"])
    page = app.build(args)
    yield app.serve(page, args, wait=False)
    page.blocks.close(verbose=False)


def _status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def _upload(address: str, size: int) -> int:
    """Hands in a file without the page, as a program would; returns the status."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(size)
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return _status(urllib.request.Request(f"{address}gradio_api/upload", body, headers))


def test_the_server_keeps_to_itself(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    # on no other address of this machine
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(10)
        other.connect(("127.0.0.2", port))
    assert _upload(address, 1000) == 200
    assert _upload(address, 600_000) == 413
    assert _status(urllib.request.Request(address, headers={"Host": f"evil.example:{port}"})) == 400
    secret = urllib.request.Request(f"{address}gradio_api/file={Path(__file__).resolve()}")
    assert _status(secret) in (403, 404)


@pytest.mark.slow
def test_an_image_its_results_and_a_threshold(address: str, chromium: Any, tmp_path: Path) -> None:
    photo, broken = tmp_path / "photo.png", tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 96, 3), dtype=np.uint8)).save(photo)
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))

    page.goto(address)
    page.locator("#score input[type=number]").fill("0")
    page.locator("#score input[type=number]").press("Enter")
    page.locator("#upload input[type=file]").set_input_files(photo)
    masks = page.locator("img[alt='objects of tiny']")
    masks.wait_for()
    # 96 x 60 pixels, enlarged by 5
    assert masks.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [480, 300]
    assert "photo.png, 96 x 60" in page.inner_text("#image")
    page.get_by_text("objects,").wait_for()
    page.get_by_role("tab", name="Inner pictures").click()
    page.locator("img[alt='semantic branch: confidence']").wait_for()
    page.get_by_role("tab", name="Objects").click()
    table = page.locator("table.objects tbody tr")
    table.first.wait_for()
    count = table.count()
    assert 0 < count <= 100
    assert table.first.locator("td").first.inner_text() == "tiny"

    page.locator("#score input[type=number]").fill("1")
    page.locator("#score input[type=number]").press("Enter")
    page.get_by_text("No objects.").wait_for()
    assert table.count() == 0
    page.get_by_role("tab", name="Masks").click()
    page.get_by_text("0 objects,").wait_for()

    page.locator("#upload").get_by_role("button", name="Clear").first.click()
    page.locator("#upload input[type=file]").set_input_files(broken)
    page.get_by_text("broken.png is no image that can be read").wait_for()
    assert masks.count() == 0

    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []
    assert errors == []
