"""Scores the newest frame of a camera again and again, or every frame of a video file, with a saved detector.

python -m examples.camera --detector part.regad --source 0
python -m examples.camera --detector part.regad --source recording.mp4 --jsonl
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, redirect_stdout, suppress
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
from utils.devices import command_device
from utils.errors import UserError, require_packages, run_command
from utils.interrupts import Interrupts

STOP_SECONDS = 5.0
WINDOW = "examples.camera"


class Capture(Protocol):
    """What is used of cv2.VideoCapture: `grab` takes the next frame, `retrieve` decodes it, `get` is a property."""

    def grab(self) -> bool: ...

    def retrieve(self) -> tuple[bool, np.ndarray | None]: ...

    def release(self) -> None: ...

    def get(self, which: int) -> float: ...


class Frame(NamedTuple):
    """number: from 0, of all frames that came. image: as OpenCV gives it, BGR or grey, 8 or 16 bits."""

    number: int
    image: np.ndarray


def all_frames(capture: Capture) -> Iterator[Frame]:
    """Yields every frame of a video file or of numbered images."""
    try:
        for number in itertools.takewhile(lambda _: capture.grab(), itertools.count()):
            is_whole, image = capture.retrieve()
            if is_whole:
                yield Frame(number, image)
    finally:
        capture.release()


class NewestFrames:
    """Yields the frames of a camera, always the newest: whoever takes them never lags, and misses those between.

    They are read in a thread of its own, of which the newest one is kept.
    """

    def __init__(self, capture: Capture) -> None:
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._read, args=[all_frames(capture)], name="camera", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._take, None)

    def _take(self) -> Frame | None:
        """Waits for a frame that was not taken yet, and returns the newest; None after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._is_over)
            frame, self._frame = self._frame, None
            return frame

    def close(self) -> None:
        """Ends the thread, which closes the source; a camera that hangs is left behind after STOP_SECONDS."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(STOP_SECONDS)

    def _read(self, frames: Iterator[Frame]) -> None:
        with closing(frames):
            for frame in frames:
                with self._changed:
                    if self._is_over:
                        break
                    self._frame = frame
                    self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


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

    source: str = flag(
        "camera (number or device), address such as rtsp://..., video file, or numbered images such as img_%03d.png; "
        "of the last two every frame is scored, of the others always the newest",
        default="0",
    )
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
        command_device(config.device)
        judge = load_judge(config.detector, config)
        capture, is_file = open_source(config.source)
        announced = _announced(capture) if is_file else 0
        counts, begin = Counts(), time.monotonic()
        try:
            with (
                closing(all_frames(capture) if is_file else NewestFrames(capture)) as frames,
                Interrupts(),
                suppress(KeyboardInterrupt),
            ):
                watch(judge, frames, counts, lines, config.show == "window")
                if not is_file:
                    raise UserError(f"--source {config.source} delivers no more frames")
                require_all(config.source, counts.last + 1)
                if announced > counts.last + 1:
                    print(
                        f"note: --source {config.source} ended after {counts.last + 1} of about {announced} frames: it "
                        "may be cut off or damaged",
                        file=sys.stderr,
                    )
        finally:
            print(f"{counts} in {time.monotonic() - begin:.1f} s", flush=True)


def open_source(source: str) -> tuple[Capture, bool]:
    """The opened source, and whether it is a file or numbered images, as opposed to a camera.

    Raises:
        UserError: there is no such camera, file or address, or OpenCV cannot read it.
    """
    import cv2

    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    is_numbered = "%" in source and "://" not in source
    if not capture.isOpened():
        if not (source.isdecimal() or "://" in source or is_numbered or Path(source).exists()):
            raise UserError(f"no video file {source}; --source takes the number of a camera, a file, or an address")
        raise UserError(f"OpenCV cannot open --source {source}")
    return capture, is_numbered or Path(source).is_file()  # a device, or a link to one, is no file


def _announced(capture: Capture) -> int:
    """How many frames the header of a video file says that there are; of some files an estimate, or 0."""
    import cv2

    return int(capture.get(cv2.CAP_PROP_FRAME_COUNT))


def require_all(source: str, count: int) -> None:
    """Raises UserError where there are more than `count` numbered images: OpenCV stops at a gap or a damaged image."""
    place = Path(source)
    pattern = re.compile(re.sub(r"%0?\d*[du]", r"\\d+", re.escape(place.name)).replace("%%", "%"))
    total = 0 if place.is_file() else sum(bool(pattern.fullmatch(name)) for name in os.listdir(place.parent))
    if total > count:
        raise UserError(
            f"--source {source} ended after {count} of {total} images: the number after the last one is missing, or "
            "its image cannot be read"
        )


def watch(judge: Judge, frames: Iterable[Frame], counts: Counts, lines: TextIO | None, with_window: bool) -> None:
    """Scores frames until there is none, with a line for each. lines: where lines of JSON go, or None."""
    for frame in frames:
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
