"""reproduce.py --import: test.py's own scores and maps give test.py's metrics; mistakes cost a sentence."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

import reproduce
from datasets.mvtec import LabelledDataset, list_test_items
from evaluation.metrics import METRIC_NAMES
from evaluation.per_image import image_name, write_scores
from evaluation.round_metrics import NO_NORMAL
from experiments.results import read_results
from tests.commands.test_commands import test_command
from utils.errors import UserError

SIZE = 32


@pytest.fixture
def items(demo_data):
    return list_test_items(demo_data / "ring")


@pytest.fixture
def scores(items):
    """(2, B) scores of another method, some of them equal."""
    return np.random.default_rng(0).integers(0, 6, (2, len(items))).astype(np.float32)


@pytest.fixture
def maps(items, tmp_path):
    """Maps of two rounds, in another order than the images."""
    values = np.random.default_rng(1).random((2, len(items), SIZE, SIZE), dtype=np.float32)
    (tmp_path / "maps").mkdir()
    names = np.array([image_name(item) for item in items])
    for number, of_round in enumerate(values):
        np.savez(tmp_path / "maps" / f"round_{number}.npz", names=names[::-1], maps=of_round[::-1])
    return values


@pytest.fixture
def command(tmp_path, demo_data, items, scores):
    write_scores(tmp_path / "scores.csv", items, scores)
    words = f"--import {tmp_path}/scores.csv --name mine --obj ring --shot 1 --data_type folder --inferences 2"
    return [*words.split(), "--data_path", str(demo_data), "--output", str(tmp_path / "out"), "--num_workers", "0"]


def test_the_record(command, items, scores, maps, tmp_path, capsys):
    """Its metrics are scikit-learn's; tables have a column of it."""
    reproduce.main([*command, "--maps", str(tmp_path / "maps"), "--kind", "untrained"])
    record = json.loads((tmp_path / "out" / "ring_1_untrained_mine.json").read_text())
    labels = [item.label for item in items]
    dataset = LabelledDataset(items, SIZE)
    masks = np.stack([dataset[number]["mask"].numpy() for number in range(len(items))])
    for number, found in enumerate(record["rounds"]):
        assert set(found) == set(METRIC_NAMES)
        assert found["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores[number]))
        pixels = masks.ravel(), maps[number].ravel()
        assert found["pixel_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(*pixels))
        assert found["pixel_ap"] == pytest.approx(sklearn.metrics.average_precision_score(*pixels))
        for kind, numbers in record["defects"].items():
            chosen = [row for row, item in enumerate(items) if item.defect in ("good", kind)]
            assert numbers["images"] == sum(item.defect == kind for item in items)
            of_kind = sklearn.metrics.roc_auc_score(np.take(labels, chosen), scores[number][chosen])
            assert numbers["image_auroc"]["rounds"][number] == pytest.approx(of_kind)
            of_kind = sklearn.metrics.roc_auc_score(masks[chosen].ravel(), maps[number][chosen].ravel())
            assert numbers["pixel_auroc"]["rounds"][number] == pytest.approx(of_kind)
    assert set(record["defects"]) == {item.defect for item in items if item.label}
    assert len(record["support_set"]["names"]) == 2 and "not in the record" not in capsys.readouterr().out
    reproduce.main(["--report", str(tmp_path / "out")])
    assert "| category | untrained, mine |" in capsys.readouterr().out


def test_scores_and_maps_of_this_project(demo_data, tmp_path):
    """The import of what test.py wrote has the metrics of its record, to the last digit."""
    common = ["--obj", "ring", "--shot", "1", "--inferences", "2", "--data_type", "folder", "--num_workers", "0"]
    common += ["--data_path", str(demo_data), "--output", str(tmp_path)]
    scored = ["--untrained", "--weights", "none", "--stn_mode", "affine", "--img_size", "64", "--save_maps"]
    test_command.main([*common, *scored, "--device", "cpu"])
    name = "ring_1_affine_untrained"
    given = ["--import", f"{tmp_path}/{name}.csv", "--maps", f"{tmp_path}/{name}_maps", "--name", "mine"]
    reproduce.main([*common, *given])
    ours, theirs = (json.loads((tmp_path / file).read_text()) for file in (f"{name}.json", "ring_1_last_mine.json"))
    for entry in ("rounds", *METRIC_NAMES, "not_available", "defects"):
        assert theirs[entry] == ours[entry], entry


def test_defective_images_only(command, items, scores, demo_data, tmp_path, capsys):
    """What cannot be computed is n/a with the reason, as in test.py."""
    shutil.copytree(demo_data / "ring", tmp_path / "part" / "ring")
    shutil.rmtree(tmp_path / "part" / "ring" / "test" / "good")
    defective = [number for number, item in enumerate(items) if item.label]
    write_scores(tmp_path / "scores.csv", [items[number] for number in defective], scores[:, defective])
    reproduce.main([*command, "--data_path", str(tmp_path / "part")])
    record = json.loads((tmp_path / "out" / "ring_1_last_mine.json").read_text())
    assert record["rounds"] == 2 * [{"image_auroc": None, "image_ap": None, "image_f1_max": None}]
    assert set(record["not_available"]) == set(record["rounds"][0])
    assert re.search(rf"image AUROC +n/a +{NO_NORMAL}", capsys.readouterr().out)


def test_no_record_is_replaced_unasked(command, items, scores, maps, demo_data, tmp_path):
    """Neither with other scores, maps or data, nor one of an earlier version; the same again is no replacement."""
    record = tmp_path / "out" / "ring_1_last_mine.json"
    shutil.copytree(demo_data, tmp_path / "data")
    command += ["--data_path", str(tmp_path / "data")]
    with_maps = [*command, "--maps", str(tmp_path / "maps")]
    reproduce.main(with_maps)
    reproduce.main(with_maps)
    before = record.read_bytes()

    def refused(words, sentence):
        with pytest.raises(UserError, match=f"{sentence}; give another --name or --output to keep it, or --overwrite"):
            reproduce.main(words)
        assert record.read_bytes() == before

    refused(command, "ring_1_last_mine.json was made with other settings: other maps")
    mask = next((tmp_path / "data/ring/ground_truth").glob("*/*"))
    content = mask.read_bytes()
    Image.new("L", (64, 64), 255).save(mask)
    refused(with_maps, "was made with other settings: other test images")
    mask.write_bytes(content)
    write_scores(tmp_path / "scores.csv", items, scores + 1)
    refused(with_maps, "was made with other settings: other scores")
    reproduce.main([*with_maps, "--overwrite"])
    old = json.loads(record.read_text())
    del old["fingerprint"]
    record.write_text(json.dumps(old))
    before = record.read_bytes()
    refused(with_maps, "was made with other settings: no fingerprint")


def test_paired_with_records_of_this_project(command, tmp_path, capsys):
    """Paired differences in Markdown, LaTeX and CSV; what the record lacks is named."""
    reproduce.main(command)
    assert "not in the record, as there is no --maps: pixel AUROC, pixel AP" in capsys.readouterr().out
    out = tmp_path / "out"
    ours = json.loads((out / "ring_1_last_mine.json").read_text()) | {"scorer": "gaussian"}
    for numbers in ours["rounds"]:
        numbers |= {"image_auroc": numbers["image_auroc"] / 2, "pixel_auroc": 0.5}
    ours["checkpoint"] = {"path": "a.pt", "sha256": "a"}
    (out / "ring_1_last.json").write_text(json.dumps(ours))
    reproduce.main(["--report", str(out)])
    text = capsys.readouterr().out
    half = 100 * read_results(out).records["ring", 1, "last"][0]["rounds"][0]["image_auroc"]
    assert "### image AUROC, K = 1: differences from gaussian, paired" in text
    assert "last, mine: pixel AUROC is not in any record (n/a)." in text
    assert "last, mine $-$ last" in (out / "tables.tex").read_text()
    rows = list(csv.DictReader((out / "tables.csv").read_text().splitlines()))
    (row,) = (one for one in rows if one["metric"] == "image_auroc_paired" and one["category"] == "ring")
    assert float(row["rounds"].split()[0]) == pytest.approx(half)
    (tmp_path / "a").mkdir()
    (out / "ring_1_last.json").rename(tmp_path / "a" / "ring_1_last.json")
    reproduce.main(["--compare", str(tmp_path / "a"), str(out), "--format", "csv"])
    assert '1,image_auroc_paired,ring,"out: last, mine - a: last",' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--name", "a b"], "--import needs --name"),
        (["--name", "gaussian"], "--import needs --name"),
        (["--inferences", "3"], r"has 2 round\(s\), not 3; give --inferences 2"),
        (["--shot", "90"], "image"),
        (["--obj", "weave"], "which is not a test image"),
        (["--import", "nowhere.csv"], "cannot read the scores nowhere.csv"),
        (["--maps", "nowhere"], r"cannot read the maps nowhere/round_0\.npz .* each with the arrays names"),
    ],
)
def test_mistakes(command, change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        reproduce.main([*command, *change])
    assert not (tmp_path / "out").exists()


def _without_the_last(names, maps):
    return {"names": names[:-1], "maps": maps[:-1]}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_without_the_last, "maps for .* test images; missing: "),
        (
            lambda names, maps: {"names": np.append(names, "x/y.png"), "maps": np.append(maps, maps[:1], 0)},
            "a name is repeated",
        ),
        (lambda names, maps: {"names": names, "maps": maps[:, :-1]}, r"they must be numbers \(B, S, S\)"),
        (lambda names, maps: {"names": names, "maps": maps * np.nan}, "not finite"),
        (lambda names, maps: {"names": names, "maps": maps[:, :8, :8]}, "maps of 32 and of 8 pixels a side"),
        (lambda names, maps: {"maps": maps}, "KeyError"),
    ],
)
def test_wrong_maps(command, maps, tmp_path, damage, sentence):
    file = tmp_path / "maps" / "round_1.npz"
    with np.load(file) as stored:
        content = damage(stored["names"], stored["maps"])
    np.savez(file, **content)
    with pytest.raises(UserError, match=sentence):
        reproduce.main([*command, "--maps", str(tmp_path / "maps")])
    assert not (tmp_path / "out").exists()
