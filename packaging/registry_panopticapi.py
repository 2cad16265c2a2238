"""What turns the registry's panopticapi-lite into a wheel called panopticapi that ``pip check`` is content with.

Its code is untouched. Its metadata caps numpy below 2, though the code runs on numpy 2, and asks for packages that the
code never imports.
"""

from __future__ import annotations

import re
from pathlib import Path

REQUIREMENT = "panopticapi-lite==0.2.0"
SHA256 = "58d3ffa842a72240162e7fa744c602a0a5320baabbdb3295d770374f4639b486"

NAME = "panopticapi"
SUBSTITUTIONS: list[tuple[str, str, int]] = [
    (r"^Name: panopticapi-lite$", f"Name: {NAME}", 1),
    (r"^Requires-Dist: numpy<2\.0\.0,>=1\.23\.5$", "Requires-Dist: numpy", 1),
    (r"^Requires-Dist: (matplotlib|pycocotools|scikit-image|platformdirs).*\n", "", 4),
]


def rewrite_metadata(unpacked: Path) -> None:
    """Applies :data:`SUBSTITUTIONS` to the unpacked wheel and renames its ``dist-info`` folder.

    Raises:
        RuntimeError: a substitution does not match as often as it must.
    """
    (info,) = unpacked.glob("*.dist-info")
    metadata = info / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    for pattern, replacement, count in SUBSTITUTIONS:
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if found != count:
            raise RuntimeError(f"METADATA of {REQUIREMENT}: {pattern!r} matched {found} times instead of {count}")
    metadata.write_text(text, encoding="utf-8")
    (info / "RECORD").unlink()
    info.rename(unpacked / info.name.replace("panopticapi_lite", NAME))
