"""reproduce.py on drawn images: the plan, the grid, the weights that are there; killed and undisturbed runs agree."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import reproduce
import train
from experiments import estimate
from experiments import plan as grid_plan
from experiments import runs as grid
from experiments.estimate import Speed, measure_apart
from experiments.results import GRID_FILE, SCHEMA_FILE, read_results
from experiments.runs import is_finished
from experiments.tables import SECONDS, make_tables
from utils.errors import UserError
from utils.files import PROJECT_ROOT

_spec = importlib.util.spec_from_file_location("test_command", PROJECT_ROOT / "test.py")
test_command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(test_command)

SIZE = 64
COMMANDS = {"train.py": train.main, "test.py": test_command.main}


@pytest.fixture
def arguments(demo_data, tmp_path):
    """A small grid: ring and weave, one shot, one epoch, random trunk."""
    return {
        "--objs": ["ring", "weave"],
        "--shots": ["1"],
        "--epochs": ["1"],
        "--inferences": ["2"],
        "--data_type": ["folder"],
        "--data_path": [str(demo_data)],
        "--weights": ["none"],
        "--img_size": [str(SIZE)],
        "--batch_size": ["4"],
        "--num_workers": ["0"],
        "--device": ["cpu"],
        "--cache_dir": [str(tmp_path / "cache")],
        "--output": [str(tmp_path / "out")],
    }


@pytest.fixture(autouse=True)
def speed(monkeypatch, request):
    """A speed that was not measured, which spares the seconds of a process."""
    if "estimate" not in request.node.name:
        monkeypatch.setattr(grid_plan, "measure_apart", lambda *_: Speed(0.01, 0.01))


@pytest.fixture
def in_process(monkeypatch):
    """Commands as calls in this process, which spares them seconds of imports; gives the list of what was run."""
    run = []

    def call(command, log, environment, lock):
        run.append(command)
        COMMANDS[command[0]](list(command[1:]))
        return 0

    monkeypatch.setattr(grid, "_run", call)
    return run


def flat(arguments):
    return [part for flag, values in arguments.items() for part in (flag, *values)]


def plan(arguments):
    return grid_plan.Plan(reproduce.get_args_parser().parse_args(flat(arguments)))


def records(folder):
    """Every round of every record, without times and places."""
    files = [file for file in sorted(Path(folder).glob("*.json")) if file.name != "grid.json"]
    contents = {file.name: json.loads(file.read_text()) for file in files}
    return {name: (content["rounds"], content["epoch"], content["weights"]) for name, content in contents.items()}


def test_dry_run_leaves_nothing(arguments, capsys):
    reproduce.main(flat(arguments) + ["--dry_run"])
    printed = capsys.readouterr().out
    assert "new       ring_1_rotation_scale: about" in printed
    assert "4 cells, 0 finished, 4 to run: about" in printed and "with --jobs 1" in printed
    assert not Path(arguments["--output"][0]).exists()


def test_cells_and_shards(arguments):
    cells = plan(arguments | {"--shots": ["1", "2"], "--select": ["best", "source"]}).cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) == 2 + 2 * 2 * 2
    assert "ring_1-2_rotation_scale_untrained" in names and "weave_2_rotation_scale_source" in names
    shards = [grid_plan.take_shard(cells, f"{number}/3") for number in range(3)]
    assert sorted(cell.name for shard in shards for cell in shard) == sorted(names)
    for wrong in ("3/3", "a/b", "1", "-1/2", "1/0"):
        with pytest.raises(UserError, match="--shard takes I/N"):
            grid_plan.take_shard(cells, wrong)


def test_all_categories(arguments, demo_data):
    assert plan(arguments | {"--objs": ["all"]}).categories == ["ring", "weave"]


@pytest.fixture
def own_data(demo_data, tmp_path):
    return Path(shutil.copytree(demo_data, tmp_path / "own"))


def key_of(arguments, name):
    return {cell.name: cell.key for cell in plan(arguments).cells()}[name]


def test_every_command_gets_the_bit_depth(arguments):
    commands = [command for cell in plan(arguments | {"--bits": ["12"]}).cells() for command in cell.commands]
    assert {command[0] for command in commands} == {"train.py", "test.py"}
    assert all(command[command.index("--bits") + 1] == "12" for command in commands)


def test_what_makes_a_cell_another_one(arguments, demo_data, own_data, monkeypatch):
    """Arguments, images, masks and code do; where the data lie and other categories' test images do not."""
    name = "ring_1_rotation_scale"
    original = key_of(arguments, name)
    arguments["--data_path"] = [str(own_data)]
    assert key_of(arguments, name) == original
    for change in ({"--epochs": ["2"]}, {"--seed": ["1"]}, {"--inferences": ["3"]}, {"--bits": ["12"]}):
        assert key_of(arguments | change, name) != original
    for change in ({"--batch_size": ["5"]}, {"--bits": ["16"]}):
        assert key_of(arguments | change, name) != original
    assert key_of(arguments | {"--num_workers": ["1"]}, name) == original

    def swap(folder):
        first, second = sorted(folder.iterdir())[:2]
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    swap(own_data / "weave/test/good")
    assert key_of(arguments, name) == original
    for place in ("weave/train/good", "ring/test/good", "ring/ground_truth/scratch", "ring/train/good"):
        swap(own_data / place)
        assert key_of(arguments, name) != original, place
        swap(own_data / place)
    assert key_of(arguments, name) == original
    monkeypatch.setattr(grid_plan, "code_version", lambda: "another")
    assert key_of(arguments, name) != original


def test_the_support_set_of_the_held_out_category_counts(arguments, tmp_path):
    """With --select source it chooses the epoch; the other cells do not read it."""
    arguments |= {"--select": ["best", "source"], "--support_path": [str(tmp_path / "support")]}
    before = {name: key_of(arguments, name) for name in ("ring_1_rotation_scale", "ring_1_rotation_scale_source")}
    (tmp_path / "support" / "weave").mkdir(parents=True)
    (tmp_path / "support" / "weave" / "1_2.json").write_text("{}")
    assert key_of(arguments, "ring_1_rotation_scale") == before["ring_1_rotation_scale"]
    assert key_of(arguments, "ring_1_rotation_scale_source") != before["ring_1_rotation_scale_source"]


def keys_of(arguments):
    return {cell.name: cell.key for cell in plan(arguments).cells()}


def train_arguments(arguments, name):
    """What train.py makes of its command in a cell."""
    (command,) = (cell.commands[0] for cell in plan(arguments).cells() if cell.name == name)
    return train.get_args_parser().parse_args(command[1:])


@pytest.fixture
def four_categories(demo_data, tmp_path):
    """The demo's ring and weave, and bolt and nut that are the other one's images."""
    for name, origin in (("ring", "ring"), ("weave", "weave"), ("bolt", "weave"), ("nut", "ring")):
        shutil.copytree(demo_data / origin, tmp_path / "four" / name)
    return tmp_path / "four"


def test_sources_are_passed_on_and_part_of_the_key(arguments, four_categories):
    """Each cell without its own category; other categories no longer count, and untrained cells have no sources."""
    arguments |= {"--data_path": [str(four_categories)], "--select": ["best", "source"]}
    trained = {f"{name}_1_rotation_scale{which}" for name in ("ring", "weave") for which in ("", "_source")}
    default = keys_of(arguments)
    some = arguments | {"--sources": ["weave", "ring", "bolt"]}
    chosen = keys_of(some)
    assert {name for name in chosen if chosen[name] != default[name]} == trained
    assert train_arguments(some, "ring_1_rotation_scale").sources == ["bolt", "weave"]
    assert train_arguments(some, "weave_1_rotation_scale_source").sources == ["bolt", "ring"]
    assert train_arguments(arguments, "ring_1_rotation_scale").sources is None
    every = keys_of(arguments | {"--sources": ["nut", "weave", "ring", "bolt"]})
    assert every == default  # the same training under another spelling
    next((four_categories / "nut/train/good").iterdir()).unlink()
    assert keys_of(some) == chosen
    assert {name for name, key in keys_of(arguments).items() if key != default[name]} == trained
    with pytest.raises(UserError, match="--sources names ring alone, which is a target"):
        plan(arguments | {"--sources": ["ring"]}).cells()


def test_no_category_to_hold_out(arguments, demo_data, tmp_path):
    shutil.copytree(demo_data / "ring", tmp_path / "one" / "ring")
    arguments |= {"--data_path": [str(tmp_path / "one")], "--objs": ["ring"], "--select": ["source"]}
    with pytest.raises(UserError, match="no category to train on besides ring; --select source needs two"):
        plan(arguments).cells()


def test_sources_of_another_data_set(arguments, four_categories, demo_data, tmp_path):
    """There a category of the target's name is a source; the data set of the targets under a link is no other one."""
    arguments |= {"--select": ["best", "source"], "--objs": ["ring"]}
    default, name = keys_of(arguments), "ring_1_rotation_scale"
    other = arguments | {"--source_path": [str(four_categories)]}
    found = keys_of(other)
    assert {one for one in found if found[one] == default[one]} == {f"{name}_untrained"}
    assert train_arguments(other, name).source_path == four_categories
    assert train_arguments(other, name).sources is None
    assert train_arguments(other | {"--sources": ["ring", "nut"]}, name).sources == ["nut", "ring"]
    next((four_categories / "ring/train/good").iterdir()).unlink()
    assert keys_of(other)[name] != found[name]
    found = keys_of(other)
    next((four_categories / "weave/test/good").iterdir()).unlink()  # weave is held out
    assert keys_of(other)[name] == found[name]
    assert keys_of(other)[f"{name}_source"] != found[f"{name}_source"]
    (tmp_path / "link").symlink_to(demo_data)
    assert keys_of(arguments | {"--source_path": [str(tmp_path / "link")]}) == default


def test_the_recipe_is_passed_on_and_part_of_the_key(arguments, monkeypatch):
    name = "ring_1_rotation_scale"
    default, untrained = key_of(arguments, name), key_of(arguments, f"{name}_untrained")
    for change in ({"--lr": ["0.5"]}, {"--momentum": ["0.5"]}, {"--amp": ["bf16"]}):
        (cell,) = (cell for cell in plan(arguments | change).cells() if cell.name == name)
        ((flag, (value,)),) = change.items()
        train_command = cell.commands[0]
        assert train_command[train_command.index(flag) + 1] == value and cell.key != default
        train.get_args_parser().parse_args(train_command[1:])
        assert key_of(arguments | change, f"{name}_untrained") == untrained
    parsed = vars(train.get_args_parser().parse_args(["--obj", "ring"]))
    assert {key: parsed[key] for key in grid_plan.RECIPE} == grid_plan.RECIPE
    monkeypatch.setattr(grid_plan, "RECIPE", {})  # the keys of before
    assert key_of(arguments, name) == default


def test_the_estimate_is_measured_in_a_process_of_its_own(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch, "rand", lambda *_: pytest.fail("measured in the driver"))
    args = reproduce.get_args_parser().parse_args(flat(arguments))
    speed = measure_apart(args, {"OMP_NUM_THREADS": "1"})
    assert 0 < speed.network < 1 and 0 < speed.training < 1
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        args.device = "cuda:99"
        measure_apart(args, {})
    assert measure_apart(args, {"PYTHONHOME": "/nowhere"}) is None
    assert "no estimate, its measurement failed" in capsys.readouterr().out


def test_estimate_with_the_batches_of_a_run(monkeypatch):
    """On CUDA a batch of the run; a pass of a few images would measure launches. The device is played."""
    passes, steps = [], []

    class Network:
        def to(self, device):
            return self

        def features(self, images):
            passes.append(len(images))

    monkeypatch.setattr(estimate, "command_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(estimate, "scoring_network", lambda *_: Network())
    monkeypatch.setattr(estimate, "fuse_conv_bn", lambda network: network)
    monkeypatch.setattr(estimate, "_training_step", lambda settings, images: lambda: steps.append(len(images)))
    settings = estimate.get_args_parser().parse_args(["--batch_size", "24", "--img_size", "32"])
    estimate.measure(settings)
    assert (passes, steps) == ([8, 8], [4, 4])
    passes.clear(), steps.clear()
    monkeypatch.setattr(estimate, "_batches", lambda device, batch_size: (batch_size, 64, 10))
    estimate.measure(settings)
    assert (passes, steps) == ([64] * 11, [24] * 11)


def test_where_locks_fail_a_shard_is_needed(arguments, in_process, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(grid.fcntl, "flock", fails)
    arguments |= {"--objs": ["ring"]}
    with pytest.raises(UserError, match="No locks available"):
        reproduce.main(flat(arguments))
    assert not in_process
    reproduce.main([*flat(arguments), "--shard", "0/2"])
    reproduce.main([*flat(arguments), "--shard", "1/2"])
    assert len(records(arguments["--output"][0])) == 3


def test_grid_end_to_end(arguments, in_process, capsys):
    """All kinds of weights, tables in four formats, nothing twice; `best` is what train.py's own scores say."""
    output = Path(arguments["--output"][0])
    reproduce.main(flat(arguments))
    assert len(in_process) == 2 + 2 * 3
    assert "| mean |" in capsys.readouterr().out
    assert set(records(output)) == {
        f"{category}_1_rotation_scale{kind}.json"
        for category in ("ring", "weave")
        for kind in ("", "_last", "_untrained")
    }
    for ending in ("md", "csv", "tex", "html"):
        assert "ring" in (output / f"tables.{ending}").read_text()
    assert (
        "| category | training | scoring, untrained | scoring, last | scoring, best |"
        in (output / "tables.md").read_text()
    )
    for category in ("ring", "weave"):
        (record,) = (output / "save_checkpoints").rglob(f"{category}_1_*_record.json")
        epochs, best = json.loads(record.read_text())["epochs"], json.loads(record.read_text())["selected_epoch"]
        for kind, epoch in (("_untrained", 0), ("_last", 1), ("", best)):
            rounds, recorded_epoch, _ = records(output)[f"{category}_1_rotation_scale{kind}.json"]
            assert recorded_epoch == epoch
            for one, other in zip(rounds, epochs[epoch]["rounds"], strict=True):
                assert {key: one[key] for key in other} == pytest.approx(other, abs=1e-9)
    in_process.clear()
    reproduce.main(flat(arguments))
    assert not in_process and "4 finished, 0 to run" in capsys.readouterr().out
    reproduce.main(["--report", str(output)])
    assert "| mean |" in capsys.readouterr().out and not in_process


def test_the_records_of_test_py_keep_to_the_schema(arguments, in_process):
    jsonschema = pytest.importorskip("jsonschema")
    arguments |= {"--objs": ["ring"], "--scorer": ["gaussian", "neighbours"]}
    reproduce.main(flat(arguments))
    output = Path(arguments["--output"][0])
    files = [file for file in output.glob("*.json") if file.name != GRID_FILE]
    assert len(files) == 6
    for file in files:
        jsonschema.validate(json.loads(file.read_text()), json.loads(SCHEMA_FILE.read_text()))


def test_only_what_was_planned_is_a_column(arguments, in_process, capsys):
    """A backbone that is not trained has no column of missing trained weights; what fails keeps its column."""
    planned = plan(arguments)
    assert planned.asked(planned.cells())["kinds"] == ["untrained", "last", "best"]
    source = plan(arguments | {"--select": ["source"], "--scorer": ["gaussian", "neighbours"]})
    kinds = ["untrained", "source", "untrained, neighbours", "source, neighbours"]
    assert source.asked(source.cells())["kinds"] == kinds
    reproduce.main([*flat(arguments), "--shard", "0/4"])  # the untrained cell of ring
    assert "| category | untrained | last | best |" in capsys.readouterr().out


def test_weights_that_are_there(arguments, in_process, tmp_path, monkeypatch, capsys):
    """--eval_only: one pass over the test images for equal weights of several shots; what is not there is named."""
    source = tmp_path / "found"
    train.main(
        [*flat({flag: arguments[flag] for flag in ("--data_type", "--data_path", "--weights", "--img_size")})]
        + ["--obj", "ring", "--shot", "1", "--epochs", "1", "--inferences", "2"]
        + ["--num_workers", "0", "--device", "cpu", "--cache_dir", "none", "--save_dir", str(source)]
    )
    other = source / "rotation_scale" / "2" / "ring"
    other.mkdir(parents=True)
    shutil.copy(next(source.rglob("ring_1_*_model.pt")), other / "ring_2_rotation_scale_model.pt")
    passes, original = [], test_command.compute_test_features
    monkeypatch.setattr(test_command, "compute_test_features", lambda *a: passes.append(1) or original(*a))
    arguments |= {"--shots": ["1", "2", "3"], "--objs": ["ring"], "--eval_only": [str(source)]}
    reproduce.main(flat(arguments))
    printed = capsys.readouterr().out
    assert "ring_3_rotation_scale_model.pt: the table will show the cell as missing" in printed
    # shots 1 and 2 share one file, chosen by `best`; the last weights of shot 1 are another cell
    assert {name: what[2] for name, what in records(arguments["--output"][0]).items()} == {
        **{f"ring_{shot}_rotation_scale.json": "best" for shot in (1, 2)},
        "ring_1_rotation_scale_last.json": "last",
    }
    assert len(passes) == 2 and {command[0] for command in in_process} == {"test.py"}
    reproduce.main(flat(arguments))
    assert len(passes) == 2
    with pytest.raises(UserError, match="no checkpoint of the grid"):
        reproduce.main(flat(arguments | {"--eval_only": [str(tmp_path / "nowhere")]}))


def test_a_failed_cell_gives_exit_code_1(arguments, monkeypatch, capsys):
    monkeypatch.setattr(
        grid, "_run", lambda command, *_: 7 if "weave" in command else COMMANDS[command[0]](command[1:])
    )
    with pytest.raises(SystemExit) as caught:
        reproduce.main(flat(arguments))
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert "FAILED weave_1_rotation_scale: train.py ended with code 7" in printed.err
    assert "out/logs/weave_1_rotation_scale.log" in printed.err and "2 of 4 cells failed" in printed.err
    assert "| weave | missing | missing | missing |" in printed.out and "| ring | " in printed.out


def test_readme_section(arguments, in_process, tmp_path):
    output = arguments["--output"][0]
    test_command.main(
        [
            *flat(
                {
                    flag: arguments[flag]
                    for flag in ("--data_type", "--data_path", "--img_size", "--output", "--weights")
                }
            )
        ]
        + ["--obj", "ring", "--shot", "1", "--untrained", "--inferences", "1", "--num_workers", "0", "--device", "cpu"]
    )
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: begin -->\noutdated\n<!-- results: end -->\nafter\n")
    for _ in range(2):
        reproduce.main(["--report", output, "--readme", str(readme)])
        text = readme.read_text()
        assert (
            text.startswith("before\n<!-- results: begin -->\n- commit: ")
            and "| ring |" in text
            and "outdated" not in text
        )
        assert text.endswith("<!-- results: end -->\nafter\n")
    readme.write_text("no marks")
    with pytest.raises(UserError, match="needs a line"):
        reproduce.main(["--report", output, "--readme", str(readme)])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--shots": ["0"]}, "--shots must be at least 1"),
        ({"--shots": ["2", "2"]}, "must not contain duplicates"),
        ({"--objs": ["nut"]}, "no category folder"),
        ({"--jobs": ["0"]}, "--jobs must be at least 1"),
        ({"--lr": ["nan"]}, "--lr must not be negative or infinite"),
    ],
)
def test_mistakes_get_one_sentence(arguments, change, sentence):
    with pytest.raises(UserError, match=sentence):
        reproduce.main(flat(arguments | change))


NO_LOCKS = """
import errno, fcntl, runpy, sys
def fails(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fails
del sys.argv[0]
sys.path[0] = sys.argv[0].removesuffix("/reproduce.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(arguments, locks=True) -> subprocess.Popen:
    """A driver; without `locks`, of a file system that has none."""
    wrapper = [] if locks else ["-c", NO_LOCKS]
    command = [sys.executable, *wrapper, str(PROJECT_ROOT / "reproduce.py"), *flat(arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def workers(output) -> list[int]:
    """Processes of this system that run a command of a grid with this results folder, the driver apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any(word.endswith(("train.py", "test.py")) for word in words) and any(output in word for word in words):
                found.append(int(entry.name))
    return found


def numbers(output):
    """The tables without those of seconds."""
    return [table for table in make_tables(read_results(Path(output))) if table.metric != SECONDS]


@pytest.mark.slow
def test_killed_drivers_and_workers(arguments, tmp_path):
    """Two drivers with four workers share the cells of a shard, a third has the others and no locks.

    After kill -9 of drivers and workers at random moments, the same commands give the tables of an undisturbed run.
    """
    arguments |= {"--epochs": ["2"], "--shots": ["1", "2"]}
    undisturbed = str(tmp_path / "undisturbed")
    assert start(arguments | {"--output": [undisturbed], "--jobs": ["2"]}).wait() == 0
    output, rng = arguments["--output"][0], random.Random(0)
    shared, alone = {"--shard": ["0/2"], "--jobs": ["2"]}, {"--shard": ["1/2"], "--jobs": ["1"]}
    kinds = [(arguments | shared, True), (arguments | shared, True), (arguments | alone, False)]
    drivers = [start(*kind) for kind in kinds]
    killed = []
    for victim in ("worker", "driver") * 4:
        while not workers(output) and any(driver.poll() is None for driver in drivers):
            time.sleep(0.1)  # the drivers plan and estimate first
        time.sleep(rng.uniform(0.5, 6))
        alive = workers(output) if victim == "worker" else [driver.pid for driver in drivers if driver.poll() is None]
        if alive:
            killed.append(victim)
            with suppress(ProcessLookupError):
                os.kill(rng.choice(alive), signal.SIGKILL)
        time.sleep(0.5)
        drivers = [
            driver if driver.poll() is None else start(*kind) for driver, kind in zip(drivers, kinds, strict=True)
        ]
    assert {"worker", "driver"} == set(killed)
    for driver in drivers:
        driver.wait()
    for kind in kinds:
        assert start(*kind).wait() == 0
    assert records(output) == records(undisturbed) and len(records(output)) == 12
    assert numbers(output) == numbers(undisturbed)
    assert all(is_finished(Path(output), cell) for cell in plan(arguments).cells())


@pytest.mark.slow
def test_cluster_gives_the_same(arguments, tmp_path, monkeypatch):
    """Through submitit on this machine."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(reproduce, "SLURM_CLUSTER", "local")
    reproduce.main(flat(arguments | {"--engine": ["slurm"], "--output": [str(tmp_path / "cluster")]}))
    reproduce.main(flat(arguments | {"--jobs": ["2"]}))
    assert records(tmp_path / "cluster") == records(arguments["--output"][0])
