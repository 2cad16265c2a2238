"""Installs ConvMask. Not in pyproject.toml: methods and configs outside the package, and the compiled operators."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # a PEP 517 build does not put the project's folder on the path

from build_extension import extension_arguments  # noqa: E402

PROJECTS = {
    f"convmask.projects.{p.parent.name}": str(p.parent.relative_to(ROOT)) for p in ROOT.glob("projects/*/*/__init__.py")
}

# In a wheel; a clone's configs are found where they are (convmask.engine.config_files).
CONFIGS = {"convmask.configs": "configs"}

setup(
    packages=find_packages(include=["convmask", "convmask.*"]) + list(PROJECTS) + list(CONFIGS),
    package_dir=PROJECTS | CONFIGS,
    package_data={"convmask.configs": ["*/*.yaml", "*/*.json", "*/*.py"], "convmask.comparison": ["*.j2"]},
    **extension_arguments(),
)
