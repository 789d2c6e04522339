"""reproduce.py on drawn images: the plan, the runs, the weights that exist; killed and undisturbed runs agree."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

import evaluation.run
import experiments.run as experiments_run
import reproduce
from experiments import plan as plan_module
from experiments import runs
from experiments.config import SET_BY_THE_PLAN, ExperimentConfig
from experiments.engines import run_on_cluster
from experiments.results import GRID_FILE, read_results
from experiments.run import make_tables
from experiments.runs import is_finished
from experiments.tables import SECONDS
from tests.experiments.played import processes_of
from utils import fingerprint
from utils.config import flags_of
from utils.errors import UserError
from utils.files import PROJECT_ROOT

SIZE = 64


def small_table(demo_data, folder):
    """Ring and weave, one shot, one epoch, random trunk; output in `folder`."""
    return {
        "objs": ["ring", "weave"],
        "shots": [1],
        "epochs": 1,
        "inferences": 2,
        "data_type": "folder",
        "data_path": str(demo_data),
        "weights": "none",
        "img_size": SIZE,
        "batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "cache_dir": str(folder / "cache"),
        "output": str(folder / "out"),
    }


@pytest.fixture
def settings(demo_data, tmp_path):
    return small_table(demo_data, tmp_path)


def run_in_process(patch):
    """Runs in this process, which spares them seconds of imports; returns the list of what was trained and scored."""
    called = []

    def counted(name, original):
        return lambda *arguments: called.append(name) or original(*arguments)

    def start(words, run, log, environment):
        try:
            runs.perform(runs.from_json(run))
        except UserError as error:
            log.write_text(f"error: {error}\n")
            return 2
        return 0

    for name in ("training", "evaluation"):
        patch.setattr(f"{name}.run.run", counted(name, sys.modules[f"{name}.run"].run))
    patch.setattr(runs, "_start", start)
    return called


@pytest.fixture
def in_process(monkeypatch):
    return run_in_process(monkeypatch)


@pytest.fixture(scope="module")
def whole_table(demo_data, tmp_path_factory):
    """The results folder of the small table, what was trained, drawn and scored, and what was printed."""
    settings = small_table(demo_data, tmp_path_factory.mktemp("table"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        called = run_in_process(patch)
        patch.setattr("training.run.save_curve", lambda *_: called.append("curve"))
        patch.setattr("training.run.CURVE_SECONDS", math.inf)
        torch.backends.cuda.matmul.allow_tf32 = True  # as in some containers; each command sets it back
        reproduced(settings)
        assert not torch.backends.cuda.matmul.allow_tf32
    return Path(settings["output"]), called, printed.getvalue()


@pytest.fixture
def made(whole_table, settings):
    """The small table is made already: `settings` with a copy of its results folder."""
    shutil.copytree(whole_table[0], settings["output"])
    return settings


def flat(settings):
    """The settings as words of a command line."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    return words


def reproduced(settings, *words):
    reproduce.main([*flat(settings), *words])


def plan(settings):
    return plan_module.Plan(ExperimentConfig.from_plain(settings))


def run_called(settings, name):
    return next(run for run in plan(settings).runs() if run.name == name)


def records(folder):
    """Every round of every record, without times and places."""
    files = [file for file in sorted(Path(folder).glob("*.json")) if file.name != GRID_FILE]
    contents = {file.name: json.loads(file.read_text()) for file in files}
    return {name: (content["rounds"], content["epoch"], content["weights"]) for name, content in contents.items()}


def test_the_plan(settings, capsys):
    """A dry run leaves nothing; every run has a name of its own, and only what is planned is a column."""
    reproduced(settings, "--dry_run")
    printed = capsys.readouterr().out
    assert "new       ring_1_rotation_scale\n" in printed and "4 runs, 0 finished, 4 to do\n" in printed
    assert not Path(settings["output"]).exists()
    names = [run.name for run in plan(settings | {"shots": [1, 2], "select": ["best", "source"]}).runs()]
    assert len(set(names)) == len(names) == 2 + 2 * 2 * 2
    assert "ring_1-2_rotation_scale_untrained" in names and "weave_2_rotation_scale_source" in names
    assert plan(settings | {"objs": ["all"]}).categories == ["ring", "weave"]
    for change, kinds in (
        ({}, ["untrained", "last", "best"]),
        (
            {"select": ["source"], "scorer": ["gaussian", "neighbours"]},
            ["untrained", "source", "untrained, neighbours", "source, neighbours"],
        ),
    ):
        planned = plan(settings | change)
        assert planned.asked(planned.runs())["kinds"] == kinds


def test_every_setting_of_the_commands_reaches_them(settings):
    """Each flag of train.py and test.py is one of reproduce.py, and its value is that of the runs."""
    given = {"keep_aspect": True, "strict": True, "tf32": True, "compile": True, "max_pixels": 10**6, "bits": 12}
    given |= {"metrics": "auroc", "save_maps": True, "amp": "bf16", "lr": 0.5, "momentum": 0.5, "save_every": 7.0}
    given |= {"scorer": ["gaussian", "neighbours"], "seed": 5, "select": ["source"], "held_out": ("weave",)}
    given |= {"train": "heads", "batch_norm": "frozen", "steps": 3, "eval_every": 2}
    run = run_called(settings | given, "ring_1_rotation_scale_source")
    for config in (run.training, run.scorings[0].config):
        shared = {field.name for field in flags_of(type(config))}
        assert shared <= {field.name for field in flags_of(ExperimentConfig)} | set(SET_BY_THE_PLAN)
        for name in shared & set(given) - {"select", "scorer"}:
            assert getattr(config, name) == given[name], name
    assert run.training.select == "source" and run.training.scorer == ("gaussian",) and run.training.resume
    assert run.scorings[0].config.scorer == ("gaussian", "neighbours") and run.scorings[0].config.overwrite
    assert run_called(settings | given | {"select": ["best"]}, "ring_1_rotation_scale").training.held_out is None
    defaults = run_called(settings, "ring_1_rotation_scale")
    own = {*settings, "obj", "shot", "resume", "save_dir", "overwrite", "output", "batch_size"}
    for config in (defaults.training, defaults.scorings[0].config):
        for field in flags_of(type(config)):
            if field.name not in own:
                assert getattr(config, field.name) == field.default, field.name


def finished(settings):
    """The names of the finished runs."""
    made = plan(settings)
    return {run.name for run in made.runs() if is_finished(run, made.digests)}


def test_what_is_repeated(made, demo_data, tmp_path, in_process, monkeypatch, capsys):
    """Settings, images, masks and METHOD_VERSION count; where data are, other test images and the code do not."""
    every = {f"{name}_1_rotation_scale{kind}" for name in ("ring", "weave") for kind in ("", "_untrained")}
    own = Path(shutil.copytree(demo_data, tmp_path / "own"))
    settings = made | {"data_path": str(own)}
    assert finished(settings) == every
    assert finished(settings | {"num_workers": 1, "jobs": 3, "save_every": 1, "max_pixels": 10**7}) == every
    trained = {name for name in every if not name.endswith("untrained")}
    for change in ({"epochs": 2}, {"batch_size": 5}, {"lr": 0.5}, {"momentum": 0.5}, {"amp": "bf16"}):
        assert finished(settings | change) == every - trained, change
    for change in ({"seed": 1}, {"inferences": 3}, {"bits": 12}, {"keep_aspect": True}):
        assert not finished(settings | change), change

    def swap(folder):
        first, second = sorted(folder.iterdir())[:2]
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    ring = {name for name in every if name.startswith("ring")}
    for place, stays in (
        ("weave/test/good", ring),
        ("ring/test/good", every - ring),
        ("ring/ground_truth/scratch", every - ring),
    ):
        swap(own / place)
        assert finished(settings) == stays, place
        swap(own / place)
    swap(own / "weave/train/good")
    assert "ring_1_rotation_scale" not in finished(settings)
    swap(own / "weave/train/good")
    assert finished(settings) == every
    before = records(settings["output"])
    reproduced(settings)
    assert not in_process and "4 finished, 0 to do" in capsys.readouterr().out
    monkeypatch.setattr(fingerprint, "METHOD_VERSION", fingerprint.METHOD_VERSION + 1)
    assert not finished(settings)
    reproduced(settings | {"objs": ["ring"]})
    assert len(in_process) == 1 + 3 and records(settings["output"]) == before
    weights = Path(settings["output"]) / "save_checkpoints/rotation_scale/1"
    assert sorted(path.name for path in weights.iterdir()) == ["ring", "ring.old1", "weave"]
    assert finished(settings) == ring


def test_a_changed_comment_repeats_nothing(made, tmp_path):
    """In any file: the plan of a copy of the project with a comment in each of them."""
    tree = tmp_path / "tree"
    for file in PROJECT_ROOT.rglob("*"):
        place = file.relative_to(PROJECT_ROOT)
        if file.suffix in (".py", ".csv", ".json") and place.parts[0] not in (".venv", ".git", "results", "tests"):
            (tree / place).parent.mkdir(parents=True, exist_ok=True)
            (tree / place).write_text(file.read_text() + ("# a comment\n" if file.suffix == ".py" else ""))
    command = [sys.executable, str(tree / "reproduce.py"), *flat(made), "--dry_run"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "4 runs, 4 finished, 0 to do" in printed


def test_interrupted_scoring_keeps_the_weights(made, in_process, monkeypatch):
    """A run that failed after its training trains no second time, and the records of another run are not shown."""
    settings = made | {"objs": ["ring"]}
    for record in Path(settings["output"]).glob("*_1_*.json"):
        record.unlink()

    def no_luck(*_):
        raise UserError("no luck")

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr("evaluation.run.run", no_luck)
            reproduced(settings)
    reproduced(settings)
    assert "training" not in in_process and len(records(settings["output"])) == 3
    monkeypatch.setattr("evaluation.run.run", no_luck)
    with pytest.raises(SystemExit):
        reproduced(settings | {"metrics": "auroc"})
    assert not records(settings["output"])


@pytest.fixture
def four_categories(demo_data, tmp_path):
    """The demo's ring and weave, and bolt and nut that are the other one's images."""
    for name, origin in (("ring", "ring"), ("weave", "weave"), ("bolt", "weave"), ("nut", "ring")):
        shutil.copytree(demo_data / origin, tmp_path / "four" / name)
    return tmp_path / "four"


def test_sources(settings, four_categories, demo_data, tmp_path):
    """Each run without its own category; in another data set, a category of the target's name is a source."""
    in_four = settings | {"data_path": str(four_categories), "select": ["best", "source"]}
    some = in_four | {"sources": ["weave", "ring", "bolt"]}
    assert run_called(some, "ring_1_rotation_scale").training.sources == ("weave", "bolt")
    assert run_called(some, "weave_1_rotation_scale_source").training.sources == ("ring", "bolt")
    assert run_called(in_four, "ring_1_rotation_scale").training.sources is None
    with pytest.raises(UserError, match="--sources names ring alone, which is a target"):
        plan(in_four | {"sources": ["ring"]}).runs()
    with pytest.raises(UserError, match="needs two source categories, one is held out"):
        reproduced(in_four | {"sources": ["ring", "nut"], "objs": ["ring"]}, "--dry_run")
    other = settings | {"source_path": str(four_categories), "sources": ["ring", "nut"]}
    training = run_called(other, "ring_1_rotation_scale").training
    assert training.source_path == four_categories and training.sources == ("ring", "nut")
    (tmp_path / "link").symlink_to(demo_data)  # the data set of the targets is no other one
    other = settings | {"source_path": str(tmp_path / "link"), "sources": ["ring", "weave"]}
    assert run_called(other, "ring_1_rotation_scale").training.sources == ("weave",)


def test_seeds_are_further_trainings(made, in_process):
    """Each has records and weights of its own; the untrained network is scored once."""
    output = Path(made["output"])
    planned = plan(made | {"seeds": 2, "seed": 5})
    (first,) = [run for run in planned.runs() if run.name == "ring_1_rotation_scale"]
    (second,) = [run for run in planned.runs() if run.name == "ring_1_rotation_scale_seed_6"]
    assert (first.training.seed, second.training.seed) == (5, 6)
    assert first.training.save_dir == output / "save_checkpoints"
    assert second.training.save_dir == output / "seed_6/save_checkpoints"
    assert [file.parent for file in second.records] == [output / "seed_6"] * 2
    assert len([run for run in planned.runs() if run.name.endswith("_untrained")]) == len(planned.categories)
    reproduced(made | {"seeds": 2, "objs": ["ring"]})
    results = read_results(output)
    assert in_process.count("training") == 1
    assert [record["config"]["seed"] for record in results.records["ring", 1, "last"]] == [668, 669]
    assert len(results.records["ring", 1, "untrained"]) == 1
    again = plan(made | {"seeds": 2, "objs": ["ring"]})
    assert not again.print_plan(again.runs())


def test_one_training_for_both_selections(settings, four_categories):
    """--held_out beside --select best source: best, last and source are scored after one training."""
    settings |= {"data_path": str(four_categories), "select": ["best", "source"], "held_out": ["weave", "nut"]}
    run = run_called(settings, "ring_1_rotation_scale")
    assert run.training.held_out == ("weave", "nut") and run.training.select == "best"
    assert [scoring.weights for scoring in run.scorings] == ["best", "last", "source"]
    assert run.scorings[2].config.checkpoint.name == "ring_1_rotation_scale_source.pt"
    names = [run.name for run in plan(settings | {"objs": ["ring", "weave"]}).runs()]
    assert not [name for name in names if name.endswith("_source")]
    assert run_called(settings | {"objs": ["weave"]}, "weave_1_rotation_scale").training.held_out == ("nut",)
    with pytest.raises(UserError, match="--held_out names weave alone, which is a target"):
        plan(settings | {"objs": ["weave"], "held_out": ["weave"]}).runs()


def test_end_to_end(whole_table, made, in_process, capsys):
    """All kinds of weights, tables in four formats, nothing twice; `best` is what train.py's own scores say."""
    _, called, printed = whole_table
    output = Path(made["output"])
    assert Counter(called) == {"training": 2, "curve": 2, "evaluation": 6} and "| mean |" in printed
    assert len(re.findall(r"^device: cpu \(\d+ threads\)$", printed, re.MULTILINE)) == 8
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
    reproduced(made)
    assert not in_process and "4 finished, 0 to do" in capsys.readouterr().out
    reproduce.main(["--report", str(output)])
    assert "| mean |" in capsys.readouterr().out and not in_process


def test_weights_that_are_there(whole_table, settings, in_process, tmp_path, monkeypatch, capsys):
    """--eval_only: one pass over the test images for equal weights of several shots; what is not there is named."""
    source = shutil.copytree(whole_table[0] / "save_checkpoints", tmp_path / "found")
    other = source / "rotation_scale" / "2" / "ring"
    other.mkdir(parents=True)
    shutil.copy(next(source.rglob("ring_1_*_model.pt")), other / "ring_2_rotation_scale_model.pt")
    passes, original = [], evaluation.run.compute_test_features
    monkeypatch.setattr(evaluation.run, "compute_test_features", lambda *a: passes.append(1) or original(*a))
    settings |= {"shots": [1, 2, 3], "objs": ["ring"], "eval_only": str(source)}
    reproduced(settings)
    printed = capsys.readouterr().out
    assert "ring_3_rotation_scale_model.pt: the table will show the run as missing" in printed
    # shots 1 and 2 share one file, chosen by `best`; the last weights of shot 1 are another run
    assert {name: what[2] for name, what in records(settings["output"]).items()} == {
        **{f"ring_{shot}_rotation_scale.json": "best" for shot in (1, 2)},
        "ring_1_rotation_scale_last.json": "last",
    }
    assert len(passes) == 2 and set(in_process) == {"evaluation"}
    reproduced(settings)
    assert len(passes) == 2
    with pytest.raises(UserError, match="has no checkpoint of these categories"):
        reproduced(settings | {"eval_only": str(tmp_path / "nowhere")})


def test_a_failed_run_gives_exit_code_1(made, monkeypatch, capsys):
    for record in Path(made["output"]).glob("weave_1_*.json"):
        record.unlink()
    monkeypatch.setattr(runs, "_start", lambda *_: 7)
    with pytest.raises(SystemExit) as caught:
        reproduced(made)
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert "FAILED weave_1_rotation_scale: ended with code 7" in printed.err
    assert "out/logs/weave_1_rotation_scale.log" in printed.err and "2 of 4 runs failed" in printed.err
    assert "| weave | missing | missing | missing |" in printed.out and "| ring | " in printed.out


def test_readme_section(tmp_path):
    output = shutil.copytree(PROJECT_ROOT / "results/published/registration", tmp_path / "out")
    readme = tmp_path / "a.md"
    readme.write_text("before\n<!-- results: begin -->\noutdated\n<!-- results: end -->\nafter\n")
    for _ in range(2):
        reproduce.main(["--report", str(output), "--readme", str(readme)])
        text = readme.read_text()
        assert text.startswith("before\n<!-- results: begin -->\n- commit: ") and "| bottle |" in text
        assert text.endswith("<!-- results: end -->\nafter\n") and "outdated" not in text
    readme.write_text("no marks")
    with pytest.raises(UserError, match="needs a line"):
        reproduce.main(["--report", str(output), "--readme", str(readme)])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shots": [0]}, "--shots must be at least 1"),
        ({"shots": [2, 2]}, "must not contain duplicates"),
        ({"objs": ["nut"]}, "no category folder"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"lr": "nan"}, "--lr must be a finite number"),
        ({"eval_every": 0}, "--select best needs scores"),
        ({"eval_only": ".", "backbone": "timm:a"}, "nothing for --eval_only to score"),
        ({"obj": "ring"}, "--obj goes with --import CSV; a table takes --objs"),  # else all categories would be run
        ({"shot": 2}, "--shot goes with --import CSV; a table takes --shots"),
        *(({name: "mine"}, f"--{name} goes with --import CSV$") for name in ("name", "maps")),
        ({"overwrite": True}, "--overwrite goes with --import CSV$"),
        *(({name: "last"}, f"--{name} goes with --report or --compare$") for name in ("baseline", "columns")),
        ({"only_scored": True}, "--only_scored goes with --report or --compare$"),
        *(({name: "a.pdf"}, f"--{name} goes with --report DIR$") for name in ("readme", "figure", "examples")),
        ({"images": "good/000.png"}, "--images goes with --examples FILE$"),
        ({"report": ".", "figure": "a.jpg"}, r"--figure a\.jpg: figures are written as \.pdf, \.svg, \.png"),
    ],
)
def test_invalid_arguments(settings, change, sentence):
    with pytest.raises(UserError, match=sentence):
        reproduced(settings | change, "--dry_run")


def start(settings) -> subprocess.Popen:
    """A driver."""
    command = [sys.executable, str(PROJECT_ROOT / "reproduce.py"), *flat(settings)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def numbers(output):
    """The tables without those of seconds."""
    return [table for table in make_tables(read_results(Path(output))) if table.metric != SECONDS]


@pytest.mark.slow
def test_killed_drivers_and_workers(settings, tmp_path):
    """Two drivers with four workers share the runs.

    After kill -9 of drivers and workers at random moments, the same commands give the tables of an undisturbed run.
    """
    settings |= {"epochs": 2, "shots": [1, 2], "jobs": 2}
    undisturbed = str(tmp_path / "undisturbed")
    assert start(settings | {"output": undisturbed}).wait() == 0
    output, rng, killed = settings["output"], random.Random(0), []
    drivers = [start(settings) for _ in range(2)]
    for victim in ("worker", "driver") * 4:
        while not processes_of(output) and any(driver.poll() is None for driver in drivers):
            time.sleep(0.1)  # the drivers plan first
        time.sleep(rng.uniform(0.5, 6))
        alive = (
            processes_of(output) if victim == "worker" else [driver.pid for driver in drivers if driver.poll() is None]
        )
        if alive:
            killed.append(victim)
            with suppress(ProcessLookupError):
                os.kill(rng.choice(alive), signal.SIGKILL)
        time.sleep(0.5)
        drivers = [driver if driver.poll() is None else start(settings) for driver in drivers]
    assert {"worker", "driver"} == set(killed)
    for driver in drivers:
        driver.wait()
    assert start(settings).wait() == 0
    assert records(output) == records(undisturbed) and len(records(output)) == 12
    assert numbers(output) == numbers(undisturbed)
    assert len(finished(settings)) == len(plan(settings).runs())


@pytest.mark.slow
def test_cluster_gives_the_same(settings, tmp_path, monkeypatch):
    """Through submitit on this machine."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(experiments_run, "run_on_cluster", partial(run_on_cluster, cluster="local"))
    reproduced(settings | {"engine": "slurm", "output": str(tmp_path / "cluster")})
    reproduced(settings | {"jobs": 2})
    assert records(tmp_path / "cluster") == records(settings["output"])
