"""Every frame of a file that OpenCV wrote, and the newest of a camera, through the detector."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import camera
from examples.camera import NewestFrames, open_source
from examples.judge import Judge
from inspection.detector import FewShotDetector
from utils.errors import UserError

cv2 = pytest.importorskip("cv2", reason="needs the packages of requirements-examples.txt")

SIZE, FRAMES, RATE = 64, 30, 60.0
STEP = 8  # grey values between one frame and the next


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """Frame n has the grey value STEP * n, so that a frame shows its number."""
    path = tmp_path_factory.mktemp("video") / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (SIZE, SIZE))
    for number in range(FRAMES):
        writer.write(np.full((SIZE, SIZE, 3), STEP * number, np.uint8))
    writer.release()
    return path


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(params=["video", "numbered", "numbered, 16 bits"])
def file_source(request, video, tmp_path) -> str:
    """A source of FRAMES frames of the grey values of `video`."""
    if request.param == "video":
        return str(video)
    kind = np.uint16 if "16" in request.param else np.uint8
    for number in range(FRAMES):
        image = np.full((SIZE, SIZE), STEP * number * np.iinfo(kind).max // 255, kind)
        cv2.imwrite(str(tmp_path / f"img_{number:03}.png"), image)
    return str(tmp_path / "img_%03d.png")


def test_every_frame_of_a_file_is_scored(part, file_source, monkeypatch, capsys):
    shown, original = [], Judge.judge

    def judge(self, image):
        shown.append(round(np.asarray(image).mean() / STEP))
        return original(self, image)

    monkeypatch.setattr(Judge, "judge", judge)
    camera.main(["--detector", str(part), "--device", "cpu", "--source", file_source, "--jsonl"])
    out, err = capsys.readouterr()
    rows = rows_of(out)
    assert [row["frame"] for row in rows] == shown == list(range(FRAMES))  # each line is of the frame that was scored
    assert {row["dropped"] for row in rows} == {0} and f"{FRAMES} frames scored, 0 dropped" in err
    assert all({"time", "score", "decision", "reason", "detector", "boxes"} <= set(row) for row in rows)


@pytest.mark.parametrize("source", ["0", "rtsp://camera/1", "http://camera/%20", "/dev/null", "link"])
def test_cameras_are_opened_by_number_address_device_and_link(source, tmp_path, monkeypatch):
    """A device, or a link to it as in /dev/v4l/by-id, is no file, whose frames would all be scored."""
    if source == "link":
        (tmp_path / "usb-camera").symlink_to("/dev/null")
        source = str(tmp_path / "usb-camera")

    class Opened(Endless):
        def __init__(self, given):
            self.given = given

        def isOpened(self):
            return True

    monkeypatch.setattr(cv2, "VideoCapture", Opened)
    capture, is_file = open_source(source)
    assert capture.given == (0 if source == "0" else source) and not is_file


def test_lines_for_people(part, video, capsys):
    camera.main(["--detector", str(part), "--device", "cpu", "--source", str(video)])
    device, *lines, summary = capsys.readouterr().out.splitlines()
    assert device.startswith("device: cpu (")
    detector = FewShotDetector.load(part, "cpu")
    black = detector.inspect([Image.new("RGB", (SIZE, SIZE))])
    assert black.reasons[0] and f"review {black.reasons[0]}  dropped 0" in lines[0] and "  frame 0  " in lines[0]
    assert f"{len(lines)} frames scored" in summary and f"{len(lines)} for review" in summary


class Endless:
    """A camera that gives a frame every two milliseconds, without end, or until it is `broken`."""

    def __init__(self):
        self.number, self.broken = -1, False

    def grab(self):
        time.sleep(0.002)
        self.number += 1
        return not self.broken

    def retrieve(self):
        return True, np.full((2, 2, 3), self.number % 256, np.uint8)

    def get(self, which):
        return 0

    def release(self):
        self.broken = True


def test_a_camera_keeps_the_newest_frame_only():
    """The source pauses after five frames, after ten, and ends after eleven."""
    pauses = {number: (threading.Event(), threading.Event()) for number in (5, 10)}

    class Pausing(Endless):
        def grab(self):
            reached, goes_on = pauses.get(self.number + 1, (threading.Event(), None))
            reached.set()
            return (goes_on is None or goes_on.wait(10)) and super().grab() and self.number < 11

    frames = NewestFrames(Pausing())
    for number, (reached, goes_on) in pauses.items():
        assert reached.wait(10)
        newest = next(iter(frames))
        assert newest.number == number - 1 and (newest.image == number - 1).all()
        goes_on.set()
    assert [frame.number for frame in frames] == [10]
    frames.close()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_with_a_summary(part, monkeypatch, capsys):
    class Opened(Endless):
        def retrieve(self):
            return True, np.zeros((SIZE, SIZE, 3), np.uint8)

    monkeypatch.setattr(camera, "open_source", lambda source: (Opened(), False))
    original = camera.Counts.add

    def interrupted(self, *arguments):
        if self.decisions.total() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(camera.Counts, "add", interrupted)
    camera.main(["--detector", str(part), "--device", "cpu", "--source", "0"])
    assert " frames scored, " in capsys.readouterr().out.splitlines()[-1]
    assert not [thread for thread in threading.enumerate() if thread.name == "camera"]


def test_a_camera_that_stops_is_an_error_and_a_video_that_ends_is_none(part, monkeypatch, capsys):
    class Short(Endless):
        def grab(self):
            return super().grab() and self.number < 3

        def retrieve(self):
            return True, np.zeros((SIZE, SIZE, 3), np.uint8)

    call = ["--detector", str(part), "--device", "cpu", "--source", "0"]
    monkeypatch.setattr(camera, "open_source", lambda source: (Short(), True))
    camera.main(call)
    monkeypatch.setattr(camera, "open_source", lambda source: (Short(), False))
    with pytest.raises(UserError, match="--source 0 delivers no more frames"):
        camera.main(call)
    assert " frames scored, " in capsys.readouterr().out.splitlines()[-1]


def test_a_video_that_is_cut_off_is_said(part, video, tmp_path, capsys):
    cut = tmp_path / "cut.avi"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    camera.main(["--detector", str(part), "--device", "cpu", "--source", str(cut)])
    assert re.search(rf"note: --source {cut} ended after \d+ of about {FRAMES} frames", capsys.readouterr().err)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"no image")])
def test_numbered_images_that_opencv_does_not_reach_are_counted(spoil, part, tmp_path, capsys):
    for number in range(5):
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / f"{number:03d}.png")
    spoil(tmp_path / "003.png")
    (tmp_path / "other.png").touch()
    source = str(tmp_path / "%03d.png")
    with pytest.raises(UserError, match=r"%03d\.png ended after 3 of [45] images: the number after the last one"):
        camera.main(["--detector", str(part), "--device", "cpu", "--source", source])
    assert "3 frames scored, 0 dropped" in capsys.readouterr().out


def test_invalid_arguments(part, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no video file .*missing\.mp4"):
        open_source(str(tmp_path / "missing.mp4"))
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(UserError, match="OpenCV cannot open"):
        open_source(str(tmp_path / "text.avi"))
    monkeypatch.setattr("utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no package cv2: .*requirements-examples\.txt"):
        camera.main(["--detector", str(part)])


def test_without_windows_there_is_a_sentence(part, video, monkeypatch):
    def refuse(*arguments):
        raise cv2.error("not implemented")

    monkeypatch.setattr(cv2, "imshow", refuse)
    with pytest.raises(UserError, match="cannot show windows: leave out --show"):
        camera.main(["--detector", str(part), "--device", "cpu", "--source", str(video), "--show", "window"])
