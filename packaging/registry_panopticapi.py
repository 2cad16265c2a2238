"""What turns the registry's panopticapi-lite into a wheel called panopticapi that ``pip check`` is content with.

Its code is untouched. Its metadata caps numpy below 2, though the code runs on numpy 2, and asks for packages that the
code never imports.
"""

from __future__ import annotations

from pathlib import Path

from substitution import Substitution, apply

REQUIREMENT = "panopticapi-lite==0.2.0"
SHA256 = "58d3ffa842a72240162e7fa744c602a0a5320baabbdb3295d770374f4639b486"

NAME = "panopticapi"
SUBSTITUTIONS = [
    Substitution("the name that it is imported by", "METADATA", r"^Name: panopticapi-lite$", f"Name: {NAME}"),
    Substitution(
        "it runs on numpy 2", "METADATA", r"^Requires-Dist: numpy<2\.0\.0,>=1\.23\.5$", "Requires-Dist: numpy"
    ),
    Substitution(
        "never imported",
        "METADATA",
        r"^Requires-Dist: (matplotlib|pycocotools|scikit-image|platformdirs).*\n",
        "",
        4,
    ),
]


def rewrite_metadata(unpacked: Path) -> None:
    """Applies :data:`SUBSTITUTIONS` to the unpacked wheel and renames its ``dist-info`` folder.

    The old RECORD, which lists the files under their old names, is deleted: packing the wheel writes one afresh.

    Raises:
        PatchError: a substitution does not match as often as it must.
    """
    (info,) = unpacked.glob("*.dist-info")
    apply(SUBSTITUTIONS, info)
    (info / "RECORD").unlink()
    info.rename(unpacked / info.name.replace("panopticapi_lite", NAME))
