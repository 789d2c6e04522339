"""Complete files, errors, times, provenance, fingerprints, signals and progress."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import test as test_command
from utils import files, progress
from utils import fingerprint as fingerprint_module
from utils.devices import resolve_device, seed_everything
from utils.errors import UserError, format_elapsed, run_command
from utils.files import PROJECT_ROOT, load_tensors, save_tensors, whole_file, write_json
from utils.fingerprint import FileDigests, changes, fingerprint
from utils.interrupts import Interrupts
from utils.progress import ProgressBar
from utils.records import git_commit, provenance


def test_whole_file_leaves_no_file_after_an_error(tmp_path):
    target = tmp_path / "deep" / "record.json"
    with pytest.raises(RuntimeError), whole_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []


def test_whole_file_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "record.json"
    write_json(target, {"number": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"number": float("nan")})
    assert json.loads(target.read_text()) == {"number": 1}
    assert list(tmp_path.iterdir()) == [target]


KILLED_WRITER = """
import os, sys; from pathlib import Path; from utils.files import whole_file
first, second, third = map(whole_file, map(Path, sys.argv[1:]))
with first as one, second as two, third as three:
    for temporary in (one, two, three): temporary.touch()
    os._exit(1)
"""


def test_leftovers_of_killed_processes_are_removed_after_a_day(tmp_path, monkeypatch):
    """Those of any target in the folder, once per process; younger ones may be written to at this moment."""
    monkeypatch.setattr(files, "_tidied", set())
    targets = [str(tmp_path / name) for name in ("record.json", "an image.png", "x" * 250)]
    subprocess.run([sys.executable, "-c", KILLED_WRITER, *targets], cwd=PROJECT_ROOT, check=False)
    leftovers = list(tmp_path.iterdir())
    own = [tmp_path / name for name in ("notes.tmp", ".notes.tmp", ".a.1.0123456.tmp", "a.12.01234567.tmp")]
    for path in own:
        path.touch()
    link = tmp_path / ".a.12.01234567.tmp"
    link.symlink_to(own[0])
    assert len(leftovers) == 3
    now = time.time()
    for path in [*own, *leftovers[1:]]:
        os.utime(path, (now, now - files.LEFTOVER_SECONDS - 60))
    os.utime(leftovers[0], (now, now - files.LEFTOVER_SECONDS + 60))
    write_json(tmp_path / "record.json", {})
    assert sorted(tmp_path.iterdir()) == sorted([*own, link, leftovers[0], tmp_path / "record.json"])
    os.utime(leftovers[0], (0, 0))
    monkeypatch.setattr(os, "scandir", lambda _: pytest.fail("the folder is listed again"))
    write_json(tmp_path / "other.json", {})
    assert leftovers[0].exists()


def test_a_killed_writer_leaves_a_complete_file(tmp_path):
    path, content = tmp_path / "weights.pt", torch.ones(200_000)
    save_tensors(path, content)
    generator = random.Random(0)
    for _ in range(10):
        child = os.fork()
        if not child:
            try:
                while True:
                    save_tensors(path, content)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.1 * generator.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert load_tensors(path, "file").sum() == 200_000


def test_run_command_turns_user_errors_into_exit_code_2(capsys):
    def main(argv):
        raise UserError("no data here")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no data here\n"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), FileNotFoundError(2, "No such file", "x"), BrokenPipeError(32, "")]
)
def test_run_command_does_not_catch_other_errors(error):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        run_command(main)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_lack_of_memory_is_one_sentence(error, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main, test_command.get_args_parser)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith("error: not enough memory: ")
    assert printed.count("\n") == 1 and "(see --batch_size, --img_size, --num_workers, --device)" in printed


@pytest.mark.parametrize("name", [None, "x/scores.csv"])
def test_a_disk_that_is_full_anywhere(name, capsys):
    """Also while a table or a log is written that is not a whole file."""

    def main(argv):
        raise OSError(28, "No space left on device", name)

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: cannot write {name or 'a file'}: No space left on device\n"


def test_whole_file_blames_only_what_it_writes(tmp_path):
    """A file that is read meanwhile, and another fault, stay what they are."""
    for error in (FileNotFoundError(2, "No such file", "/other"), RuntimeError("shapes")):
        with pytest.raises(type(error)) as caught, whole_file(tmp_path / "x"):
            raise error
        assert caught.value is error


def test_names_as_long_as_the_system_allows(tmp_path):
    """The temporary file has a name of its own, which is not longer."""
    for name in ("x" * 255, "\u00e9" * 127, "\U0001f600" * 63):
        write_json(tmp_path / name, {})
        assert (tmp_path / name).read_text() == "{}\n"


@pytest.mark.parametrize("code", [None, 1])
def test_a_command_that_did_its_work_says_how_long_it_took(code, capsys):
    """On stderr: what a command writes to a file or a pipe stays as it is."""

    def main(argv):
        print("[]")
        if code:
            sys.exit(code)

    if code:
        with pytest.raises(SystemExit):
            run_command(main)
    else:
        run_command(main)
    printed = capsys.readouterr()
    assert printed.out == "[]\n" and printed.err == "finished in 0.0 s\n"


def test_help_and_mistakes_have_no_time(capsys):
    for code in (0, 2):
        with pytest.raises(SystemExit):
            run_command(lambda argv, code=code: sys.exit(code))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s")]
    + [(192, "3 min 12 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min"), (90000, "25 h 0 min")],
)
def test_elapsed_times(seconds, text):
    assert format_elapsed(seconds) == text


def test_one_seed_for_all_generators():
    def draw():
        seed_everything(3)
        return random.random(), np.random.random(), torch.rand(1).item()

    assert draw() == draw()


def test_provenance_names_commit_versions_and_device():
    record = provenance(torch.device("cpu"))
    assert record["commit"] == git_commit()
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["device"].startswith("cpu")
    json.dumps(record, allow_nan=False)


@given(
    st.sampled_from(("mps", "xpu", "hpu", "meta", "xla", "vulkan", "privateuseone", "cuda:99", "mps:0", ""))
    | st.from_regex(r"[a-z]{1,6}(:-?[0-9]{1,3})?", fullmatch=True)
)
def test_a_device_can_be_used_or_costs_one_sentence(name):
    try:
        device = resolve_device(name)
    except UserError as error:
        assert repr(name) in str(error) and "try cpu" in str(error) and "\n" not in str(error)
    else:
        assert device.type in ("cpu", "cuda") and torch.ones(2, device=device).sum().item() == 2


WITHOUT_UNIX = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # import raises ImportError, as on Windows
sys.path.insert(0, {root!r})
import check_data, export, make_support, predict, test, train
common = ["--data_type", "folder", "--data_path", {data!r}]
small = ["--weights", "none", "--img_size", "64", "--device", "cpu", "--num_workers", "1"]
scored = ["--obj", "ring", "--shot", "1", "--inferences", "1"]
out = {out!r}
train.main([*common, *small, *scored, "--epochs", "1", "--cache_dir", "none", "--save_dir", out + "/save"])
test.main([*common, *small, *scored, "--save_dir", out + "/save", "--output", out])
image = {data!r} + "/ring/train/good/000.png"
fitted = ["--backbone", "resnet18", "--support", image, image]
predict.main([*small, *fitted, "--input", image, "--output", out + "/predicted"])
"""


@pytest.mark.slow
def test_commands_work_without_the_modules_of_unix(demo_data, tmp_path):
    code = WITHOUT_UNIX.format(root=str(PROJECT_ROOT), data=str(demo_data), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ring_1_rotation_scale.json").read_text())["peak_memory_mb"] is None
    assert (tmp_path / "predicted/scores.csv").is_file()


SETTINGS, INPUTS = {"img_size": 224, "backbone": "resnet18"}, {"test_images": "a" * 64}


def test_equal_after_json_and_independent_of_code(monkeypatch):
    before = fingerprint(SETTINGS, INPUTS)
    assert changes(json.loads(json.dumps(before)), fingerprint(SETTINGS, INPUTS)) == []
    monkeypatch.setattr(fingerprint_module, "METHOD_VERSION", fingerprint_module.METHOD_VERSION + 1)
    assert changes(before, fingerprint(SETTINGS, INPUTS)) == [
        f"method_version {fingerprint_module.METHOD_VERSION - 1}, now {fingerprint_module.METHOD_VERSION}"
    ]


def test_what_differs_is_named():
    now = fingerprint(SETTINGS | {"img_size": 64, "bits": 8}, {"test_images": "b" * 64})
    assert changes(fingerprint(SETTINGS, INPUTS), now) == [
        "img_size 224, now 64",
        "bits None, now 8",
        "other test images",
    ]
    assert changes({"decisive": {}}, now) == changes(None, now) == ["no fingerprint"]


def test_digests_of_files_depend_on_names_and_content_only(tmp_path):
    for folder, order in (("one", "ab"), ("other", "ba")):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(name)
    one, other = ([tmp_path / folder / name for name in "ab"] for folder in ("one", "other"))
    digests = FileDigests()
    assert digests.together(one) == digests.together(other[::-1])
    (tmp_path / "other" / "a").write_text("c")
    assert FileDigests().together(one) != FileDigests().together(other)
    assert digests.together(one) == digests.together(other), "each file is read once"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_held_back(number):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    done = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupts() as interrupts:
            with pytest.raises(KeyboardInterrupt), interrupts.held():
                os.kill(os.getpid(), number)
                done.append("written")
            with interrupts.held():
                done.append("not interrupted twice")
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            with pytest.raises(ValueError, match="own error"), interrupts.held():
                os.kill(os.getpid(), number)
                raise ValueError("own error")
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert done == ["written", "not interrupted twice"]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which only the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_per_minute_with_the_time_left(clock, capsys):
    for _ in ProgressBar("decoding", range(10)):
        clock[0] += 30
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 2 of 10 images, 20 %, about 4 min 0 s left",
        "decoding: 4 of 10 images, 40 %, about 3 min 0 s left",
        "decoding: 6 of 10 images, 60 %, about 2 min 0 s left",
        "decoding: 8 of 10 images, 80 %, about 1 min 0 s left",
    ]


def test_short_work_prints_nothing_and_notes_are_shown(clock, capsys):
    assert list(ProgressBar("decoding", "abc")) == list("abc") and not capsys.readouterr().err
    with ProgressBar("epoch 1/2", total=40, unit="steps") as bar:
        for note in ("loss 0.5", ""):
            clock[0] += 59
            bar.advance(10, note)
    assert capsys.readouterr().err == "epoch 1/2: 20 of 40 steps, 50 %, about 1 min 58 s left, loss 0.5\n"


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0)
    assert list(ProgressBar("decoding", range(3))) == [0, 1, 2]
    assert "decoding:   0%" in capsys.readouterr().err
