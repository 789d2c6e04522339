"""Scores the frames of a camera or a video file with a saved detector, always the newest; frames between are dropped.

python -m examples.camera --detector part.regad --source 0
python -m examples.camera --detector part.regad --source recording.mp4 --jsonl
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

import numpy as np
from PIL import Image

from examples.judge import Judge, JudgeConfig, Judgement, load_judge
from examples.service import REQUIREMENTS
from inspection.images import array_image
from inspection.results import DEFECTIVE, REVIEW
from utils.config import Parser, flag
from utils.errors import UserError, require_packages, run_command
from utils.interrupts import Interrupts

FALLBACK_RATE = 25.0  # frames per second of a video file that does not say
STOP_SECONDS = 5.0
WINDOW = "examples.camera"


class Capture(Protocol):
    """What is used of cv2.VideoCapture: `grab` takes the next frame, `retrieve` decodes it."""

    def grab(self) -> bool: ...

    def retrieve(self) -> tuple[bool, np.ndarray | None]: ...

    def release(self) -> None: ...


class Frame(NamedTuple):
    """number: from 0, of all frames that came. image: as OpenCV gives it, BGR or grey, 8 or 16 bits."""

    number: int
    image: np.ndarray


class NewestFrame:
    """Reads frames in a thread of its own and keeps the newest one, so that whoever takes them never lags.

    rate: frames per second at which a video file gives its frames, as a camera would; None: as they come.
    """

    def __init__(self, capture: Capture, rate: float | None) -> None:
        self._capture, self._rate = capture, rate
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._is_over = False
        self.came = 0
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()

    def take(self) -> Frame | None:
        """Waits for a frame that was not taken yet, and returns the newest; None after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._is_over)
            frame, self._frame = self._frame, None
            return frame

    def stop(self) -> None:
        """Ends the thread, which closes the source; a camera that hangs is left behind after STOP_SECONDS."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(STOP_SECONDS)

    def _read(self) -> None:
        begin = time.monotonic()
        try:
            while not self._is_over and self._capture.grab():
                number, self.came = self.came, self.came + 1
                late = self._wait_until_due(begin, number)
                if late and number:  # decoding takes longer than the frames are apart: this one is not decoded
                    continue
                is_whole, image = self._capture.retrieve()
                if is_whole:
                    with self._changed:
                        self._frame = Frame(number, image)
                        self._changed.notify_all()
        finally:
            self._capture.release()
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _wait_until_due(self, begin: float, number: int) -> bool:
        """Waits for the time of a frame of a video file; returns whether the next frame is due already."""
        if self._rate is None:
            return False
        due = begin + number / self._rate
        with self._changed:
            self._changed.wait_for(lambda: self._is_over, max(0.0, due - time.monotonic()))
        return time.monotonic() >= due + 1 / self._rate


class Counts:
    """The frames of a run: scored, by decision, and dropped."""

    def __init__(self) -> None:
        self.decisions: Counter[str | None] = Counter()
        self.last = -1

    def add(self, frame: Frame, judgement: Judgement) -> int:
        """Counts a scored frame; returns the number of frames that were dropped so far."""
        self.decisions[judgement.decision] += 1
        self.last = frame.number
        return self.last + 1 - self.decisions.total()

    def __str__(self) -> str:
        scored = self.decisions.total()
        flagged = f"{self.decisions[DEFECTIVE]} defective, {self.decisions[REVIEW]} for review"
        return f"{scored} frames scored, {self.last + 1 - scored} dropped, {flagged}"


@dataclass(frozen=True, kw_only=True)
class CameraConfig(JudgeConfig):
    """The flags of the command."""

    source: str = flag("number of a camera, video file, or address such as rtsp://...", default="0")
    jsonl: bool = flag("results as lines of JSON on stdout, the rest on stderr", default=False)
    show: str = flag("window: heat maps over the frames", default="none", choices=("none", "window"))


def get_args_parser() -> Parser[CameraConfig]:
    """The command line."""
    return Parser(CameraConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Scores frames until the source ends or Ctrl-C, and prints a summary."""
    config = get_args_parser().parse_config(argv)
    require_packages("cv2", requirements=REQUIREMENTS)
    lines = sys.stdout if config.jsonl else None
    with redirect_stdout(sys.stderr if config.jsonl else sys.stdout):
        judge = load_judge(config)
        capture, rate = open_source(config.source)
        frames, counts, begin = NewestFrame(capture, rate), Counts(), time.monotonic()
        try:
            with Interrupts(), suppress(KeyboardInterrupt):
                watch(judge, frames, counts, lines, config.show == "window")
                if rate is None:
                    raise UserError(f"--source {config.source} delivers no more frames")
        finally:
            frames.stop()
            print(f"{counts} in {time.monotonic() - begin:.1f} s", flush=True)


def open_source(source: str) -> tuple[Capture, float | None]:
    """The opened source, and the rate at which a video file is to give its frames; None for a camera.

    Raises:
        UserError: there is no such camera, file or address, or OpenCV cannot read it.
    """
    import cv2

    is_file = Path(source).is_file() or "%" in source  # numbered images; others are devices, their links, addresses
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        if not (source.isdigit() or "://" in source or Path(source).exists()):
            raise UserError(f"no video file {source}; --source takes the number of a camera, a file, or an address")
        raise UserError(f"OpenCV cannot open --source {source}")
    rate = capture.get(cv2.CAP_PROP_FPS)
    return capture, (rate if math.isfinite(rate) and rate > 0 else FALLBACK_RATE) if is_file else None


def watch(judge: Judge, frames: NewestFrame, counts: Counts, lines: TextIO | None, with_window: bool) -> None:
    """Scores the newest frame until there is none, with a line for each. lines: where lines of JSON go, or None."""
    while frame := frames.take():
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        image = array_image(frame.image, bits=judge.detector.bits, bgr=True)
        judgement = judge.judge(image)
        dropped = counts.add(frame, judgement)
        if lines is not None:
            row = {"time": now, "frame": frame.number, "dropped": dropped, **judgement.plain()}
            print(json.dumps(row), file=lines, flush=True)
        said = f"{judgement.decision or ''} {judgement.reason or ''}".strip()
        print(f"{now}  frame {frame.number}  {judgement.score:.3f} {said}  dropped {dropped}", flush=True)
        if with_window:
            _show(judge.heat_map(image, judgement))


def _show(image: Image.Image) -> None:
    import cv2

    try:
        cv2.imshow(WINDOW, np.asarray(image)[..., ::-1])
        cv2.waitKey(1)  # draws the window
    except cv2.error as error:  # opencv-python-headless has no windows
        raise UserError(
            "this build of OpenCV cannot show windows: leave out --show, or install opencv-python"
        ) from error


if __name__ == "__main__":
    run_command(main, get_args_parser)
