"""What every exported model is: one image to named tensors, with no list of dicts and no ``Instances``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from convmask.inference.augmentation import TestTimeAugmentation

Size = tuple[int, int]
Outputs = dict[str, torch.Tensor]

# What each output is; N, the number of rows, is fixed when the program is made.
INSTANCES = {
    "boxes": "(N, 4) float32: x1, y1, x2, y2 in pixels of the image, right and bottom excluded",
    "scores": "(N,) float32, 0 to 1; 0 in rows that are not valid",
    "classes": "(N,) int64: index among the thing classes; -1 in rows that are not valid",
    "masks": "(N, H, W) bool; empty in rows that are not valid",
    "valid": "(N,) bool: whether the row is an instance; instances come first",
}
SEM_SEG = {"sem_seg": "(C, H, W) float32: {what} of each semantic label; the label of a pixel is the argmax"}
PANOPTIC = {
    "panoptic_seg": "(H, W) int32: the segment of each pixel, 0 for none",
    "thing_ids": "({rows},) int64: the segment of each {row}, 0 for none",
    "stuff_ids": "(S + 1,) int64: the segment of each stuff category 1 to S, 0 for none; entry 0 is not used",
}


class ExportError(ValueError):
    """A model, or a part of it, that cannot be exported; the message says which and why."""


class ExportWrapper(nn.Module):
    """A model of Detectron2's interface as a function of one image.

    The forward has no operator of ours and no size that depends on the data, so that it can be exported: instances are
    in a fixed number of rows, of which some are not valid. Results are at the size of the image; what scales images
    before, and results to another size after, stays outside.

    Attributes:
        outputs: what each output is, in their order.
        inside: steps that the program has in it, in words.
        outside: what it leaves to the caller, with the reason.
    """

    inside: tuple[str, ...] = ()
    outside: tuple[str, ...] = (
        "resizing the image to the network's size, and results to another size (both depend on libraries and wishes)",
    )

    def __init__(self, model: nn.Module) -> None:
        """Takes the model, in evaluation mode from now on."""
        super().__init__()
        self.model = model.eval()
        self.outputs: dict[str, str] = {}
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, getattr(model, name).detach().clone().view(-1, 1, 1), persistent=False)

    @property
    def divisibility(self) -> int:
        """Images are padded to multiples of this, as the model does."""
        return max(int(self.model.backbone.size_divisibility), 1)

    @property
    def least_side(self) -> int:
        """Of the images of a program for all sizes: a level of one cell is traced as if it never had more."""
        return max([64, *(2 * shape.stride for shape in self.model.backbone.output_shape().values())])

    def forward(self, image: torch.Tensor) -> Outputs:
        """The outputs of an image.

        Args:
            image: (3, H, W) float32 from 0 to 255, channels in the order of ``model.input_format``.
        """
        height, width = image.shape[-2:]
        images = ((image - self.pixel_mean) / self.pixel_std)[None]
        bottom, right = -height % self.divisibility, -width % self.divisibility
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        found = self.predict(images, (height, width))
        return {name: found[name] for name in self.outputs}

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """The outputs, from the normalised and padded images (1, 3, H', W') and the (height, width) without padding."""
        raise NotImplementedError


_registry: dict[str, Callable[[nn.Module], ExportWrapper]] = {}


def register_export(meta_architecture: str, wrapper: Callable[[nn.Module], ExportWrapper]) -> None:
    """Says how a meta-architecture is exported.

    Args:
        meta_architecture: name of the class, as in ``MODEL.META_ARCHITECTURE``.
        wrapper: takes the model; raises :class:`ExportError` for what it cannot export.
    """
    _registry[meta_architecture] = wrapper


def wrap(model: nn.Module) -> ExportWrapper:
    """The wrapper of a model, which is in evaluation mode then.

    Raises:
        ExportError: nothing is registered for its class, or it has parts that cannot be exported.
    """
    if isinstance(model, TestTimeAugmentation):
        raise ExportError("TEST.AUG.ENABLED: views of several sizes are not exported; switch it off")
    name = type(model).__name__
    if name not in _registry:
        raise ExportError(
            f"{name} cannot be exported: there are exports of {', '.join(sorted(_registry)) or 'nothing'}"
        )
    return _registry[name](model).eval()


def described(outputs: Mapping[str, str], **words: str) -> dict[str, str]:
    """The descriptions with the words in their places."""
    return {name: text.format(**words) for name, text in outputs.items()}


def blank_invalid(outputs: Outputs) -> Outputs:
    """The instances with nothing in rows that are not valid."""
    valid = outputs["valid"]
    blank = {
        "boxes": torch.where(valid[:, None], outputs["boxes"].float(), 0.0),
        "scores": torch.where(valid, outputs["scores"].float(), 0.0),
        "classes": torch.where(valid, outputs["classes"], -1),
        "masks": outputs["masks"] & valid[:, None, None],
    }
    return {**outputs, **blank}
