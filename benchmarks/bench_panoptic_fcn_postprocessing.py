"""Everything after the heads of Panoptic FCN, against a plain implementation that follows the release.

    python benchmarks/bench_panoptic_fcn_postprocessing.py                           # head outputs that are drawn
    python benchmarks/bench_panoptic_fcn_postprocessing.py --config-file output/panoptic_fcn_nuclei/config.yaml \
        --weights output/panoptic_fcn_nuclei/model_final.pth --image nuclei.png

One image of 800 x 1333 pixels, batch 1, float32, on the CPU: with a model's weights an image is scaled to that size and
the heads run once; otherwise objects and regions are drawn in COCO's numbers of classes. The plain implementation is
`panoptic_fcn_release.py`. Each runs in a process of its own for its memory, which is the peak above what the head
outputs take and includes the results, and in turns in this one for its time; the results are compared first.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.modeling import build_model
from panoptic_fcn_release import release_kernels, release_postprocessing
from torch import Tensor
from torch.nn import functional

from convmask.benchmark import extra_memory, in_fresh_process, median_times, processor
from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.images import read_image
from convmask.projects.panoptic_fcn.heads import HeadOutputs
from convmask.projects.panoptic_fcn.meta_arch import PanopticFCN

SIZE, STRIDE = (800, 1333), 4
# the levels P3 to P7 and the encoded feature of the padded image
LEVELS, COMMON = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), (200, 336)
CLASSES, REGIONS, DIMS, OBJECTS = 80, 54, 64, 60
QUICK = Path(__file__).resolve().parents[1] / "configs" / "quick" / "panoptic_fcn_synthetic.yaml"

Case = tuple[PanopticFCN, HeadOutputs]


def from_weights(args: argparse.Namespace) -> Case:
    """A trained model, and its head outputs for the image."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *args.opts])
    model = build_model(cfg).eval()
    Checkpointer(model, policy="strict").load(args.weights)
    image = cv2.resize(read_image(args.image, cfg.INPUT.FORMAT), SIZE[::-1], interpolation=cv2.INTER_LINEAR)
    inputs = {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))}
    with torch.no_grad():
        return model, model.predict(model.preprocess_image([inputs]).tensor).of_image(0)


def drawn(args: argparse.Namespace) -> Case:
    """A small model with COCO's numbers of classes whose embeddings change nothing, and head outputs for it."""
    cfg = get_cfg()
    cfg.merge_from_file(str(QUICK))
    node = cfg.MODEL.PANOPTIC_FCN
    node.NUM_CLASSES, node.STUFF.NUM_CLASSES = CLASSES, REGIONS
    node.FEATURE_ENCODER.CONVS_DIM = node.KERNEL_HEAD.CONVS_DIM = DIMS
    node.COMBINE.STUFF_AREA_LIMIT = 4096
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *args.opts])
    model = build_model(cfg).eval()
    for layer in (model.thing_embedding, model.stuff_embedding):
        torch.nn.init.eye_(layer.weight.data.view(DIMS, DIMS))
        torch.nn.init.zeros_(layer.bias)
    return model, draw_outputs()


def draw_outputs() -> HeadOutputs:
    """Discs as objects, each with a peak on two levels, and patches of stuff.

    A kernel of a disc is its equation: the first channels of the encoded feature are 1, y, x and y^2 + x^2. In the
    second half, where the feature is 0, each object has its own direction, so that two objects are not similar.
    """
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.arange(length) / COMMON[0] for length in COMMON)
    plane = torch.stack([torch.ones(COMMON), *torch.meshgrid(y, x, indexing="ij")])
    encoded = torch.zeros(DIMS, *COMMON)
    encoded[:3], encoded[3] = plane, plane[1:].square().sum(dim=0)
    coarse = torch.randn(1, DIMS // 2 - 4, 7, 11, generator=generator)
    encoded[4 : DIMS // 2] = functional.interpolate(coarse, COMMON, mode="bilinear")[0]

    centers = [torch.full((CLASSES, *size), -6.0) for size in LEVELS]
    kernels = [0.1 * torch.randn(DIMS, *size, generator=generator) for size in LEVELS]
    patches = [torch.randint(REGIONS, (1, 1, 4, 6), generator=generator).float()] * len(LEVELS)
    labels = [
        functional.interpolate(x, size, mode="nearest")[0, 0].long() for x, size in zip(patches, LEVELS, strict=True)
    ]
    regions = [3 * functional.one_hot(label, REGIONS).permute(2, 0, 1).float() - 1 for label in labels]
    for level in kernels:
        level[:4] = 0
    for place, radius in zip(torch.rand(OBJECTS, 2, generator=generator), draw_radii(generator), strict=True):
        middle = place * torch.tensor([1.0, COMMON[1] / COMMON[0]])
        disc = torch.cat([radius**2 - middle.square().sum(dim=0, keepdim=True), 2 * middle, torch.tensor([-1.0])])
        direction = 200 * torch.randn(DIMS // 2, generator=generator)
        label = int(torch.randint(CLASSES, (1,), generator=generator))
        # from 32 pixels P3, from 64 P4, ...
        level = int((radius * 2 * SIZE[0] / 32).log2().clamp(min=0, max=3))
        for index in (level, level + 1):
            row, column = (int(p * n) for p, n in zip(place.tolist(), LEVELS[index], strict=True))
            centers[index][label, row, column] = 3
            kernels[index][:4, row, column] = 12 * disc / radius**2
            kernels[index][DIMS // 2 :, row, column] = direction
    return HeadOutputs(centers, regions, kernels, encoded)


def draw_radii(generator: torch.Generator) -> Tensor:
    """Diameters are log-uniform from 20 to 400 pixels; as shares of the image's height."""
    return 10 * 20 ** torch.rand(OBJECTS, generator=generator) / SIZE[0]


@torch.no_grad()
def release(model: PanopticFCN, outputs: HeadOutputs, output: tuple[int, int]) -> dict[str, Any]:
    """The plain implementation."""
    return release_postprocessing(model, outputs, STRIDE, SIZE, output)


@torch.no_grad()
def convmask(model: PanopticFCN, outputs: HeadOutputs, output: tuple[int, int]) -> dict[str, Any]:
    """Ours."""
    return model.postprocess(*model.masks_of(outputs), STRIDE, SIZE, output)


IMPLEMENTATIONS: dict[str, Callable[..., dict[str, Any]]] = {"release": release, "convmask": convmask}


def check_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """The same result, but for pixels at a threshold."""
    instances = found["instances"]
    torch.testing.assert_close(instances.scores, expected["scores"], atol=1e-4, rtol=1e-4)
    assert torch.equal(instances.pred_classes, expected["classes"]), "the classes differ"
    assert (instances.pred_masks != expected["masks"]).sum() < 1e-5 * expected["masks"].numel(), "the masks differ"
    torch.testing.assert_close(found["sem_seg"], expected["sem_seg"], atol=1e-4, rtol=1e-4)
    panoptic, segments = found["panoptic_seg"]
    assert (panoptic != expected["panoptic"]).float().mean() < 1e-4, "the panoptic maps differ"
    assert len(segments) == len(expected["segments"]), "the segments differ"


def memory_of(name: str, file: str, output: tuple[int, int]) -> float:
    """Peak MiB above what is there with model and head outputs, in a process that has done nothing else."""
    model, outputs = torch.load(file, weights_only=False)
    # libraries load what they need
    small = HeadOutputs(*([torch.ones(len(x), 4, 4) for x in maps] for maps in outputs[:3]), outputs.encoded)
    IMPLEMENTATIONS[name](model, small, (80, 80))
    return extra_memory(lambda: IMPLEMENTATIONS[name](model, outputs, output))


def compare(case: Case, output: tuple[int, int], repeats: int) -> None:
    """Checks that the results are equal and prints the table."""
    expected, found = (implementation(*case, output) for implementation in IMPLEMENTATIONS.values())
    check_equal(expected, found)
    things, stuff = release_kernels(*case)
    print(
        f"{SIZE[0]} x {SIZE[1]} to {output[0]} x {output[1]}, float32: {len(things[0])} kernels of things and "
        f"{len(stuff[0])} of stuff after the fusion, {len(expected['scores'])} instances, "
        f"{len(expected['segments'])} segments; medians of {repeats}"
    )
    print(f"{processor()}; torch {torch.__version__}\n")
    del expected, found
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(case, file.name)
        memory = {name: in_fresh_process(memory_of, name, file.name, output) for name in IMPLEMENTATIONS}
    print("| threads | release, ms | convmask, ms | ratio | release, MiB | convmask, MiB | ratio |")
    print("|---------|-------------|--------------|-------|--------------|---------------|-------|")
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        functions = {name: partial(how, *case, output) for name, how in IMPLEMENTATIONS.items()}
        plain, ours = median_times(functions, repeats).values()
        print(
            f"| {threads:7} | {1000 * plain:11.0f} | {1000 * ours:12.1f} | {plain / ours:5.1f} | "
            f"{memory['release']:12.0f} | {memory['convmask']:13.0f} | {memory['release'] / memory['convmask']:5.1f} |",
            flush=True,
        )


def main() -> None:
    """Runs the comparison and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", help="of a Panoptic FCN of this repository")
    parser.add_argument("--weights", help="of the model; without them head outputs are drawn")
    parser.add_argument("--image", help="a file, for the model")
    parser.add_argument("--output", type=int, nargs=2, default=SIZE, metavar=("H", "W"), help="size of the result")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    output = tuple(args.output)
    if args.weights and not (args.config_file and args.image):
        parser.error("--weights needs --config-file and --image")
    compare(from_weights(args) if args.weights else drawn(args), output, args.repeats)


if __name__ == "__main__":
    main()
