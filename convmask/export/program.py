"""From a wrapper to a ``torch.export`` program, and from that to ONNX."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .wrapper import ExportError, ExportWrapper, Size

# Where sizes are not fixed, sides are multiples of this, from the wrapper's ``least_side`` to the greatest.
STEP = 32
GREATEST_SIDE = 2048
DEFAULT_OPSET = 18
# Of the operators that ONNX has.
_STANDARD_DOMAINS = ("", "ai.onnx")

Runner = Callable[[torch.Tensor], dict[str, np.ndarray]]


def check_requirements(formats: Iterable[str], running: bool = False) -> None:
    """Makes sure that what an export needs is there.

    Args:
        formats: of "pt2" and "onnx".
        running: ONNX files will be run too.

    Raises:
        ExportError: torch is too old, or a package is missing; the message names the version or the command.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    for format_ in formats:
        # scan, which repeats the merging for each instance, has been exported since these versions
        needed = {"pt2": (2, 7), "onnx": (2, 9)}[format_]
        if version < needed:
            text = ".".join(map(str, needed))
            raise ExportError(f"--format {format_} needs torch {text} or later; this is {torch.__version__}")
        packages = {"pt2": [], "onnx": ["onnx", "onnxscript", *(["onnxruntime"] if running else [])]}[format_]
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(
                f"--format {format_} needs {', '.join(missing)}: pip install --no-build-isolation -e '.[export]'"
            )


@torch.no_grad()
def export_program(wrapper: ExportWrapper, size: Size, dynamic: bool = False) -> Any:
    """The ``torch.export.ExportedProgram`` of a wrapper, which holds no operator of ours.

    Args:
        wrapper: on the CPU.
        size: height and width of the images; where ``dynamic``, an example.
        dynamic: sides are any multiples of ``STEP`` from ``wrapper.least_side`` to ``GREATEST_SIDE``.

    Raises:
        ExportError: a step of the model cannot be exported, or only with a fixed size.
    """
    height, width = size
    dynamic_shapes = None
    if dynamic:
        # sides that are equal, or have few cells, would become conditions of the program
        height, width = (max(wrapper.least_side, round(side / STEP) * STEP) for side in size)
        width += STEP * (height == width)
        least, most = wrapper.least_side // STEP, GREATEST_SIDE // STEP
        rows, columns = (torch.export.Dim(name, min=least, max=most) for name in ("rows", "columns"))
        dynamic_shapes = {"image": {1: STEP * rows, 2: STEP * columns}}
    image = torch.rand(3, height, width) * 255
    with _quiet():
        try:
            program = torch.export.export(wrapper, (image,), dynamic_shapes=dynamic_shapes, strict=False)
            program = program.run_decompositions({})
        except Exception as error:
            # many kinds of errors, of which the first line says what is wrong
            reason = _first_line(error)
            hint = "; with fixed sizes (--size H W, without --dynamic) it may be possible" if dynamic else ""
            raise ExportError(f"torch.export cannot export {type(wrapper.model).__name__}: {reason}{hint}") from error
    foreign = sorted({str(node.target) for node in program.graph.nodes if "convmask" in str(node.target)})
    if foreign:
        raise ExportError(f"the program would need operators of ConvMask: {', '.join(foreign)}")
    return program


def program_bytes(program: Any) -> bytes:
    """The content of a .pt2 file."""
    stream = io.BytesIO()
    with _quiet():
        torch.export.save(program, stream)
    return stream.getvalue()


def onnx_bytes(program: Any, outputs: Sequence[str], opset: int = DEFAULT_OPSET) -> bytes:
    """The content of an ONNX file of a program, of standard operators alone.

    Args:
        program: see :func:`export_program`.
        outputs: their names, in order.
        opset: version of the operators.

    Raises:
        ExportError: an operator has no counterpart in ONNX.
    """
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=list(outputs),
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"torch.onnx cannot convert the program: {_first_line(error)}") from error
    model = converted.model_proto
    functions = {(function.domain, function.name) for function in model.functions}
    used = {
        f"{node.domain}::{node.op_type}"
        for node in _nodes(model.graph)
        if node.domain not in _STANDARD_DOMAINS and (node.domain, node.op_type) not in functions
    }
    if used:
        raise ExportError(f"the ONNX file would need operators that are not of ONNX: {', '.join(sorted(used))}")
    content: bytes = model.SerializeToString()
    return content


def program_runner(content: bytes) -> Runner:
    """Runs the content of a .pt2 file."""
    with _quiet():
        module = torch.export.load(io.BytesIO(content)).module()

    def run(image: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.no_grad(), _errors_of_running("the program", image):
            return {name: value.numpy() for name, value in module(image).items()}

    return run


def onnx_runner(content: bytes, outputs: Sequence[str]) -> Runner:
    """Runs the content of an ONNX file on the CPU, by onnxruntime.

    Raises:
        ExportError: onnxruntime has not all of its operators.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load it: {_first_line(error)}") from error

    def run(image: torch.Tensor) -> dict[str, np.ndarray]:
        with _errors_of_running("the ONNX file", image):
            return dict(zip(outputs, session.run(list(outputs), {"image": image.numpy()}), strict=True))

    return run


@contextmanager
def _errors_of_running(what: str, image: torch.Tensor) -> Iterator[None]:
    """Conditions of a program that an image does not meet become an ExportError."""
    try:
        yield
    except Exception as error:
        size = " x ".join(map(str, image.shape[1:]))
        raise ExportError(f"{what} fails on an image of {size}: {_first_line(error)}") from error


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """``torch.sort`` in ONNX, whose TopK puts the first of equal values first."""
    import onnxscript

    op: Any = onnxscript.opset18
    length = op.Reshape(op.Gather(op.Shape(self), dim, axis=0), op.Constant(value_ints=[1]))
    return op.TopK(self, length, axis=dim, largest=descending, sorted=True)


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of those inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None and "Failed to" in str(error) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'without a message'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice and warnings of the exporters, which are for those who write them."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._export", "torch._dynamo")
    levels = {name: logging.getLogger(name).level for name in names}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        # attention in one operator that no exporter knows
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
