"""train.py killed at any point: the files next to the state follow it, the end has the bits of an undisturbed run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from examples.demo_data import write_dataset
from models.regad import CHECKPOINT_PARTS, RECIPE
from reports.figures import METADATA
from tests.training.test_training import arguments
from utils.naming import CheckpointFiles, lock_file

CHANGES = {"obj": "weave", "epochs": 3, "inferences": 1, "lr": 0.003, "seed": 1, "save_every": 0}  # epoch 2 is selected
TIMES = ("seconds", "elapsed_seconds", "scoring_seconds", "date")
TRIALS = 7  # the first file operations: train.py tries to write each of its files and the cache
OF_THE_CALL = ("resume", "overwrite", "save_dir", "commit")  # may differ between calls of one run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    write_dataset(root / "data", categories=("ring", "weave"), train=4, good=2, defective=1, size=64)
    return root


def command(data: Path, folder: Path, *flags: str, **changes: object) -> list[str]:
    given = CHANGES | {"cache_dir": data / "cache", "save_dir": folder} | changes
    return [*arguments(data / "data", folder, **given), *flags]


def files(folder: Path) -> CheckpointFiles:
    return CheckpointFiles.of(folder, "rotation_scale", 1, "weave")


def train_until(argv: list[str], operation: int | None) -> None:
    """Runs train.py in this process and kills it (SIGKILL) in place of its file operation of this number, from 1."""
    counter = iter(range(1, 10**6))

    def counted(original: Callable) -> Callable:
        def call(*given, **named):
            if next(counter) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)

        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    train.main(argv)


def start(argv: list[str], operation: int | None = None) -> BaseProcess:
    """`train_until` in a process that is forked from a server which has imported train.py."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "training.run", "torch._dynamo"])  # which the optimizer imports later
    process = context.Process(target=train_until, args=(argv, operation))
    process.start()
    return process


def killed(argv: list[str], operation: int | None = None, seconds: float | None = None) -> bool:
    """Runs train.py up to the file operation, or for these seconds. False if it ended by itself before."""
    process = start(argv, operation)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def lasting(value: object) -> object:
    """A record or a part of it, without times and what belongs to a call rather than to the run."""
    if isinstance(value, list):
        return [lasting(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: lasting(item) for name, item in value.items() if name not in (*TIMES, *OF_THE_CALL)}


def weights(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def assert_same_weights(first: dict, second: dict) -> None:
    assert lasting(first[RECIPE]) == lasting(second[RECIPE])
    for part in CHECKPOINT_PARTS:
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


def assert_same_run(expected: CheckpointFiles, found: CheckpointFiles) -> None:
    """All files are those of an undisturbed run, and there are no others."""
    curves = [found.curve.with_suffix(suffix) for suffix in METADATA]
    portable = [file.with_suffix(".safetensors") for file in (found.selected, found.last)]
    own = [found.selected, found.last, found.epochs, found.record, found.card, *portable, *curves]
    assert sorted(found.state.parent.iterdir()) == sorted([*own, lock_file(found.state)])
    for file in portable:  # the weights again
        saved = weights(file.with_suffix(".pt"))
        assert all(
            torch.equal(value, saved[name.split(".")[0]][name.partition(".")[2]])
            for name, value in load_file(file).items()
        )
    assert_same_weights(weights(expected.selected), weights(found.selected))
    assert_same_weights(weights(expected.last), weights(found.last))
    records = [json.loads(file.read_text()) for file in (expected.record, found.record)]
    assert lasting(records[0]) == lasting(records[1])
    lines = [json.loads(line) for line in found.epochs.read_text().splitlines()]
    assert lines == records[1]["epochs"]


def assert_consistent(found: CheckpointFiles) -> None:
    """What a kill left: whole files, and without a state a finished run whose files fit each other, or nothing."""
    there = {
        name: weights(file) for name, file in (("selected", found.selected), ("last", found.last)) if file.exists()
    }
    if found.state.exists():
        state = weights(found.state)
        assert state["selected"][RECIPE]["epoch"] == state["progress"]["selected"]
    elif not found.record.exists():
        assert not there
    else:
        record = json.loads(found.record.read_text())
        assert [there[name][RECIPE]["epoch"] for name in there] == [
            record["selected_epoch"],
            record["epochs"][-1]["epoch"],
        ]
        assert [json.loads(line) for line in found.epochs.read_text().splitlines()] == record["epochs"]


@pytest.fixture(scope="module")
def undisturbed(data) -> Path:
    train.main(command(data, data / "undisturbed"))
    assert json.loads(files(data / "undisturbed").record.read_text())["selected_epoch"] == 2
    return data / "undisturbed"


@pytest.fixture(scope="module")
def other(data) -> Path:
    """A finished run of one epoch with another seed."""
    train.main(command(data, data / "other", seed=0, epochs=1, save_every=300))
    return data / "other"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix != ".tmp"}


@pytest.mark.slow
def test_killed_again_and_again(data, undisturbed, other, tmp_path):
    """A new run over a finished one, killed before and after its first commit; each call that resumes is killed too."""
    folder = tmp_path / "run"
    shutil.copytree(other, folder)
    for operation in (1, TRIALS + 2):  # in place of removing a trial file, and of giving the state its name
        assert killed(command(data, folder, "--overwrite"), operation)
        assert bytes_of(folder) == bytes_of(other)
    assert killed(command(data, folder, "--overwrite"), TRIALS + 4)  # among the files that follow the state
    for limit in ({"operation": TRIALS + 9}, {"operation": TRIALS + 16}, {"seconds": random.Random(0).uniform(0, 1)}):
        killed(command(data, folder, "--resume"), **limit)
        assert_consistent(files(folder))
    assert not killed(command(data, folder, "--resume"))
    assert_same_run(files(undisturbed), files(folder))


@pytest.mark.slow
def test_killed_at_every_second_file_operation_over_a_finished_run(data, undisturbed, other, tmp_path):
    """A file is flushed, renamed, and its temporary name removed: steps of two meet all of them in turn."""
    folder, found = tmp_path / "run", files(tmp_path / "run")
    for operation in range(TRIALS, 1000, 2):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(other, folder)
        if not killed(command(data, folder, "--overwrite"), operation):
            break
        assert_consistent(found)
        if not found.state.exists():  # before its first commit, nothing of the finished run has changed
            assert bytes_of(folder) == bytes_of(other)
        again = "--resume" if found.state.exists() or not found.record.exists() else "--overwrite"
        assert not killed(command(data, folder, again))
        assert_same_run(files(undisturbed), found)
    assert operation > TRIALS + 40


@pytest.mark.slow
def test_killed_at_100_random_points(data, undisturbed, tmp_path):
    """New runs, new runs over finished and unfinished ones, and resumed runs, in random order."""
    generator, kills, over = random.Random(0), 0, set()
    assert not killed(command(data, tmp_path / "first"))  # starts the server, which takes longer than a run
    started = time.monotonic()
    assert not killed(command(data, tmp_path / "measure"))
    duration, found = time.monotonic() - started, files(tmp_path / "run")
    while kills < 100:
        finished, begun = found.record.exists(), found.state.exists()
        flag = "--overwrite" if finished and not begun else generator.choice(("--resume", "--resume", "--overwrite"))
        if generator.random() < 0.05:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        over.add((flag, finished, begun))
        kills += killed(command(data, tmp_path / "run", flag), seconds=generator.uniform(0, 1.2 * duration))
        assert_consistent(found)
    assert {("--overwrite", True, False), ("--overwrite", False, True), ("--resume", False, True)} <= over
    assert not killed(command(data, tmp_path / "run", "--resume"))
    assert_same_run(files(undisturbed), found)
