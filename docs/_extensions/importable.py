"""References in docstrings are right if they can be imported.

Sphinx knows the names that the pages document. Docstrings also name internal functions, and those of other packages,
whose pages are not here: they become plain code. A name that is nowhere is a warning, which fails `make docs`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

from docutils import nodes
from docutils.utils import get_source_line
from sphinx.addnodes import desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

DOCSTRING_OF = re.compile(r"docstring of ([\w.]+)")


def find(name: str) -> object | None:
    """The object with a dotted name, or None."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: object = importlib.import_module(".".join(words[:length]))
            for word in words[length:]:
                found = getattr(found, word)
        except (ImportError, AttributeError, ValueError):
            continue
        return found
    return None


def scopes(node: pending_xref) -> Iterator[str]:
    """Where the name may be meant: as it stands, then from the docstring outwards, then where its class is defined."""
    yield ""
    place = get_source_line(node)[0] or ""
    inside = DOCSTRING_OF.search(place)
    if inside:
        words = inside.group(1).split(".")
        yield from (".".join(words[:length]) for length in range(len(words), 0, -1))
    module, owner = node.get("py:module"), node.get("py:class")
    signature = node.parent
    while signature is not None and not isinstance(signature, desc_signature):
        signature = signature.parent
    if signature is not None:  # types of its arguments are named as in the module that defines it
        module, owner = signature.get("module"), signature.get("fullname")
    if module:
        yield module
        if owner:
            yield f"{module}.{owner}"
            yield getattr(find(f"{module}.{owner}"), "__module__", module)


def accept(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Leaves a Python name that exists, and has no page, as it is written."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    exists = any(find(f"{scope}.{target}".lstrip(".")) is not None for scope in scopes(node))
    return content if exists else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the check."""
    app.connect("missing-reference", accept)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
