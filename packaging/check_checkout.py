"""Makes sure that a folder is a checkout of Detectron2 which this Python can run in place of the installed one.

python packaging/check_checkout.py <folder>
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def check(folder: str) -> str:
    """Returns the version of the Detectron2 in ``folder``.

    Raises:
        SystemExit: there is none, it cannot be imported, or Python imports another one. The message says which.
    """
    if not folder:
        sys.exit("name the checkout: make check-detectron2 SRC=<folder that holds detectron2/>")
    source = Path(folder).resolve()
    if not (source / "detectron2" / "__init__.py").is_file():
        sys.exit(f"{source} is no checkout of Detectron2: there is no detectron2/__init__.py in it")
    script = "import detectron2, detectron2.layers; print(detectron2.__file__); print(detectron2.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source.anchor)
    if done.returncode != 0:
        sys.exit(f"the Detectron2 in {source} cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    imported, version = done.stdout.split("\n")[-3:-1]
    if source not in Path(imported).resolve().parents:
        sys.exit(f"with PYTHONPATH={source}, Python imports the Detectron2 at {imported}")
    return version


if __name__ == "__main__":
    print(f"testing with Detectron2 {check(sys.argv[1] if len(sys.argv) > 1 else '')} of {sys.argv[1]}")
