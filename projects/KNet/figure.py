#!/usr/bin/env python
"""Draws what the kernels of each round attend to for one image.

    python projects/KNet/figure.py --config-file configs/quick/knet_panoptic_synthetic.yaml \
        --weights output/knet_panoptic_synthetic/model_final.pth --output figure.png

The columns are the first kernels and the rounds, the rows the kernels with the best scores of the last round. Each cell
is the image where the kernel's mask has a probability of one half and more, dark elsewhere: the pixels that it gathers
features from in the next round. The image is of DATASETS.TEST, or a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts
from convmask.data.images import read_image
from convmask.data.loader import build_test_loader
from convmask.projects.knet.inference import Frame, full_size, merge_scores

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_GAP = 6
_CAPTION = 18
# How bright the pixels outside of a mask are.
_OUTSIDE = 0.25


def attended(image: Picture, probability: torch.Tensor) -> Picture:
    """The image (H, W, 3), dark where the probability (H, W) is below one half."""
    inside = (probability.numpy() >= 0.5)[..., None]
    return np.where(inside, image, (image * _OUTSIDE)).astype(np.uint8)


def captioned(picture: Picture, text: str) -> Picture:
    """The picture with a line of text above it."""
    strip = np.full((_CAPTION, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (1, _CAPTION - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])


def grid(rows: list[list[Picture]]) -> Picture:
    """Pictures of one size, in rows and columns, with white gaps."""
    lines = []
    for row in rows:
        padded = [np.pad(x, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for x in row]
        lines.append(np.concatenate(padded, axis=1))
    return np.concatenate(lines)


@torch.no_grad()
def draw(model: Any, inputs: dict[str, Any], names: list[str], rows: int, size: int) -> Picture:
    """The figure (RGB) for one image of a KNet detector.

    Args:
        model: an instance or panoptic KNet in evaluation mode.
        inputs: Detectron2's dict of one image.
        names: of thing classes, then of stuff classes.
        rows: kernels that are drawn.
        size: shorter side of each picture, in pixels.
    """
    images = model.preprocess_image([inputs])
    outputs, rounds = model.predict(images.tensor)
    height, width = (int(x) for x in images.image_sizes[0])
    scale = size / min(height, width)
    shown = round(height * scale), round(width * scale)
    frame = Frame((images.tensor.shape[2], images.tensor.shape[3]), (height, width), shown)
    image = inputs["image"].permute(1, 2, 0).numpy()
    if model.input_format == "BGR":
        image = image[..., ::-1]
    resized = cv2.resize(np.ascontiguousarray(image), shown[::-1], interpolation=cv2.INTER_LINEAR)
    image = resized.astype(np.uint8)

    scores, labels = merge_scores(rounds[-1].class_logits[0].sigmoid().cpu(), model.kernel_head.num_thing_classes)
    best = scores.argsort(descending=True)[:rows]
    stages = [outputs.start, *rounds]
    columns = []
    for stage in stages:
        chunks = full_size(stage.mask_logits[0, best].cpu(), 1, frame, 2**24)
        columns.append(torch.cat([x for _, x in chunks]))
    titles = ["first kernels", *(f"round {number}" for number in range(1, len(rounds) + 1))]
    table = []
    for row, kernel in enumerate(best.tolist()):
        cells = [captioned(image, "image" if row == 0 else "")]
        for stage, (title, masks) in enumerate(zip(titles, columns, strict=True)):
            text = title if row == 0 else ""
            if stage == len(titles) - 1:
                text = f"{names[labels[kernel]]} {scores[kernel]:.2f}" if row else f"{title}: {names[labels[kernel]]}"
            cells.append(captioned(attended(image, masks[row]), text))
        table.append(cells)
    return grid(table)


def main(arguments: list[str] | None = None) -> None:
    """Reads the arguments, draws, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="of an instance or panoptic KNet")
    parser.add_argument("--weights", required=True, help="any that MODEL.WEIGHTS takes")
    parser.add_argument("--output", required=True, help="the picture to write, .png or .jpg")
    parser.add_argument("--image", help="a file; by default an image of DATASETS.TEST is taken")
    parser.add_argument("--index", type=int, default=0, help="which image of DATASETS.TEST")
    parser.add_argument("--rows", type=int, default=6, help="kernels that are drawn")
    parser.add_argument("--size", type=int, default=128, help="shorter side of each picture, in pixels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the config")
    args = parser.parse_args(arguments)
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, *args.opts])
    if cfg.MODEL.META_ARCHITECTURE != "KNet" or cfg.MODEL.KNET.TASK == "semantic":
        parser.error(f"{args.config_file} is no instance or panoptic KNet")
    set_class_counts(cfg)
    model = build_model(cfg).eval()
    Checkpointer(model, policy="strict").load(args.weights)
    if args.image:
        picture = read_image(args.image, cfg.INPUT.FORMAT)
        inputs = {"image": torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))}
    else:
        inputs = build_test_loader(cfg, cfg.DATASETS.TEST[0]).dataset[args.index]
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    # stuff class 0 is "things"
    names = [*metadata.thing_classes, *metadata.get("stuff_classes", ["things"])[1:]]
    figure = draw(model, inputs, names, args.rows, args.size)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(args.output, figure[..., ::-1]):
        parser.error(f"{args.output} cannot be written")
    print(f"{args.output}: {figure.shape[1]} x {figure.shape[0]} pixels")


if __name__ == "__main__":
    main()
