"""What test.py writes: scores, maps and metrics by kind; test sets of one class; no result is replaced unasked."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation.run
from datasets.mvtec import LabelledDataset, list_test_items
from evaluation.metrics import METRIC_NAMES, auroc, rank
from evaluation.per_image import image_name, read_scores
from evaluation.round_metrics import NO_DEFECTIVE, NO_MASK, NO_NORMAL
from experiments.results import read_results
from experiments.run import write_tables
from tests.commands.test_commands import test_command
from tests.flags import small_run
from utils.errors import UserError
from utils.text import read_table

SIZE = 64


@pytest.fixture
def run(demo_data, tmp_path):
    """Runs test.py on the ring, untrained; returns its record. Keywords are flags; True gives a flag without value."""

    def run(**changed):
        flags = {"shot": 1, "inferences": 2, "stn_mode": "affine", "untrained": True, "output": tmp_path / "out"}
        test_command.main(small_run(**{"data": demo_data} | flags | changed))
        name = f"ring_1_affine_untrained{'_neighbours' if changed.get('scorer') == 'neighbours' else ''}.json"
        return json.loads((tmp_path / "out" / name).read_text())

    return run


@pytest.fixture
def part_of_the_ring(demo_data, tmp_path):
    """Makes a data folder with some folders of the ring's test set, with or without masks."""

    def make(kinds, masks=True):
        ring = tmp_path / "data" / "ring"
        for kind in kinds:
            shutil.copytree(demo_data / "ring/test" / kind, ring / "test" / kind)
        shutil.copytree(demo_data / "ring/train", ring / "train")
        if masks:
            shutil.copytree(demo_data / "ring/ground_truth", ring / "ground_truth")
        return ring.parent

    return make


def test_scores_and_maps_give_the_metrics_of_the_record(run, demo_data, tmp_path, capsys):
    """To the last digit: of all images and of each kind."""
    record = run(save_maps=True)
    items = list_test_items(demo_data / "ring")
    labels = np.array([item.label for item in items], bool)
    scores = read_scores(tmp_path / "out/ring_1_affine_untrained.csv", items, 2)
    masks = np.stack([item["mask"].numpy() for item in LabelledDataset(items, SIZE)])
    for number, of_round in enumerate(record["rounds"]):
        with np.load(tmp_path / f"out/ring_1_affine_untrained_maps/round_{number}.npz") as saved:
            assert saved["names"].tolist() == [image_name(item) for item in items]
            maps = saved["maps"]
        assert maps.dtype == np.float32 and (maps.max(axis=(1, 2)) == scores[number]).all()
        assert auroc(rank(scores[number], labels)) == of_round["image_auroc"]
        assert auroc(rank(maps, masks)) == of_round["pixel_auroc"]
        for kind, numbers in record["defects"].items():
            chosen = np.array([item.defect in ("good", kind) for item in items])
            assert auroc(rank(scores[number][chosen], labels[chosen])) == numbers["image_auroc"]["rounds"][number]
            assert auroc(rank(maps[chosen], masks[chosen])) == numbers["pixel_auroc"]["rounds"][number]
    assert set(record["defects"]) == {"chip", "rust", "scratch"} and record["not_available"] == {}
    chip = record["defects"]["chip"]
    assert chip["images"] == 2 and set(chip) == {"images", "image_auroc", "pixel_auroc", "pro", "not_available"}
    mean, spread = chip["pro"]["mean"], chip["pro"]["sd"]
    assert mean == pytest.approx(np.mean(chip["pro"]["rounds"]))
    assert f"  chip              2  {chip['image_auroc']['mean']:.4f}" in (text := capsys.readouterr().out)
    assert f"  {mean:.4f} +- {spread:.4f}\n" in text and re.search("defect type +images  image AUROC", text)


def test_maps_without_their_record_are_removed(run, tmp_path):
    """As of a record that reproduce.py removed because its settings had changed: the next record has other maps."""
    run(save_maps=True)
    maps = list((tmp_path / "out").glob("*_maps/*.npz"))
    (tmp_path / "out" / "ring_1_affine_untrained.json").unlink()
    run(img_size=32)
    assert len(maps) == 2 and not any(file.exists() for file in maps)


def test_maps_at_the_size_of_the_images(run, demo_data, tmp_path):
    """Each 32-bit TIFF is the map of the .npz, resized; a new record removes them."""
    run(save_maps=True, save_tiff=True, img_size=32)
    folder = tmp_path / "out/ring_1_affine_untrained_maps"
    with np.load(folder / "round_1.npz") as saved:
        maps = dict(zip(saved["names"].tolist(), saved["maps"], strict=True))
    assert len(maps) == len(list((folder / "round_1").rglob("*.tiff")))
    for name, scores in maps.items():
        with Image.open(folder / "round_1" / Path(name).with_suffix(".tiff")) as image:
            assert image.mode == "F" and image.size == (64, 64)
            enlarged = torch.nn.functional.interpolate(torch.from_numpy(scores)[None, None], size=64, mode="bilinear")
            np.testing.assert_allclose(np.asarray(image), enlarged[0, 0], rtol=1e-4)
    run(overwrite=True)
    assert not list(folder.rglob("*.tiff"))


@pytest.mark.parametrize("which", ["worst", "median", "best", 1])
def test_images_of_a_chosen_round(which, run, tmp_path, monkeypatch):
    """The drawn maps are those of the round: their maxima are its scores."""
    drawn = []
    monkeypatch.setattr("evaluation.gallery.save_gallery", lambda folder, title, scored, *rest: drawn.append(scored))
    record = run(images_round=which, save_images=1, inferences=3)
    values = [numbers["image_auroc"] for numbers in record["rounds"]]
    number = which if which == 1 else values.index({"worst": min, "median": np.median, "best": max}[which](values))
    scores = np.loadtxt(tmp_path / "out/ring_1_affine_untrained.csv", delimiter=",", skiprows=1, usecols=3 + number)
    np.testing.assert_allclose(drawn[0].scores, scores, rtol=1e-5)


def test_a_round_that_is_not_there(run):
    with pytest.raises(UserError, match=r"--images_round 2: there are 2 rounds"):
        run(images_round=2)


def test_only_aurocs_by_kind(run):
    assert set(run(metrics="auroc")["defects"]["rust"]) == {"images", "image_auroc", "pixel_auroc", "not_available"}


ONE_CLASS = {
    "only normal": (["good"], True, NO_DEFECTIVE, NO_DEFECTIVE),
    "only defective": (["chip", "rust"], True, NO_NORMAL, None),
    "only defective, no masks": (["chip", "rust"], False, NO_NORMAL, NO_MASK),
    "no masks": (["good", "chip"], False, None, NO_MASK),
}


@pytest.mark.parametrize("case", ONE_CLASS)
def test_one_class_or_no_masks(case, run, part_of_the_ring, tmp_path, capsys):
    """What can be computed is there; the rest is null with a reason; scores, images and tables survive it."""
    kinds, masks, no_image, no_pixel = ONE_CLASS[case]
    record = run(data=part_of_the_ring(kinds, masks), save_images=-1)
    printed = capsys.readouterr().out
    for name in METRIC_NAMES:
        reason = no_image if name.startswith("image") else no_pixel
        assert (record[name] is None) == (reason is not None)
        assert record["not_available"].get(name) == reason
        if reason:
            assert f"  {METRIC_NAMES[name]:14}{'n/a':20}{reason}\n" in printed
    for kind in record["defects"].values():
        assert (kind["image_auroc"] is None, kind["pixel_auroc"] is None) == (bool(no_image), bool(no_pixel))
        assert set(kind["not_available"]) == {name for name, value in kind.items() if value is None}
    assert set(record["defects"]) == set(kinds) - {"good"}
    lines = (tmp_path / "out/ring_1_affine_untrained.csv").read_text().splitlines()
    assert len(lines) == 1 + record["test_images"]
    folder = tmp_path / "out/ring_1_affine_untrained"
    assert (folder / "report.html").is_file() and (folder / "curves.png").is_file()
    write_tables(read_results(tmp_path / "out"))
    assert "n/a" in capsys.readouterr().out and "nan" not in (tmp_path / "out/tables.csv").read_text()


def test_a_name_that_is_no_text(run, part_of_the_ring, tmp_path):
    """File names may hold any bytes."""
    root = part_of_the_ring(["good", "chip"])
    strange = os.fsencode(root / "ring/test/good") + b"/\xff\xfe.png"
    shutil.copy(root / "ring/test/good/000.png", strange)
    run(data=root)
    items = list_test_items(root / "ring")
    assert read_scores(tmp_path / "out/ring_1_affine_untrained.csv", items, 2).shape == (2, len(items))


OTHER_SETTINGS = {
    "image size": ({"img_size": 80}, "img_size 64, now 80, other support images"),
    "padding": ({"keep_aspect": True}, "keep_aspect False, now True"),
    "metrics": ({"metrics": "auroc"}, "metrics all, now auroc"),
    "rounds": ({"inferences": 3}, "inferences 2, now 3, other support images"),
    "seed of random weights": ({"seed": 1}, "weights none, seed 668, now none, seed 1"),
}


def test_a_record_of_other_settings_stays(run, tmp_path, monkeypatch):
    """The same settings replace it. Others do so with --overwrite only; without it they are found before the work."""
    record = run(save_maps=True)
    file = tmp_path / "out/ring_1_affine_untrained.json"
    assert run()["rounds"] == record["rounds"]
    record = run(save_maps=True)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with monkeypatch.context() as patched:
        patched.setattr("evaluation.run.compute_test_features", lambda *a: pytest.fail("the work has started"))
        for case, (change, sentence) in OTHER_SETTINGS.items():
            with pytest.raises(UserError) as caught:
                run(**change)
            assert str(caught.value).startswith(f"{file} was made with other settings: {sentence}"), case
            assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == files
    replaced = run(seed=1, overwrite=True)
    assert replaced["fingerprint"] != record["fingerprint"]
    assert not list((tmp_path / "out").rglob("round_*.npz"))  # maps of other numbers do not stay beside it


def test_the_same_content_elsewhere_is_the_same(run, demo_data, tmp_path):
    shutil.copytree(demo_data / "ring", tmp_path / "moved/ring")
    run()
    run(data=tmp_path / "moved")
    file = tmp_path / "moved/ring/ground_truth/chip/000_mask.png"
    shutil.copy(file.with_name("001_mask.png"), file)
    with pytest.raises(UserError, match="other test images"):
        run(data=tmp_path / "moved")


def test_other_scorers_have_records_of_their_own(run, tmp_path):
    run()
    run(scorer="neighbours")
    assert len(list((tmp_path / "out").glob("*.json"))) == len(list((tmp_path / "out").glob("*.csv"))) == 2


def test_what_is_no_record_of_this_version_stays(run, tmp_path):
    file = tmp_path / "out/ring_1_affine_untrained.json"
    file.parent.mkdir()
    for content in ("{}", "[]", "not JSON"):
        file.write_text(content)
        with pytest.raises(UserError, match="--overwrite"):
            run()
        assert file.read_text() == content
    assert run(overwrite=True)["rounds"]


def test_two_runs_at_once_leave_one_whole_record(run, tmp_path, monkeypatch):
    """The second starts when the first is about to write."""
    refused, original = [], evaluation.run.write_scores

    def start_another(*arguments):
        if not refused:
            with pytest.raises(UserError, match="another process writes") as caught:
                run(seed=5, overwrite=True)
            refused.append(caught.value)
        original(*arguments)

    monkeypatch.setattr(evaluation.run, "write_scores", start_another)
    record = run(seed=4)
    (scores,) = (tmp_path / "out").glob("*.csv")
    first = [float(line["round_0"]) for line in read_table(scores)]
    labels = np.array([line["label"] == "1" for line in read_table(scores)])
    assert refused and record["config"]["seed"] == 4
    assert auroc(rank(np.array(first), labels)) == record["rounds"][0]["image_auroc"]


def test_equal_shots_are_refused():
    with pytest.raises(UserError, match="--shot contains a number twice: 2 2"):
        test_command.main(["--obj", "ring", "--shot", "2", "2"])
