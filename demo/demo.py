#!/usr/bin/env python
"""Predicts on images, folders, videos or a webcam, with any config and checkpoint.

    python demo/demo.py --config-file configs/quick/panoptic_fpn_synthetic.yaml --weights output/demo/model_final.pth \
        --input photo.jpg photos/ "more/**/*.png" clip.mp4 --output results --json

Exit code: 0; 1 if an input was missing or unreadable (the others are done) or after an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils.logger import setup_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convmask.data.errors import DatasetError
from convmask.data.images import read_image
from convmask.demo import CocoResults, VideoReader, VideoWriter, demo_config, draw, find_inputs
from convmask.demo.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES, output_names
from convmask.engine import ConfigError, Predictor, one_line_errors
from convmask.visualization import save_image

_WINDOW = "ConvMask (q or Esc closes)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Predict on images, folders, videos or a webcam.")
    add = result.add_argument
    add("--config-file", required=True, metavar="CONFIG", help="a file, or a name of Detectron2's model zoo")
    add("--weights", default="", metavar="FILE", help="checkpoint; default: the config's MODEL.WEIGHTS, or the zoo's")
    add("--input", nargs="+", default=[], metavar="PATH", help="images, videos, folders, quoted patterns")
    add("--video-input", default="", metavar="FILE", help="a video, whatever its suffix")
    add("--webcam", nargs="?", const=0, type=int, metavar="N", help="take the frames of webcam N (0), in a window")
    add("--output", default="output/predictions", metavar="DIR", help="folder of the results; default %(default)s")
    add("--json", action="store_true", help="also write COCO results, and panoptic PNG and json, of the images")
    add("--show", action="store_true", help="also show each picture in a window")
    add("--confidence-threshold", type=float, default=0.5, metavar="T", help="least score of objects; default 0.5")
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config options")
    return result


def show(picture: np.ndarray, wait_ms: int) -> bool:
    """Shows an RGB picture; False once the user has closed the window by q or Esc."""
    try:
        cv2.imshow(_WINDOW, np.ascontiguousarray(picture[:, :, ::-1]))
        return cv2.waitKey(wait_ms) & 0xFF not in (ord("q"), 27)
    except cv2.error as error:
        raise ConfigError("this OpenCV has no windows (headless build): leave out --show and --webcam") from error


class Demo:
    """Runs the model over all inputs and keeps account of what was skipped."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        """Loads the model."""
        self.threshold = args.confidence_threshold
        self.predictor = Predictor(demo_config(args.config_file, args.weights, self.threshold, args.opts))
        self.output = Path(args.output)
        self.show = args.show or args.webcam is not None
        self.console = console
        self.skipped = 0
        self.results = CocoResults(self.output, self.predictor.metadata, self.threshold) if args.json else None

    def skip(self, reason: object) -> None:
        """Reports an input that cannot be used."""
        self.skipped += 1
        self.console.print(f"skipped: {reason}", style="red", markup=False, soft_wrap=True)

    def run_image(self, path: Path, name: str) -> None:
        """Predicts on one image and writes the picture."""
        try:
            image = read_image(str(path), "BGR")
        except DatasetError as error:
            self.skip(error)
            return
        prediction = self.predictor(image)
        picture = draw(image, prediction, self.predictor.metadata, self.threshold)
        save_image(self.output / f"{name}.png", picture)
        if self.results is not None:
            self.results.add(path, name, (image.shape[0], image.shape[1]), prediction)
        if self.show:
            show(picture, 0)

    def run_video(self, source: Path | int, name: str, progress: Progress) -> None:
        """Predicts on every frame and writes a video of the same speed."""
        try:
            reader = VideoReader(source)
        except DatasetError as error:
            self.skip(error)
            return
        with reader, VideoWriter(self.output / f"{name}.mp4", reader.fps) as writer:
            # A webcam reports no number of frames: the bar then only pulses.
            for frame in progress.track(reader, total=reader.count, description=str(source)):
                # Odd sizes are not for every codec, and labels on small frames need no enlargement here.
                frame = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
                picture = draw(frame, self.predictor(frame), self.predictor.metadata, self.threshold, scale=1)
                writer.write(picture)
                if self.show and not show(picture, 1):
                    break


def check_outputs(folder: Path, names: Sequence[str], inputs: Sequence[Path]) -> None:
    """Makes sure that no result takes the place of an input.

    Raises:
        ConfigError: names the input.
    """
    kept = {path.resolve(): path for path in inputs}
    for name in names:
        for file in (folder / f"{name}.png", folder / f"{name}.mp4", folder / "panoptic" / f"{name}.png"):
            if file.resolve() in kept:
                raise ConfigError(f"--output {folder}: a result would overwrite the input {kept[file.resolve()]}")


def run(args: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit code."""
    inputs = find_inputs(args.input)
    videos: list[Path | int] = [*inputs.videos]
    videos += [Path(args.video_input)] if args.video_input else []
    videos += [args.webcam] if args.webcam is not None else []
    if Path(args.output).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        raise ConfigError(f"--output {args.output}: give a folder; files in it are named after the inputs")
    if not inputs.images and not videos:
        found = f"nothing found for {', '.join(inputs.missing)}" if inputs.missing else "nothing to do"
        raise ConfigError(f"{found}: give --input, --video-input or --webcam")
    names = output_names([*inputs.images, *(Path(f"webcam_{v}") if isinstance(v, int) else v for v in videos)])
    check_outputs(Path(args.output), names, [*inputs.images, *(v for v in videos if isinstance(v, Path))])
    console = Console(stderr=True)
    demo = Demo(args, console)
    for pattern in inputs.missing:
        demo.skip(f"{pattern!r} gives no image or video")

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        pairs = list(zip(inputs.images, names, strict=False))
        for path, name in progress.track(pairs, description="images") if pairs else ():
            demo.run_image(path, name)
        for source, name in zip(videos, names[len(pairs) :], strict=True):
            demo.run_video(source, name, progress)
    if demo.results is not None:
        demo.results.write()
    done = len(pairs) + len(videos) + len(inputs.missing) - demo.skipped
    print(f"{done} predicted, {demo.skipped} skipped; results are in {demo.output}")
    return 1 if demo.skipped else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parser().parse_args(argv)
    for name in ("detectron2", "fvcore", "convmask"):
        setup_logger(name=name).setLevel("WARNING")
    with one_line_errors(args.debug):
        return run(args)


if __name__ == "__main__":
    sys.exit(main())
