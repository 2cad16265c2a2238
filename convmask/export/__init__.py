"""Programs of one image, with tensors in and out, that run without this code: ``torch.export`` and ONNX."""

from .wrapper import ExportError, ExportWrapper, register_export, wrap

__all__ = ["ExportError", "ExportWrapper", "register_export", "wrap"]
