"""What turns the registry's Detectron2 0.5 source archive into a wheel that runs on today's packages.

The archive holds the official v0.5 Python sources without the compiled operators. Each substitution below is one
reason why those sources do not run as they are. Every one must match exactly as often as it says, so that another
archive, or a forgotten change, fails the build instead of producing something that nobody has looked at.
"""

from __future__ import annotations

from pathlib import Path

import substitution
from substitution import Substitution
from substitution import literal as _literal

REQUIREMENT = "detectron2-cdo==0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"


def _numpy_aliases() -> list[Substitution]:
    """``np.bool`` and its kin left numpy in 1.24; the builtins that they were aliases of took their place."""
    uses = {
        "data/build.py": 2,
        "data/datasets/pascal_voc.py": 1,
        "evaluation/pascal_voc_evaluation.py": 2,
        "evaluation/sem_seg_evaluation.py": 7,
        "structures/masks.py": 2,
        "utils/video_visualizer.py": 1,
        "utils/visualizer.py": 3,
    }
    pattern = r"\bnp\.(bool|int|float|str|object)\b"
    return [
        Substitution("numpy aliases gone since 1.24", f"detectron2/{file}", pattern, r"\1", n)
        for file, n in uses.items()
    ]


def _metadata() -> list[Substitution]:
    why = "a wheel called detectron2, without compiled operators, whose requirements can be met today"
    setup = "setup.py"
    return [
        _literal(why, setup, 'name="detectron2_cdo"', 'name="detectron2"'),
        _literal(why, setup, "    ext_modules=get_extensions(),\n", ""),
        _literal(why, setup, '        "fvcore>=0.1.5,<0.1.6",', '        "fvcore>=0.1.5",'),
        _literal(why, setup, '        "iopath>=0.1.7,<0.1.10",', '        "iopath>=0.1.7",'),
        _literal(why, setup, '        "black==21.4b2",', '        "black",'),
        Substitution(why, setup, r'        "(future|pydot)", .*\n', "", 2),
        Substitution(
            "the archive holds the model zoo's configs where they belong, not where setup.py looks for them",
            setup,
            r"config_paths = glob\.glob\([^+]*\+ glob\.glob\([^)]*\)",
            'config_paths = [path.relpath(f, "detectron2/model_zoo") for suffix in ("yaml", "py") '
            'for f in glob.glob(f"detectron2/model_zoo/configs/**/*.{suffix}", recursive=True)]',
        ),
    ]


def _launch() -> list[Substitution]:
    why, file = "launch insists on CUDA; a CPU-only machine has GLOO", "detectron2/engine/launch.py"
    return [
        _literal(
            why,
            file,
            '    assert torch.cuda.is_available(), "cuda is not available. Please check your installation."\n',
            "    has_gpu = torch.cuda.is_available()\n",
        ),
        _literal(why, file, 'backend="NCCL",', 'backend="NCCL" if has_gpu else "GLOO",'),
        _literal(
            why,
            file,
            "    assert num_gpus_per_machine <= torch.cuda.device_count()\n    torch.cuda.set_device(local_rank)\n",
            "    if has_gpu:\n"
            "        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
            "        torch.cuda.set_device(local_rank)\n",
        ),
    ]


SUBSTITUTIONS: list[Substitution] = [
    *_numpy_aliases(),
    *_metadata(),
    *_launch(),
    _literal(
        "Image.LINEAR left Pillow in version 10",
        "detectron2/data/transforms/transform.py",
        "Image.LINEAR",
        "Image.BILINEAR",
    ),
    _literal(
        "pkg_resources left setuptools in version 81",
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "",
    ),
    _literal(
        "pkg_resources left setuptools in version 81",
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
    ),
    _literal(
        "Caffe2 left PyTorch; what else detectron2.export offers stays usable",
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ModuleNotFoundError:  # Caffe2\n    pass\n",
    ),
    _literal(
        "schedulers of torch derive from LRScheduler since 2.0, and a resumed run must restore them",
        "detectron2/engine/hooks.py",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        2,
    ),
]

# The archive has no layers/csrc. Importing the names is harmless, calling one says what to do.
OPERATOR_STUB = '''\
"""Stands where Detectron2's compiled operators would be: this installation has none."""


def get_compiler_version():
    return "not compiled"


def get_cuda_version():
    return "not compiled"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"detectron2._C.{name}: this Detectron2 was installed without compiled operators. Use torchvision's operator "
        "of the same purpose, or install Detectron2 from its GitHub source."
    )
'''


def apply(source: Path) -> None:
    """Makes the unpacked archive at ``source`` ready to be built.

    Raises:
        PatchError: a substitution does not match as often as it must. Discard the tree then.
    """
    substitution.apply(SUBSTITUTIONS, source)
    (source / "detectron2" / "_C.py").write_text(OPERATOR_STUB, encoding="utf-8")
