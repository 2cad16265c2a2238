"""Reading and writing videos with OpenCV; no window is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from convmask.data.errors import DatasetError


class VideoReader:
    """Frames (H, W, 3) uint8 BGR of a video file or a webcam.

    Attributes:
        fps: frames per second; 25 where the source does not say.
        count: frames, or None where it is not known.
    """

    def __init__(self, source: str | Path | int) -> None:
        """Opens ``source``: a file, or the number of a webcam.

        Raises:
            DatasetError: it cannot be opened, or holds no frame.
        """
        self._name = f"webcam {source}" if isinstance(source, int) else f"video {str(source)!r}"
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        self._first: np.ndarray | None = self._capture.read()[1] if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            raise DatasetError(f"{self._name} cannot be read")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = float(fps) if 0 < fps < 1000 else 25.0
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the frames once."""
        frame = self._first
        while frame is not None:
            yield frame
            frame = self._capture.read()[1]

    def __enter__(self) -> VideoReader:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the source."""
        self._capture.release()


class VideoWriter:
    """Writes RGB frames into an ``.mp4`` file, which appears under its name when it is complete."""

    def __init__(self, path: str | Path, fps: float) -> None:
        """Prepares ``path``; the size is that of the first frame.

        Args:
            path: with the suffix ``.mp4``, ``.avi`` or ``.mkv``.
            fps: frames per second.
        """
        self.path = Path(path)
        self._fps = fps
        self._temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}{self.path.suffix}")
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame (H, W, 3) uint8 RGB.

        Raises:
            OSError: OpenCV cannot write such a file.
        """
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            codec = "MJPG" if self.path.suffix.lower() == ".avi" else "mp4v"
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*codec), self._fps, size)
            if not self._writer.isOpened():
                raise OSError(f"OpenCV cannot write the video {str(self.path)!r}")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def __enter__(self) -> VideoWriter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the file; after an error, or without a frame, there is none."""
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)
