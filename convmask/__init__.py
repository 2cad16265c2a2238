"""ConvMask: fully convolutional segmentation as an extension of Detectron2."""

from __future__ import annotations

from convmask.utils.requirements import check_detectron2, reporting_the_environment

__version__ = "0.1.0"

if not reporting_the_environment():
    check_detectron2()


def register_all() -> list[str]:
    """Imports every method that is present, which registers its parts with Detectron2.

    Returns:
        Their module names below ``convmask.projects``, sorted.
    """
    from convmask import projects

    names = projects.available()
    for name in names:
        projects.load(name)
    return names
