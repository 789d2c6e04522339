"""The commands from data to record, and one error message per mistake."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import evaluation.run
import evaluation.scoring
import make_support
from benchmarks.reference import DATA, GOLDEN, GOLDEN_CHECKPOINT
from datasets.images import read_image
from datasets.mvtec import LabelledDataset, list_test_items
from evaluation.metrics import METRIC_NAMES
from evaluation.statistics import format_summary
from examples import demo_figure
from models.regad import CHECKPOINT_PARTS, RegAD
from tests.flags import words
from tests.reference import needs_reference
from utils.errors import UserError
from utils.files import PROJECT_ROOT, sha256
from utils.naming import CheckpointFiles

# `import test` would import the package `test` of the standard library
_spec = importlib.util.spec_from_file_location("test_command", PROJECT_ROOT / "test.py")
test_command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(test_command)

SIZE = 64


@pytest.fixture(scope="module")
def support_path(demo_data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("support")
    given = {"obj": "ring", "shots": (1, 2), "rounds": 2, "data_type": "folder", "img_size": SIZE}
    make_support.main(words(data_path=demo_data, support_path=root, **given))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights in the release's format and at its path."""
    torch.manual_seed(0)
    model = RegAD("affine", SIZE)
    path = CheckpointFiles.of(tmp_path_factory.mktemp("checkpoints"), "affine", 2, "ring").selected
    path.parent.mkdir(parents=True)
    torch.save({part: getattr(model, name).state_dict() for part, name in CHECKPOINT_PARTS.items()}, path)
    return path


@pytest.fixture
def arguments(demo_data, support_path, checkpoint, tmp_path) -> dict[str, str]:
    """Valid arguments of test.py; tests change single flags."""
    return {
        "--obj": "ring",
        "--shot": "2",
        "--inferences": "2",
        "--stn_mode": "affine",
        "--img_size": str(SIZE),
        "--data_type": "folder",
        "--data_path": str(demo_data),
        "--support_path": str(support_path),
        "--checkpoint": str(checkpoint),
        "--output": str(tmp_path / "out"),
        "--device": "cpu",
        "--num_workers": "0",
    }


def flat(arguments: dict[str, str]) -> list[str]:
    return [part for pair in arguments.items() for part in pair]


def call(arguments: dict[str, str], *extra: str) -> dict:
    """Runs main of test.py and returns its record."""
    test_command.main(flat(arguments) + list(extra))
    (record,) = Path(arguments["--output"]).glob("*.json")
    return json.loads(record.read_text())


def test_record(arguments, capsys):
    record = call(arguments)
    printed = capsys.readouterr().out
    assert record["config"]["obj"] == "ring" and record["config"]["seed"] == 668
    assert record["checkpoint"]["sha256"] == sha256(Path(arguments["--checkpoint"]))
    assert record["support_set"]["sha256"] == sha256(Path(arguments["--support_path"]) / "ring/2_2.pt")
    assert set(record["seconds"]) == {"decode", "network", "gaussian", "distance", "smoothing", "metrics"}
    assert record["peak_memory_mb"] > 50 and record["versions"]["torch"] and record["test_images"] == 9
    for key, name in METRIC_NAMES.items():
        values = [one[key] for one in record["rounds"]]
        interval = np.clip(scipy.stats.t.interval(0.95, 1, np.mean(values), scipy.stats.sem(values)), 0, 1)
        expected = {"mean": np.mean(values), "sd": np.std(values, ddof=1), "interval95": pytest.approx(interval)}
        assert record[key]["interval95"] == expected.pop("interval95")
        assert {part: record[key][part] for part in expected} == pytest.approx(expected)
        low, high = record[key]["interval95"]
        assert f"  {name:14}{format_summary(record[key])}    {low:.4f} to {high:.4f}\n" in printed
    for number, one in enumerate(record["rounds"]):
        assert f"round {number}: image AUROC {one['image_auroc']:.4f}, pixel AUROC {one['pixel_auroc']:.4f}" in printed


def test_numbers_depend_on_nothing_but_the_input(arguments, demo_data, tmp_path):
    """Batch size, workers, repetition and the location of the data (a folder named test/good) have no effect."""
    reference = call(arguments)["rounds"]
    moved = tmp_path / "test" / "good"
    moved.mkdir(parents=True)
    (moved / "ring").symlink_to(demo_data / "ring")
    changes = ({}, {"--batch_size": "3"}, {"--num_workers": "2"}, {"--data_path": str(moved)})
    for change in changes:
        found = call(arguments | change)["rounds"]
        for one, other in zip(found, reference, strict=True):
            assert one == pytest.approx(other, abs=1e-6), change


def test_single_shot_and_untrained(arguments):
    del arguments["--checkpoint"]
    record = call(arguments | {"--shot": "1", "--weights": "none"}, "--untrained")
    assert record["checkpoint"] is None and len(record["rounds"]) == 2


def test_several_shots_share_the_features(arguments, monkeypatch):
    """The records equal those of single runs; features of test and support images are computed once for all K."""
    del arguments["--checkpoint"]
    shots, output = ("1", "2"), Path(arguments["--output"])
    for shot in shots:
        test_command.main(flat(arguments | {"--shot": shot, "--weights": "none"}) + ["--untrained"])
    alone = [json.loads((output / f"ring_{shot}_affine_untrained.json").read_text()) for shot in shots]
    calls, original = [], evaluation.run.compute_test_features
    monkeypatch.setattr(evaluation.run, "compute_test_features", lambda *a: calls.append(1) or original(*a))
    support, write = [], evaluation.scoring.write_support_images
    monkeypatch.setattr(
        evaluation.scoring, "write_support_images", lambda store, *a: support.extend(a[0]) or write(store, *a)
    )
    test_command.main(flat(arguments | {"--weights": "none"}) + ["--untrained", "--shot", *shots])
    for shot, expected in zip(shots, alone, strict=True):
        record = json.loads((output / f"ring_{shot}_affine_untrained.json").read_text())
        assert record["rounds"] == expected["rounds"] and record["config"]["shot"] == int(shot)
        assert record["weights"] == "untrained"
    names = {name for of_round in record["support_set"]["names"] for name in of_round}  # of K = 2: with those of K = 1
    assert len(calls) == 1 and len(support) == len(names)


def test_weights_of_every_kind_have_their_record(arguments, checkpoint, tmp_path):
    """Weights of the release count as `best`; checkpoints of train.py store their selection rule."""
    record = call(arguments)
    assert record["weights"] == "best" and record["epoch"] is None
    content = torch.load(checkpoint, weights_only=True)
    for kind in ("last", "source", "best"):
        recipe = {"arguments": {"select": kind, "stn_mode": "affine", "img_size": SIZE}, "epoch": 3}
        torch.save(content | {"recipe": recipe}, tmp_path / "ours.pt")
        call(arguments | {"--checkpoint": str(tmp_path / "ours.pt"), "--output": str(tmp_path / kind)})
        name = "ring_2_affine" + ("" if kind == "best" else f"_{kind}")
        record = json.loads((tmp_path / kind / f"{name}.json").read_text())
        assert (record["weights"], record["epoch"]) == (kind, 3)


def test_only_the_aurocs(arguments):
    record = call(arguments)
    fewer = call(arguments | {"--metrics": "auroc"}, "--overwrite")
    assert set(fewer["rounds"][0]) == {"image_auroc", "pixel_auroc"} < set(record["rounds"][0]) == set(METRIC_NAMES)
    for one, other in zip(fewer["rounds"], record["rounds"], strict=True):
        assert all(one[key] == other[key] for key in one)


def test_pictures(arguments, demo_data):
    call(arguments, "--save_images", "5")
    (report,) = Path(arguments["--output"]).rglob("report.html")
    images = sorted(report.parent.glob("*/*.jpg"))
    assert len(images) == 5
    items = list_test_items(demo_data / "ring")
    assert {path.parent.name for path in images} == {item.defect for item in items}
    for path in (*images, report.parent / "contact_sheet.jpg", report.parent / "curves.png"):
        assert len(np.unique(read_image(path, 200).reshape(-1, 3), axis=0)) > 100  # not an empty page
    assert report.read_text().count("data:image/jpeg") == 5 * len(items)  # four panels and a thumbnail


def test_pictures_that_cannot_be_written_cost_no_number(arguments, monkeypatch):
    """A disk that is full when the images are written."""

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation.gallery.save_image", refuse)
    with pytest.raises(UserError, match=r"the record is written, but the images in .*ring_2_affine cannot be: .*No sp"):
        call(arguments, "--save_images", "5")
    assert len(list(Path(arguments["--output"]).glob("*.json"))) == 1


@pytest.mark.parametrize("name", ["ring_2_affine.json", "ring_2_affine.csv"])
def test_what_is_in_the_place_of_a_record(name, arguments):
    (Path(arguments["--output"]) / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"cannot write the file .*{name} \(--output\): it exists and is not a file"):
        call(arguments)


@pytest.mark.parametrize(
    ("flag", "name"), [("--save_images=1", "ring_2_affine"), ("--save_maps", "ring_2_affine_maps")]
)
def test_what_is_in_the_place_of_images(flag, name, arguments):
    """Found before the work starts: no record is written."""
    output = Path(arguments["--output"])
    output.mkdir()
    (output / name).write_text("in the way")
    with pytest.raises(UserError, match=rf"{name} \(--output\): .*{name} is not a folder"):
        call(arguments, flag)
    assert not list(output.glob("*.json"))


def test_without_ground_truth_pixel_numbers_are_absent(arguments, demo_data, tmp_path, capsys):
    (tmp_path / "ring").mkdir()
    for half in ("train", "test"):
        (tmp_path / "ring" / half).symlink_to(demo_data / "ring" / half)
    record = call(arguments | {"--data_path": str(tmp_path)})
    assert record["pixel_auroc"] is None and record["image_auroc"]["mean"] > 0
    assert "pixel AUROC n/a" in capsys.readouterr().out


MISTAKES = {
    "no such category": ({"--obj": "bolt"}, r"no category folder .*bolt; it has ring, weave"),
    "unknown MVTec name": (
        {"--data_type": "mvtec"},
        r"mvtec has no category 'ring', only bottle, .*data type folder",
    ),
    "no data": ({"--data_path": "/nowhere"}, r"no data folder /nowhere; give the folder"),
    "no support set": ({"--inferences": "7"}, r"no support set .*2_7\.pt; create it with: python make_support\.py .*"),
    "no checkpoint": ({"--checkpoint": "/nowhere/x.pt"}, r"no checkpoint /nowhere/x\.pt.*--untrained"),
    "another mode": ({"--stn_mode": "scale"}, r"checkpoint .* is named after the STN mode affine, not scale"),
    "not a checkpoint": ({"--checkpoint": __file__}, r"checkpoint .*test_commands\.py cannot be read"),
    "odd size": ({"--img_size": "100"}, r"the image size must be a multiple of 16, got 100"),
    "no shots": ({"--shot": "0"}, r"--shot must be at least 1, got 0"),
    "negative workers": ({"--num_workers": "-1"}, r"--num_workers must be at least 0, got -1"),
    "no such device": ({"--device": "warp9"}, r"device 'warp9' cannot be used"),
    "other size": ({"--img_size": "32"}, r"support set .*2_2\.pt is for another shot or size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(arguments, mistake):
    change, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence) as caught:
        call(arguments | change)
    assert "\n" not in str(caught.value)
    assert not Path(arguments["--output"]).exists()


def test_nan_in_the_checkpoint_is_reported(arguments, tmp_path):
    content = torch.load(arguments["--checkpoint"], weights_only=True)
    content["STN"]["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(content, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="scores are not finite"):
        call(arguments | {"--checkpoint": str(tmp_path / "broken.pt")})


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=PROJECT_ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", [("test.py", "--obj", "bottle"), ("make_support.py", "--obj", "bottle"), ("check_data.py",)]
)
def test_exit_code_2_and_no_traceback(command, tmp_path):
    done = run(*command, "--data_path", str(tmp_path / "missing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no data folder") and len(done.stderr.splitlines()) == 1


@needs_reference
@pytest.mark.slow
def test_published_command_line_on_real_screws(tmp_path):
    """The release's command reproduces the release's metrics."""
    done = run(
        *("test.py", "--obj", "screw", "--shot", "2", "--inferences", "2", "--data_path", str(DATA)),
        *("--checkpoint", str(GOLDEN_CHECKPOINT), "--support_path", str(GOLDEN / "support_set")),
        *("--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "round 0: image AUROC 0.6596, pixel AUROC 0.9393" in done.stdout
    assert "round 1: image AUROC 0.5376, pixel AUROC 0.9384" in done.stdout


def test_demo_figure(arguments, tmp_path, capsys):
    """The figure is drawn in both formats, of a checkpoint and of an untrained network."""
    flags = ("--obj", "--shot", "--inferences", "--stn_mode", "--img_size", "--data_type", "--data_path")
    call = flat({flag: arguments[flag] for flag in (*flags, "--support_path")})
    networks = ("--checkpoint", arguments["--checkpoint"]), ("--weights", "none", "--scorer", "combined")
    for figure, network in zip((tmp_path / "figure.png", tmp_path / "figure.jpg"), networks, strict=True):
        demo_figure.main([*call, *network, "--output", str(figure)])
        assert f"figure: {figure}" in capsys.readouterr().out
        drawn = read_image(figure, 224)
        assert (drawn.reshape(-1, 3).max(axis=1) > 200).any() and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 500
    with pytest.raises(UserError, match=r"/nowhere"):
        demo_figure.main([*call, "--checkpoint", "/nowhere"])


def test_demo_figure_shows_a_normal_image_and_each_kind_of_defect(demo_data):
    items = list_test_items(demo_data / "ring")
    dataset = LabelledDataset(items, SIZE)
    maps = np.arange(len(items), dtype=np.float32)[:, None, None].repeat(SIZE, 1).repeat(SIZE, 2)
    examples = demo_figure.choose_examples(dataset, maps)
    assert [example.defect_type for example in examples] == ["normal", "chip", "rust", "scratch"]
    assert [example.mask.any() for example in examples] == [False, True, True, True]
    for example in examples:
        of_kind = [
            number for number, item in enumerate(items) if item.defect.replace("good", "normal") == example.defect_type
        ]
        assert example.score == of_kind[0] and (example.scores == of_kind[0]).all()
