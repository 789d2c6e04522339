"""predict.py over many runs: watching, appending, overwriting, interruptions, and files that always agree."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image, ImageOps

import predict
from inspection import run
from inspection.detector import FewShotDetector
from inspection.inputs import Watcher
from inspection.results import ResultFiles
from utils.errors import DID_WORK, UserError
from utils.files import PROJECT_ROOT


@pytest.fixture(scope="module")
def part(demo_data, tmp_path_factory) -> Path:
    """A saved detector with the threshold 0.1, which lies between the scores of the images."""
    file = tmp_path_factory.mktemp("detector") / "part.regad"
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]
    predict.main(
        ["--support", *map(str, support), "--backbone", "resnet18", "--weights", "none"]
        + ["--img_size", "64", "--device", "cpu", "--save", str(file)]
    )
    return file


@pytest.fixture(scope="module")
def images(demo_data) -> list[bytes]:
    return [path.read_bytes() for path in sorted((demo_data / "ring/test").rglob("*.png"))]


def call(part: Path, *flags: object) -> int:
    """Runs predict.py with the saved detector; returns its exit code."""
    try:
        predict.main(["--detector", str(part), "--device", "cpu", *map(str, flags)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def put(folder, images) -> Callable[..., None]:
    """Writes images into `folder`, by number: 0.png, 1.png and so on, or one under a name."""

    def put_images(*numbers: int, name: str = "") -> None:
        for number in numbers:
            (folder / (name or f"{number}.png")).write_bytes(images[number])

    return put_images


@pytest.fixture
def watch(part, folder, tmp_path, monkeypatch) -> Callable[..., int]:
    """Watches `folder` with the output in out/; each time there is nothing to do, the next step is taken."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def watch_steps(*steps: Callable[[], object], flags: tuple = ()) -> int:
        todo = iter([*steps, lambda: None, lambda: None, interrupt])  # two more scans after the last step

        def sleep(_: float) -> None:
            next(todo)()

        monkeypatch.setattr("inspection.run.time.sleep", sleep)
        return call(part, "--watch", folder, "--output", tmp_path / "out", *flags)

    return watch_steps


def rows_of(output: Path) -> list[dict]:
    """The rows of an output folder, after a check that all its files agree on them."""
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    record = json.loads((output / "scores.json").read_text())
    assert record["images"] == rows
    with (output / "scores.csv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    as_text = [{name: "" if row[name] is None else str(row[name]) for name in table[0]} for row in rows]
    assert table == as_text
    with (output / "boxes.csv").open(newline="", encoding="utf-8") as stream:
        boxes = list(csv.DictReader(stream))
    assert boxes == [
        {"time": row["time"], "path": row["path"], **{name: str(value) for name, value in box.items()}}
        for row in rows
        for box in row["boxes"]
    ]
    _check_page(output, record, rows)
    return rows


def _check_page(output: Path, record: dict, rows: list[dict]) -> None:
    """The page shows the rows of the last detector and threshold, whose decisions follow from its threshold."""
    limit = record["threshold"]["value"]
    own = [row for row in rows if (row["detector"], row["threshold"]) == (record["detector_id"], limit)]
    page = (output / "report.html").read_text()
    for row in own:
        name = Path(row["path"]).name
        if row["score"] is not None:
            assert json.dumps(name) in page or f"/{name}" in page
            assert (row["score"] > limit) == (row["decision"] == "defective")
    assert (str(len(rows) - len(own)) in re.sub(r"<script.*", "", page, flags=re.DOTALL)) or len(rows) == len(own)


def test_a_watch_ends_with_a_summary(part, images, folder):
    """Images arrive in a watched folder that also contains the output; standard output holds JSON lines only."""
    output = folder / "out"
    flags = ["--detector", str(part), "--watch", str(folder), "--output", str(output), "--jsonl", "--device", "cpu"]
    command = [sys.executable, "predict.py", *flags, "--threshold", "0.01"]
    (folder / "broken.png").write_bytes(images[0][:200])
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            lines = []
            for number in range(2):
                (folder / f"{number}.png").write_bytes(images[number])
                lines.append(json.loads(process.stdout.readline()))
            time.sleep(1.2)  # two more scans: it must not score its own output
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                printed, errors = process.communicate(timeout=300)  # a busy machine
            except subprocess.TimeoutExpired:
                process.kill()  # otherwise, leaving the block would wait without end
                raise
    assert process.returncode == 0 and printed == b""
    said = errors.decode()
    assert "threshold: " in said and "stopped: 2 images scored, 2 defective, 0 failed" in said
    assert "Traceback" not in said
    assert rows_of(output) == lines
    assert [Path(row["path"]).name for row in lines] == ["0.png", "1.png"]
    assert len(list((output / "images").iterdir())) == 2 and [len(row["boxes"]) > 0 for row in lines] == [True, True]


def test_a_camera_that_reuses_a_name(watch, put, part, images, folder, tmp_path):
    """Each image is a new row with its own files, also one that came while nobody watched."""
    put(0, name="latest.png")
    assert watch(lambda: None, lambda: put(1, name="latest.png")) == 0
    assert len(rows_of(tmp_path / "out")) == 2
    put(2, name="latest.png")
    assert watch() == 0
    rows = rows_of(tmp_path / "out")
    assert watch() == 0
    assert rows_of(tmp_path / "out") == rows  # nothing is scored twice
    assert [row["files"] for row in rows] == [[f"images/latest.png{n}.jpg"] for n in ("", ".2", ".3")]
    expected = FewShotDetector.load(part, "cpu").score([Image.open(io.BytesIO(image)) for image in images[:3]])[0]
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
    assert len({row["modified"] for row in rows}) == 3 and {row["path"] for row in rows} == {f"{folder}/latest.png"}


def test_a_slow_upload_is_scored_once_and_whole(watch, images, folder, tmp_path, capsys):
    """It pauses for many scans; what stays unreadable has failed, once, after GIVE_UP_SECONDS; so has an empty file."""
    half = len(images[0]) // 2
    target = folder / "slow.png"
    target.write_bytes(b"")
    pauses = [lambda: None] * 3
    watch(*pauses, lambda: target.write_bytes(images[0][:half]), *pauses, lambda: target.write_bytes(images[0]))
    (row,) = rows_of(tmp_path / "out")
    assert row["score"] > 0 and row["error"] is None and row["bytes"] == len(images[0])
    assert "failed" not in capsys.readouterr().err


def test_what_stays_unreadable_has_failed(watch, images, folder, tmp_path, monkeypatch):
    (folder / "broken.png").write_bytes(images[0][:200])
    (folder / "empty.png").write_bytes(b"")
    watch()
    assert rows_of(tmp_path / "out") == []
    now = time.monotonic()
    monkeypatch.setattr("inspection.inputs.time.monotonic", lambda: now)

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch(*[lambda: wait(14.9)] * 2)
    assert rows_of(tmp_path / "out") == []
    for _ in range(2):  # the second time, both have failed before
        watch(*[lambda: wait(15.1)] * 3)
        rows = rows_of(tmp_path / "out")
        assert [(row["score"], row["decision"], bool(row["error"])) for row in rows] == [(None, None, True)] * 2
    (folder / "broken.png").write_bytes(images[0])  # whole at last
    watch()
    assert [row["score"] is None for row in rows_of(tmp_path / "out")] == [True, True, False]


def test_a_vanished_folder_does_not_end_the_watch(watch, images, folder, tmp_path):
    """Nor does one that vanishes before its image was read. Hidden upload folders are ignored."""
    for name in ("sub/0.png", ".upload/1.png", "gone/2.png"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(images[0])

    def remove(name: str) -> None:
        shutil.rmtree(folder / name)
        (folder / f"{name}.png").write_bytes(images[1])

    scan, vanished = Watcher.scan, [folder / "vanished/2.png"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Watcher, "scan", lambda self: scan(self) + ([vanished.pop()] if vanished else []))
        watch(lambda: remove("gone"), lambda: None, lambda: remove("sub"))
    assert not vanished
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "out")] == ["0.png", "gone.png", "sub.png"]


def test_a_restart_with_another_threshold(watch, put, tmp_path):
    """Earlier rows keep the threshold, the decision and the boxes that they were made with, in all files."""
    put(0)
    watch(flags=("--threshold", 0.001))
    put(0, name="1.png")
    watch(flags=("--threshold", 1000))
    rows = rows_of(tmp_path / "out")
    assert [(row["threshold"], row["decision"]) for row in rows] == [(0.001, "defective"), (1000, "normal")]
    assert rows[0]["boxes"] and not rows[1]["boxes"] and rows[0]["detector"] == rows[1]["detector"]


def test_undecodable_names_and_other_working_directories(watch, put, folder, tmp_path, monkeypatch):
    """An earlier version wrote such names in another form; the image is not scored again, its row is not changed."""
    monkeypatch.chdir(folder)
    try:
        put(0, name=os.fsdecode(b"2\xe9.png"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    watch()
    watch(flags=("--watch", "."))
    watch(flags=("--watch", "../in"))
    (row,) = rows_of(tmp_path / "out")
    assert row["path"] == f"{folder}/2\\xe9.png" and (tmp_path / "out" / row["files"][0]).is_file()
    record = tmp_path / "out/results.jsonl"
    record.write_text(record.read_text().replace("\\\\xe9", "\\\\udce9"))
    watch()
    (row,) = rows_of(tmp_path / "out")
    assert row["path"] == f"{folder}/2\\udce9.png"
    assert watch(flags=("--overwrite",)) == 0 and len(list((tmp_path / "out/images").iterdir())) == 1


def test_own_output_is_not_watched_through_a_link(put, folder, tmp_path, watch):
    (folder / "out").mkdir()
    put(0, name="a.png")
    put(0, name="out/b.png")
    (tmp_path / "alias").symlink_to(folder)
    watch(flags=("--watch", tmp_path / "alias", "--output", folder / "out"))
    assert len(rows_of(folder / "out")) == 1


def test_a_watch_is_not_resumed_with_another_detector(watch, put, tmp_path):
    put(0)
    watch()
    put(1)
    with pytest.raises(UserError, match=r"results of another detector \([0-9a-f]{12}, this one is [0-9a-f]{12}\)"):
        watch(flags=("--bits", "12"))
    watch(flags=("--bits", "12", "--append"))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 2 and rows[0]["detector"] != rows[1]["detector"]


def test_an_earlier_run_is_not_overwritten_in_silence(part, put, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    put(0, 1)
    flags = ("--input", folder, "--output", out, "--maps", "npy")
    assert call(part, *flags) == 0
    first = rows_of(out)
    (out / "images/mine.jpg").write_bytes(b"mine")
    with monkeypatch.context() as patched:
        patched.setattr("inspection.run.make_detector", lambda *_: pytest.fail("work was done"))
        with pytest.raises(UserError, match=r"holds results of an earlier run: give --append, --overwrite or another"):
            call(part, *flags)
    assert rows_of(out) == first
    put(2)
    assert call(part, *flags, "--append") == 0
    assert rows_of(out)[:2] == first and len(rows_of(out)) == 3
    assert "2 of 3 images have results" in capsys.readouterr().out
    shown = re.findall(r'class="row">(.*?)</script>', (out / "report.html").read_text())
    assert [len(json.loads(row)["panels"]) for row in shown] == [3, 3, 3]  # those of the first run come from its files
    assert call(part, *flags, "--append", "--threshold", 1000) == 0
    assert "3 results are of another detector or threshold" in capsys.readouterr().out
    (folder / "0.png").unlink()
    assert call(part, *flags, "--overwrite") == 0
    assert [Path(row["path"]).name for row in rows_of(out)] == ["1.png", "2.png"]
    assert sorted(path.name for path in (out / "images").iterdir()) == ["1.png.jpg", "2.png.jpg", "mine.jpg"]
    assert sorted(path.name for path in (out / "maps").iterdir()) == ["1.png.npy", "2.png.npy"]


def test_results_of_an_earlier_version(part, put, folder, tmp_path):
    put(0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.csv").write_text("path,score,decision,error\nx,1,normal,\n")
    flags = ("--input", folder, "--output", out)
    with pytest.raises(UserError, match="give --append"):
        call(part, *flags)
    with pytest.raises(UserError, match=r"without results\.jsonl, in the format of version 0\.1"):
        call(part, *flags, "--append")
    assert (out / "scores.csv").read_text().startswith("path,score")
    assert call(part, *flags, "--overwrite") == 0 and len(rows_of(out)) == 1


def test_exit_codes(part, put, folder, tmp_path, capsys):
    """Those of the table in docs/inspection.md, which has no others; 2 is that of every UserError."""
    text = (PROJECT_ROOT / "docs/inspection.md").read_text(encoding="utf-8")
    table = re.search(r"\| exit code \|.*\n\|---\|---\|\n((?:\|.*\n)+)", text)[1]
    meanings = {int(code): meaning for code, meaning in re.findall(r"\| (\d) \| (.+) \|", table)}
    codes = (run.SOME_FAILED, run.CANNOT_WRITE, run.SOME_FLAGGED, run.SOME_UNDECIDED, run.FEW_IMAGES, run.FOLDER_GONE)
    assert list(meanings) == [0, *codes] and set(codes) <= {2, *DID_WORK}
    assert "images failed" in meanings[1] and "`--fail_on_defect`" in meanings[3] and "`--min_images`" in meanings[5]
    put(0)
    flags = ("--input", folder, "--output", tmp_path / "out", "--overwrite")
    assert call(part, *flags, "--threshold", 1000, "--fail_on_defect") == 0
    assert call(part, *flags, "--threshold", 0.001, "--fail_on_defect") == 3
    assert call(part, *flags, "--threshold", 0.001) == 0
    put(0, name="1.heic")  # left out: it may be an image
    assert call(part, *flags, "--threshold", 1000) == 0
    assert call(part, *flags, "--threshold", 1000, "--fail_on_defect") == 1
    (folder / "1.heic").unlink()
    (folder / "1.png").write_bytes(b"broken")
    assert call(part, *flags, "--threshold", 1000, "--fail_on_defect") == 1
    assert call(part, *flags, "--threshold", 1000, "--min_images", 2) == 5
    said = capsys.readouterr().err
    assert "warning: 1 image scored, --min_images is 2" in said
    assert said.count(f"failed: cannot read the image {folder}/1.png") == 2
    assert call(part, *flags, "--threshold", 0.001, "--fail_on_defect", "--min_images", 2) == 3
    assert call(part, *flags[:-1], "--append", "--fail_on_defect") == 0  # only this call's rows count
    without = FewShotDetector.load(part, "cpu")
    without.threshold = None
    without.loo_scores = None  # as of one support image
    without.save(tmp_path / "without.regad")
    assert call(tmp_path / "without.regad", *flags, "--fail_on_defect") == 4
    assert call(tmp_path / "without.regad", *flags) == 1


def test_a_night_without_images(part, folder, tmp_path, capsys):
    """An empty folder is no error of a nightly job; one that is not there, or should not be empty, is."""
    flags = ("--input", folder, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="no images"):
        call(part, *flags)
    assert call(part, *flags, "--append", "--fail_on_defect") == 0
    said = capsys.readouterr().out
    assert re.search(r"^\d{4}-\d\d-\d\dT\S+ 0 images scored, 0 defective, 0 failed: ", said, re.MULTILINE)
    assert rows_of(tmp_path / "out") == []
    assert call(part, *flags, "--append", "--min_images", 1) == 5
    folder.rmdir()
    with pytest.raises(UserError, match="no such file or folder"):
        call(part, *flags, "--append")


def test_a_watch_has_a_line_for_every_day(watch, put, monkeypatch, capsys):
    """Also for a day without images; only whole days need --min_images."""
    today = date(2026, 11, 27)
    monkeypatch.setattr(run, "_today", lambda: today)

    def next_day() -> None:
        nonlocal today
        today += timedelta(days=1)

    flags = ("--threshold", 0.001, "--min_images", 1)
    assert watch(lambda: put(0), lambda: None, next_day, lambda: None, flags=flags) == 0
    assert " 2026-11-27: 1 image scored, 1 defective, 0 failed\n" in capsys.readouterr().out
    assert watch(next_day, next_day, flags=flags) == 5
    said = capsys.readouterr()
    assert " 2026-11-28: 0 images scored" in said.out and " 2026-11-29: 0 images scored" in said.out
    assert said.err.count("0 images scored, --min_images is 1") == 1


def test_a_watched_folder_that_is_gone_or_replaced(watch, put, folder, capsys):
    assert watch(lambda: folder.rmdir()) == 6
    assert re.search(r"^\d{4}-\d\d-\d\dT\S+ warning: the folder \S+ is gone", capsys.readouterr().err, re.MULTILINE)
    folder.mkdir()
    moved = folder.with_name("moved")
    steps = [lambda: folder.rename(moved), lambda: None, lambda: moved.rename(folder), lambda: put(0), lambda: None]
    assert watch(*steps) == 0
    said = re.findall(r" warning: the folder (.*)", capsys.readouterr().err)
    assert said == [f"{folder} is gone or was replaced", f"{folder} is there again"]


UNMOUNT = """
import subprocess, sys
from pathlib import Path
from inspection.inputs import Watcher
folder = Path(sys.argv[1])
for place in (folder, folder / "sub"):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    watcher = Watcher(folder, folder.with_name("out"), set())
    watcher.scan()
    subprocess.run(["umount", place], check=True)
    watcher.scan()
    print(watcher.notes == [f"the folder {place} is gone or was replaced"], watcher.is_gone)
"""


def test_a_folder_that_is_unmounted(tmp_path):
    """In a namespace of its own, for which root is needed."""
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    command = ["unshare", "-m", sys.executable, "-c", UNMOUNT, str(tmp_path / "in")]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True True", "True False"], done.stderr


def test_a_full_disk_ends_with_the_summary(part, put, folder, tmp_path, capsys, monkeypatch):
    """The file is named, what was found so far is said, and decides on the exit code."""
    put(0, 1)
    flags = ("--input", folder, "--output", tmp_path / "out", "--threshold", 0.001)
    write, rows = ResultFiles.add, []

    def add(self, row) -> None:
        with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patched:
            if rows:
                patched.setattr(self, "_record", full)
            write(self, row)
        rows.append(row)

    monkeypatch.setattr(ResultFiles, "add", add)
    assert call(part, *flags, "--fail_on_defect") == 3
    said = capsys.readouterr()
    assert f"error: cannot write {tmp_path}/out/results.jsonl: No space left on device" in said.err
    assert "stopped: 1 image scored, 1 defective" in said.out and "Traceback" not in said.err
    monkeypatch.undo()
    assert call(part, *flags, "--append") == 0 and len(rows_of(tmp_path / "out")) == 2


def test_a_second_run_into_the_same_output_is_refused(part, put, folder, tmp_path, monkeypatch):
    """It starts when the first has scored its first image."""
    put(0, 1)
    flags, add, refused = ("--input", folder, "--output", tmp_path / "out"), ResultFiles.add, []

    def start_another(self, row) -> None:
        if not refused:
            with pytest.raises(UserError, match=r"another process writes .*results\.jsonl") as caught:
                call(part, *flags, "--overwrite")
            refused.append(caught.value)
        add(self, row)

    monkeypatch.setattr(ResultFiles, "add", start_another)
    assert call(part, *flags) == 0
    assert refused and len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_keeps_its_rows_and_goes_on(part, put, folder, tmp_path, monkeypatch, capsys, number):
    """The signal comes while a row is written: the row is whole in all files."""
    put(0, 1, 2)
    flags = ("--input", folder, "--output", tmp_path / "out")
    add = ResultFiles.add

    def interrupted_add(self, row) -> None:
        os.kill(os.getpid(), number)
        add(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(ResultFiles, "add", interrupted_add)
        assert call(part, *flags) == 0
    assert len(rows_of(tmp_path / "out")) == 1 and "stopped: 1 image scored" in capsys.readouterr().out
    assert call(part, *flags, "--append") == 0
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "out")] == ["0.png", "1.png", "2.png"]


def test_images_to_look_at_are_printed_and_the_page_says_why(part, put, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "MOST_FLAGGED", 2)
    put(0, 1)
    Image.new("L", (80, 60)).save(folder / "black.png")
    out = tmp_path / "out"
    assert call(part, "--input", folder, "--output", out, "--threshold", 0.001) == 0
    printed = capsys.readouterr().out
    rows = json.loads((out / "scores.json").read_text())["images"]
    flagged = sorted(rows, key=lambda row: -row["score"])
    said = [f"{row['path']}: {row['score']:.3f} {row['decision']}" for row in flagged]
    assert [line in printed for line in said] == [True, True, False] and "and 1 more, see" in printed
    (row,) = [row for row in flagged if row["decision"] == "review"]
    assert row["reason"] == "hardly any contrast"
    assert '"reason": "hardly any contrast"' in (out / "report.html").read_text()


def test_a_lamp_that_fails_is_said_at_the_end(part, images, folder, tmp_path, capsys):
    """With fewer images than a drift needs, nothing is said; images of earlier runs count."""
    for number in range(20):
        image = Image.open(io.BytesIO(images[number % len(images)])).convert("RGB")
        image.point(lambda value: value * 0.6).save(folder / f"{number}.png")
        if number in (18, 19):
            assert call(part, "--input", folder, "--output", tmp_path / "out", "--append", "--no_images") == 0
            sentence = "warning: the newest 20 images are darker than the support images: light"
            assert (sentence in capsys.readouterr().err) == (number == 19)
    assert any("darker" in said for said in json.loads((tmp_path / "out/scores.json").read_text())["warnings"])


def test_the_reader_of_the_lines_goes_away(part, put, folder, tmp_path):
    put(0, 1)
    flags = ["--detector", str(part), "--device", "cpu", "--input", str(folder), "--output", str(tmp_path / "out")]
    command = [sys.executable, "predict.py", *flags, "--jsonl"]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0 and "has closed the stream" in errors and "Traceback" not in errors
    assert "Exception ignored" not in errors and len(rows_of(tmp_path / "out")) == 2


def test_a_page_is_not_written_at_every_arrival(watch, put, tmp_path, monkeypatch):
    """Rows are appended one by one; scores.json and the page follow at intervals and at the end."""
    written = []
    monkeypatch.setattr("inspection.run.write_page", lambda *content: written.append(content))
    watch(*(step for number in range(4) for step in (lambda number=number: put(number), lambda: None)))
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 4 and len(written) == 2


def test_another_threshold_is_saved_without_the_network(part, tmp_path, monkeypatch):
    """But for the blank image that shows whether the file can be used."""
    original = FewShotDetector.features

    def features(self, inputs):
        assert not inputs.any(), "the network ran"
        return original(self, inputs)

    monkeypatch.setattr(FewShotDetector, "features", features)
    monkeypatch.setattr(FewShotDetector, "fit", lambda *_: pytest.fail("the detector was fitted"))
    assert call(part, "--threshold", 30, "--save", tmp_path / "b.regad") == 0
    before, after = FewShotDetector.load(part, "cpu"), FewShotDetector.load(tmp_path / "b.regad", "cpu")
    assert after.threshold == before.threshold._replace(value=30.0, how="given", rate=None)
    assert after.identity() == before.identity()


def test_the_commands_of_the_docs(images, tmp_path, monkeypatch, capsys):
    """docs/inspection.md leads from four photos to a nightly job; its commands are run as they stand there."""
    text = (PROJECT_ROOT / "docs/inspection.md").read_text(encoding="utf-8")
    first_block = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1]
    steps = [line for line in first_block.splitlines() if line.startswith("python predict.py")]
    (nightly,) = [step for step in steps if "--append" in step]
    (crontab,) = re.findall(r"^30 2 .*$", text, flags=re.MULTILINE)
    assert len(steps) == 4 and nightly.removeprefix("python") in crontab
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(
        ["good_1", "good_2", "good_3", "good_4", "photos/a", "camera/c", "defects/d", "normal/e", "normal/f"]
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}.png").write_bytes(images[number])
    # a defect that no detector of drawn images misses: others are not saved
    ImageOps.invert(Image.open("defects/d.png").convert("RGB")).save("defects/d.png")
    for step in [*steps, nightly]:
        pauses = mock.Mock(side_effect=[None, KeyboardInterrupt])
        monkeypatch.setattr("inspection.run.time.sleep", pauses)
        fresh = ["--weights", "none", "--img_size", "64"] if "--support" in step else []
        capsys.readouterr()
        with suppress(SystemExit):
            predict.main([*step.split()[2:], *fresh, "--device", "cpu"])
    assert "1 of 1 images have results in nightly already" in capsys.readouterr().err
    assert [len(rows_of(Path(name))) for name in ("out", "nightly", "arrived")] == [1, 1, 1]
    how = json.loads(Path("nightly/scores.json").read_text())["threshold"]["how"]
    assert "2 further normal images" in how
