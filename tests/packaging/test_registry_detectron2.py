from __future__ import annotations

import compileall
import re
import subprocess
from pathlib import Path
from types import ModuleType

import provide
import pytest
import registry_detectron2
from substitution import PatchError

SETUP = """\
    name="detectron2_cdo",
    ext_modules=get_extensions(),
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10",
        "future",  # used by caffe2
        "pydot",  # used to save caffe2 SVGs
        "black==21.4b2",
config_paths = glob.glob("configs/**/*.yaml", recursive=True) + glob.glob(
        "configs/**/*.py", recursive=True
    )
"""
LAUNCH = """\
    assert torch.cuda.is_available(), "cuda is not available. Please check your installation."
            backend="NCCL",
    assert num_gpus_per_machine <= torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
"""
MODEL_ZOO = """\
import pkg_resources
    file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
"""
HOOKS = "torch.optim.lr_scheduler._LRScheduler\n" * 2


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The lines of the unpacked archive that the substitutions are about."""
    files = {
        "setup.py": SETUP,
        "detectron2/engine/launch.py": LAUNCH,
        "detectron2/engine/hooks.py": HOOKS,
        "detectron2/model_zoo/model_zoo.py": MODEL_ZOO,
        "detectron2/data/transforms/transform.py": "interp=Image.LINEAR\n",
        "detectron2/export/__init__.py": "from .api import *\n",
    }
    for substitution in registry_detectron2.SUBSTITUTIONS:
        if "numpy" in substitution.why:
            files[substitution.file] = "x = np.bool, np.boolean\n" * substitution.count
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_substitution_does_what_it_is_for(archive: Path) -> None:
    registry_detectron2.apply(archive)
    setup = (archive / "setup.py").read_text()
    assert 'name="detectron2",' in setup and "ext_modules" not in setup
    assert '"iopath>=0.1.7",' in setup and '"black",' in setup and "pydot" not in setup
    assert "pkg_resources" not in (archive / "detectron2/model_zoo/model_zoo.py").read_text()
    assert "x = bool, np.boolean" in (archive / "detectron2/structures/masks.py").read_text()
    assert "Image.BILINEAR" in (archive / "detectron2/data/transforms/transform.py").read_text()
    assert '"NCCL" if has_gpu else "GLOO"' in (archive / "detectron2/engine/launch.py").read_text()


@pytest.mark.parametrize("index", range(len(registry_detectron2.SUBSTITUTIONS)))
def test_another_archive_is_refused(archive: Path, index: int) -> None:
    substitution = registry_detectron2.SUBSTITUTIONS[index]
    path = archive / substitution.file
    path.write_text(re.sub(substitution.pattern, "", path.read_text(), flags=re.MULTILINE))
    with pytest.raises(PatchError, match=re.escape(substitution.file)):
        registry_detectron2.apply(archive)
    assert not (archive / "detectron2/_C.py").exists()


@pytest.fixture
def operator_stub() -> ModuleType:
    module = ModuleType("detectron2._C")
    exec(registry_detectron2.OPERATOR_STUB, module.__dict__)
    return module


def test_stub_of_the_operators_says_what_to_do(operator_stub: ModuleType) -> None:
    with pytest.raises(
        AttributeError, match=r"_C\.deform_conv_forward: .* Use torchvision's operator .* GitHub source"
    ):
        operator_stub.deform_conv_forward()


def test_stub_of_the_operators_answers_questions_about_itself(operator_stub: ModuleType) -> None:
    assert operator_stub.get_compiler_version() == operator_stub.get_cuda_version() == "not compiled"
    assert operator_stub.has_cuda() is False
    assert not hasattr(operator_stub, "__path__")


@pytest.mark.slow
def test_the_archive_of_the_registry_is_the_one_the_substitutions_are_for(tmp_path: Path) -> None:
    try:
        archive = provide.download(registry_detectron2.REQUIREMENT, registry_detectron2.SHA256, tmp_path)
    except (provide.ProvideError, subprocess.SubprocessError):
        pytest.skip("the package index cannot be reached")
    provide.unpack(archive, tmp_path)
    (source,) = tmp_path.glob("detectron2_cdo-*")
    registry_detectron2.apply(source)
    assert compileall.compile_dir(source / "detectron2", quiet=1)
    left = [p for p in source.glob("detectron2/**/*.py") if re.search(r"\bnp\.(bool|int|float)\b", p.read_text())]
    assert left == []
