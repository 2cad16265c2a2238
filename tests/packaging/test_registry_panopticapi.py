from __future__ import annotations

from pathlib import Path

import pytest
import registry_panopticapi
from substitution import PatchError

METADATA = """\
Metadata-Version: 2.4
Name: panopticapi-lite
Version: 0.2.0
Requires-Dist: matplotlib>=3.9.2
Requires-Dist: numpy<2.0.0,>=1.23.5
Requires-Dist: pillow>=10.4.0
Requires-Dist: platformdirs>=4.3.6
Requires-Dist: pycocotools>=2.0.8
Requires-Dist: scikit-image>=0.24.0

Text about Requires-Dist: matplotlib that is no header.
"""


def unpacked_wheel(folder: Path, metadata: str) -> Path:
    info = folder / "panopticapi_lite-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata)
    (info / "RECORD").write_text("panopticapi/__init__.py,,\n")
    return folder


def test_metadata_gets_the_name_and_the_requirements_of_the_code(tmp_path: Path) -> None:
    registry_panopticapi.rewrite_metadata(unpacked_wheel(tmp_path, METADATA))
    (info,) = tmp_path.glob("*.dist-info")
    assert info.name == "panopticapi-0.2.0.dist-info"
    headers = (info / "METADATA").read_text().partition("\n\n")[0].splitlines()
    assert "Name: panopticapi" in headers
    assert [line for line in headers if line.startswith("Requires-Dist")] == [
        "Requires-Dist: numpy",
        "Requires-Dist: pillow>=10.4.0",
    ]
    assert not (info / "RECORD").exists()


def test_other_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="numpy"):
        registry_panopticapi.rewrite_metadata(unpacked_wheel(tmp_path, METADATA.replace("<2.0.0,", "")))
