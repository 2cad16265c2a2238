"""Installs ConvMask. What is not in pyproject.toml: the methods' folders outside the package."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PROJECTS = {
    f"convmask.projects.{p.parent.name}": str(p.parent.relative_to(ROOT)) for p in ROOT.glob("projects/*/*/__init__.py")
}

setup(packages=find_packages(include=["convmask", "convmask.*"]) + list(PROJECTS), package_dir=PROJECTS)
