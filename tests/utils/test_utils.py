"""Complete files, errors, clock, provenance."""

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
from utils import files
from utils.devices import resolve_device, seed_everything
from utils.errors import UserError, format_elapsed, run_command
from utils.files import PROJECT_ROOT, load_tensors, save_tensors, whole_file, write_json
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
