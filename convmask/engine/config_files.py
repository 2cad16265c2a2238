"""Reading a config by path or by name, and merging the command line into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import detectron2
import yaml
from detectron2.config import CfgNode

from convmask.config import get_cfg
from convmask.engine.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_CLONE = _PACKAGE.parent
# An installed Detectron2 has its configs in the package, a checkout beside it.
_DETECTRON2 = Path(detectron2.__file__).resolve().parent
_ZOO = (_DETECTRON2 / "model_zoo" / "configs", _DETECTRON2.parent / "configs")


def configs_folder() -> Path:
    """The folder ``configs``: in the package where ConvMask is installed from a wheel, beside it in a clone."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _CLONE / "configs"


def find_config(name: str) -> str:
    """The path of a config.

    Args:
        name: a file, a path below this repository or its ``configs`` folder (``"quick/panoptic_fpn_synthetic.yaml"``),
            or a name of Detectron2's model zoo (``"COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"``).

    Raises:
        ConfigError: there is none.
    """
    ours = configs_folder()
    for path in (Path(name).expanduser(), ours.parent / name, ours / name, *(zoo / name for zoo in _ZOO)):
        if path.is_file():
            return str(path)
    raise ConfigError(f"no config file {name!r}: it is neither a file nor a name of Detectron2's model zoo")


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config and merges ``opts`` into it.

    Tags in the yaml that would execute code are refused.

    Args:
        config_file: see :func:`find_config`; empty for the defaults.
        opts: ``KEY VALUE KEY VALUE ...``

    Returns:
        The config, not frozen.

    Raises:
        ConfigError: no such file, not yaml, an unknown key, or a value of another type.
    """
    cfg = get_cfg()
    if config_file:
        path = find_config(config_file)
        try:
            cfg.merge_from_file(path, allow_unsafe=False)
        except (yaml.YAMLError, KeyError, ValueError, AssertionError, AttributeError) as error:
            raise ConfigError(f"config file {path}: {_text(error)}") from error
    merge_options(cfg, opts)
    return cfg


def merge_options(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merges ``KEY VALUE KEY VALUE ...`` into ``cfg``, in place.

    Raises:
        ConfigError: an odd number of words, an unknown key, or a value of another type.
    """
    if len(opts) % 2:
        raise ConfigError(f"options come in pairs, KEY VALUE, but there are {len(opts)} words: {' '.join(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, AttributeError) as error:
            raise ConfigError(f"option {key} {value}: {_text(error)}") from error


def _text(error: Exception) -> str:
    # str() of a KeyError puts quotes around the message.
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
