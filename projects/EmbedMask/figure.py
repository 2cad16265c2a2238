#!/usr/bin/env python
"""Draws the embedding space of an EmbedMask model: images, pixel embeddings as colours, and masks.

    python projects/EmbedMask/figure.py --config-file configs/quick/embed_mask_synthetic.yaml \
        --weights output/embed_mask_synthetic/model_final.pth --output projects/EmbedMask/figure.jpg

The colours are the first three principal components of the pixel embedding of each image: red, green, blue.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from convmask.checkpoint import Checkpointer
from convmask.data.loader import build_test_loader
from convmask.demo.model import demo_config
from convmask.projects.embed_mask import EmbedMask
from convmask.projects.embed_mask.heads import enlarge
from convmask.projects.embed_mask.viewer import embedding_picture
from convmask.visualization import contact_sheet, draw_prediction, save_image
from convmask.visualization.draw import default_scale
from convmask.visualization.draw import enlarge as enlarge_picture
from convmask.visualization.maps import input_picture

CAPTIONS = ("image", "pixel embedding", "masks")


@torch.no_grad()
def row(model: EmbedMask, inputs: dict, metadata: object, threshold: float) -> list[np.ndarray]:
    """The three pictures of an image."""
    images = model.preprocess_image([inputs])
    height, width = (int(side) for side in images.image_sizes[0])
    _, embeddings = model.predict(images.tensor)
    pixels = enlarge(embeddings.pixels, model.scale_factor)[0]
    padded = images.tensor.shape[2], images.tensor.shape[3]
    picture = embedding_picture(pixels, padded, (height, width), (height, width))
    image = input_picture(inputs, model.input_format)
    result = model([{**inputs, "height": height, "width": width}])[0]
    scale = default_scale(height, width)
    masks = draw_prediction(image, result, metadata, scale=scale, threshold=threshold, labels=False)
    return [enlarge_picture(image, scale), enlarge_picture(picture, scale), masks]


def main() -> None:
    """Reads the model, and draws the first images of the test set that have objects."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", default="embedding.jpg")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--threshold", type=float, default=0.15, help="least score of the masks that are drawn")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    cfg = demo_config(args.config_file, args.weights, opts=args.opts)
    model = build_model(cfg).eval()
    if not isinstance(model, EmbedMask):
        parser.error(f"{args.config_file} is no EmbedMask, but {type(model).__name__}")
    Checkpointer(model, policy="strict").load(args.weights)
    name = cfg.DATASETS.TEST[0]
    rows = []
    for index, (inputs,) in enumerate(build_test_loader(cfg, name)):
        if index >= args.first:
            rows.append(row(model, inputs, MetadataCatalog.get(name), args.threshold))
        if len(rows) == args.images:
            break
    print(save_image(args.output, contact_sheet(rows, captions=CAPTIONS)))


if __name__ == "__main__":
    main()
