"""The tables: published cells, means and spreads computed by hand, missing entries, and the four formats."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import jsonschema
import numpy as np
import pytest

from benchmarks.reference import REFERENCE
from evaluation.metrics import METRIC_NAMES
from experiments.formats import format_entry, to_csv, to_html, to_latex, to_markdown
from experiments.results import GRID_FILE, SCHEMA_FILE, read_results
from experiments.run import make_tables
from experiments.tables import NO_TRUTH, Entry, read_published
from utils.choices import CATEGORIES
from utils.errors import UserError
from utils.files import PROJECT_ROOT

PUBLISHED_CELLS = REFERENCE / "reference" / "published_mvtec.csv"


def write_record(
    folder,
    category,
    shot,
    weights,
    rounds,
    data_type="mvtec",
    stn_mode="affine",
    names=None,
    support="0" * 64,
    **changes,
):
    """Writes a record as test.py does. rounds: pairs of image and pixel AUROC, or dicts. changes: of its entries."""
    numbers = [pair if isinstance(pair, dict) else {"image_auroc": pair[0], "pixel_auroc": pair[1]} for pair in rounds]
    record = {
        "arguments": {"obj": category, "shot": shot, "data_type": data_type, "stn_mode": stn_mode}
        | {"img_size": 224, "seed": 668},
        **{"weights": weights, "epoch": {"last": 50, "best": 7}.get(weights), "commit": "abc", "device": "cpu"},
        **{"date": "2026-01-01T00:00:00+0000", "rounds": numbers},
        "support_set": {"source": "", "names": names} | ({} if names else {"path": "s/2_2.pt", "sha256": support}),
        **changes,
    }
    folder.mkdir(exist_ok=True)
    scorer = f"_{changes['scorer']}" if "scorer" in changes else ""
    (folder / f"{category}_{shot}_{stn_mode}_{weights}{scorer}.json").write_text(json.dumps(record))
    return record


@pytest.fixture
def folder(tmp_path):
    """Records of two of the fifteen categories, one of them without last weights."""
    for weights, better in (("untrained", 0), ("last", 0.01), ("best", 0.02)):
        write_record(tmp_path, "bottle", 8, weights, [(0.97 + better, 0.95), (0.95 + better, 0.93)])
        if weights != "last":
            write_record(tmp_path, "screw", 8, weights, [(0.50, 0.91), (0.56, 0.91)])
    return tmp_path


def table(folder, title):
    return next(table for table in make_tables(read_results(folder)) if table.title == title)


def entry(table, category, column):
    return (table.rows | table.means)[category][table.columns.index(column)]


@pytest.mark.skipif(not PUBLISHED_CELLS.is_file(), reason=f"no {PUBLISHED_CELLS}")
def test_every_published_cell():
    """The project's file equals the reference in every cell."""
    published, cells = read_published(), 0
    for row in csv.DictReader(PUBLISHED_CELLS.read_text().splitlines()):
        for source in ("paper", "release"):
            for metric in ("image_auroc", "pixel_auroc"):
                cells += 1
                value = float(row[f"{source}_{metric}"])
                assert published[source, metric, int(row["shot"])][row["category"]] == value
    assert cells == 3 * 16 * 4 == sum(map(len, published.values()))


@pytest.mark.parametrize("shot", [2, 4, 8])
@pytest.mark.parametrize("metric", ["image_auroc", "pixel_auroc"])
def test_published_columns(tmp_path, metric, shot):
    """The mean is that of the scored categories; notes give the mean of all, and a misprint."""
    write_record(tmp_path, "bottle", shot, "best", [(0.9, 0.9)])
    made = table(tmp_path, f"{METRIC_NAMES[metric]}, K = {shot}")
    for source in ("paper", "release"):
        cells = dict(read_published()[source, metric, shot])
        printed = cells.pop("average")
        assert list(cells) == list(CATEGORIES["mvtec"]) == list(made.rows)
        for category, value in cells.items():
            assert entry(made, category, source) == Entry(value)
        assert (
            entry(made, "mean of 1 of 15", source).mean == cells["bottle"]
        )  # over the categories that were scored here
        every = sum(cells.values()) / 15
        assert f"{source}: the mean of all 15 categories is {every:.1f}" in " ".join(made.notes)
        noted = any(note.startswith(f"{source}: prints {printed}") for note in made.notes)
        assert noted == (abs(every - printed) > 0.05)
        assert noted == ((source, metric, shot) == ("paper", "pixel_auroc", 8))
    assert entry(made, "bottle", "best - paper").mean == pytest.approx(90 - entry(made, "bottle", "paper").mean)


def test_rows_by_hand(folder):
    """Each set of categories that a column has is a row, in which all columns, also published ones, cover this set."""
    made = table(folder, "image AUROC, K = 8")
    assert made.columns == ["untrained", "last", "best", "paper", "release", "best - paper", "best - release"]
    assert table(folder, "pixel AUROC, K = 8").columns == made.columns
    bottle = entry(made, "bottle", "best")
    assert (bottle.mean, bottle.sd) == pytest.approx((98, np.sqrt(2)))
    assert entry(made, "screw", "last") is None and entry(made, "cable", "best") is None
    assert list(made.means) == ["mean of 2 of 15", "mean of 1 of 15"]
    assert {"mean of 2 of 15: bottle, screw.", "mean of 1 of 15: bottle."} <= set(made.notes)
    mean = entry(made, "mean of 2 of 15", "best")  # rounds: (99 + 50) / 2 and (97 + 56) / 2
    assert (mean.mean, mean.sd) == (pytest.approx(75.5), pytest.approx(np.sqrt(2)))
    assert entry(made, "mean of 2 of 15", "paper").mean == pytest.approx((99.8 + 63.4) / 2)
    assert entry(made, "mean of 2 of 15", "best - paper").mean == pytest.approx(((98 - 99.8) + (53 - 63.4)) / 2)
    assert entry(made, "mean of 2 of 15", "last") is None
    of_one = [entry(made, "mean of 1 of 15", column).mean for column in ("last", "best", "paper")]
    assert of_one == pytest.approx([97, 98, 99.8])
    row = re.search(r"\| mean of 2 .*", to_markdown([made]))[0]
    assert row == "| mean of 2 of 15 | 74.5 ± 1.4 |  | 75.5 ± 1.4 | 81.6 | 82.8 | -6.1 | -7.3 |"
    for text in (to_latex([made]), to_html([made], read_results(folder))):
        assert "mean of 1 of 15" in text and "81.6" in text


def test_only_what_was_scored(folder):
    """Rows and columns without records are left out; a part can be chosen; the published mean follows."""
    (folder / GRID_FILE).write_text(json.dumps({"objs": ["cable"], "shots": [2, 8], "kinds": ["source"]}))
    results = read_results(folder).part(only_scored=True)
    assert (results.categories, results.shots) == (["bottle", "screw"], [8])
    made = make_tables(results)[0]
    assert list(made.rows) == ["bottle", "screw"] and "missing" in to_markdown([made])  # screw has no last weights
    assert list(made.means) == ["mean", "mean of 1 of 2"] and "source" not in made.columns
    chosen = make_tables(read_results(folder).part(["screw"], [8], ["best"]))[0]
    assert chosen.columns[:3] == ["best", "paper", "release"] and list(chosen.rows) == ["screw"]
    for choice in (["wood", "screws"], [4], ["first"]):
        place = [["wood", "screws"], [4], ["first"]].index(choice)
        with pytest.raises(UserError, match=r"has no .*; it has bottle, cable.*K = 2, 8; the columns untrained \|"):
            read_results(folder).part(*[choice if place == number else None for number in range(3)])


def test_two_trainings_by_hand(folder):
    """Means of support sets (99, 97; 95, 91), (95, 94): the spread of each, in cells, differences and the mean."""
    write_record(folder / "seed_669", "bottle", 8, "last", [(0.92, 0.95), (0.92, 0.93)])
    made = table(folder, "image AUROC, K = 8")
    last = entry(made, "bottle", "last")  # trainings 98, 96 and 92, 92
    assert (last.mean, last.rounds) == (pytest.approx(94.5), pytest.approx((95, 94)))
    assert (last.sd, last.sd_trainings) == pytest.approx((np.sqrt(0.5), np.sqrt(12.5)))
    assert format_entry(last, "last") == "94.5 ± 0.7 ± 3.5" and last.trainings[1] == pytest.approx((92, 92))
    assert entry(made, "mean of 1 of 15", "last").sd_trainings == last.sd_trainings
    assert entry(made, "bottle", "best").sd_trainings is None
    assert "then ± that over up to 2 trainings" in to_markdown([made], read_results(folder))
    rows = csv.DictReader(to_csv([made]).splitlines())
    (line,) = [row for row in rows if (row["category"], row["column"]) == ("bottle", "last")]
    assert float(line["sd_trainings"]) == pytest.approx(np.sqrt(12.5)) and float(line["low95"]) < 94.5 - 2 * 2.5
    write_record(folder / "seed_669", "bottle", 8, "best", [(0.92, 0.95), (0.92, 0.93)], support="1" * 64)
    with pytest.raises(UserError, match="bottle, K = 8 with different support sets"):
        read_results(folder)


@pytest.mark.parametrize(
    ("data_type", "category", "mean"), [("folder", "screw", "mean"), ("mpdd", "tubes", "mean of 1 of 6")]
)
def test_data_without_published_numbers(data_type, category, mean, tmp_path):
    """A folder has the rows of its records; MPDD the paper's six, and no source for its figures was found."""
    write_record(tmp_path, category, 2, "best", [(0.9, None)], data_type)
    made = table(tmp_path, "image AUROC, K = 2")
    assert made.columns == ["best"] and list(made.rows) == list(CATEGORIES[data_type] or ["screw"])
    assert list(made.means) == [mean]


def test_images_without_ground_truth(tmp_path):
    """Undefined metrics differ from missing records, and are left out of means and comparisons."""
    write_record(tmp_path, "screw", 2, "best", [(0.9, 0.8)], data_type="folder")
    write_record(tmp_path, "solar", 2, "best", [(0.9, None)], data_type="folder")
    results = read_results(tmp_path)
    made = table(tmp_path, "pixel AUROC, K = 2")
    assert entry(made, "mean of 1 of 2", "best") == Entry(80, trainings=((80.0,),))
    assert "| solar | n/a |" in to_markdown([made], results)
    assert "nan" not in to_html([made], results) and "nan" not in to_latex([made], results)
    assert "solar,best,n/a,,,," in to_csv([made])


def test_what_was_asked_for_and_failed_is_shown(tmp_path):
    write_record(tmp_path, "ring", 2, "last", [(0.9, 0.9)], data_type="folder")
    asked = {"objs": ["ring", "weave"], "shots": [2, 4], "kinds": ["untrained", "last", "best, neighbours"]}
    (tmp_path / GRID_FILE).write_text(json.dumps(asked))
    results = read_results(tmp_path)
    assert results.categories == ["ring", "weave"] and results.shots == [2, 4]
    assert "| weave | missing | missing |" in to_markdown(make_tables(results), results)
    assert [format_entry(None, column) for column in ("last", "paper", "best - paper")] == ["missing", "", ""]
    (tmp_path / GRID_FILE).write_text(json.dumps({"objs": ["ring", "weave"], "shots": [2]}))  # of earlier versions
    assert table(tmp_path, "image AUROC, K = 2").columns == ["untrained", "last", "best"]


def test_kinds_of_defects(tmp_path):
    scratch = {"images": 3, "image_auroc": {"mean": 0.6, "rounds": [0.5, 0.7]}, "pixel_auroc": None, "pro": None}
    write_record(tmp_path, "ring", 2, "last", [(0.9, 0.9), (0.8, 0.9)], "folder", defects={"scratch": scratch})
    write_record(tmp_path, "weave", 2, "last", [(0.9, 0.9)], "folder")
    made = table(tmp_path, "By defect type, K = 2: last weights, scorer gaussian")
    assert list(made.rows) == ["ring, scratch"] and entry(made, "ring, scratch", "PRO") is NO_TRUTH
    assert "| ring, scratch | 60.0 ± 14.1 | n/a | n/a |" in to_markdown([made])


def test_seconds(tmp_path):
    """Of scoring from the records, of training from the record of train.py, also after the folder was moved."""
    for category in ("ring", "weave"):
        checkpoint = f"/elsewhere/save_checkpoints/affine/2/{category}/{category}_2_affine_last.pt"
        changes = {"seconds": {"network": 3.0, "metrics": 1.5}, "checkpoint": {"path": checkpoint, "sha256": "a"}}
        write_record(tmp_path, category, 2, "last", [(0.9, 0.9)], "folder", **changes)
    (tmp_path / "save_checkpoints/affine/2/ring").mkdir(parents=True)
    trained = {"epochs": [{"elapsed_seconds": 10.0}, {"elapsed_seconds": 20.5}]}
    (tmp_path / "save_checkpoints/affine/2/ring/ring_2_affine_record.json").write_text(json.dumps(trained))
    results = read_results(tmp_path)
    made = table(tmp_path, "Seconds, K = 2")
    assert made.columns == ["training", "scoring, last"]
    assert entry(made, "ring", "training").mean == 30.5 and entry(made, "weave", "training") is None
    assert entry(made, "mean", "scoring, last").mean == 4.5
    tables = make_tables(results)
    assert "| weave |  | 4.5 |" in to_markdown(tables, results) and "30.5" in to_html(tables, results)
    assert "Seconds" not in to_latex(tables, results) and 'class="missing"' not in to_html([made], results)
    assert "2,seconds,ring,training,,,,,,30.5" in to_csv(tables)


def test_other_metrics_come_from_the_last_weights(tmp_path):
    for weights, value in (("last", 0.5), ("best", 0.6)):
        numbers = {"image_auroc": 0.9, "pixel_auroc": 0.9, "image_ap": value, "image_f1_max": value}
        write_record(tmp_path, "ring", 2, weights, [numbers | {"pixel_ap": None, "pro": value}], "folder")
    made = table(tmp_path, "Other metrics, K = 2: last weights, scorer gaussian")
    assert entry(made, "ring", "image AP").mean == 50 and entry(made, "ring", "pixel AP") is NO_TRUTH
    assert entry(table(tmp_path, "PRO, K = 2"), "ring", "last").mean == 50


def test_markdown(folder):
    results = read_results(folder)
    text = to_markdown(make_tables(results), results)
    assert "- commit: abc\n" in text and "target's own test labels" in text and "optimistic" in text
    assert "- last: epoch 50: the last" in text and re.search(
        r"- support sets: 2 \(2_2\.pt\), SHA-256 \w{8}\.\.\.\n", text
    )
    row = re.search(r"\| bottle \|.*", text[text.index("image AUROC, K = 8") :])[0]
    assert row == "| bottle | 96.0 ± 1.4 | 97.0 ± 1.4 | 98.0 ± 1.4 | 99.8 | 99.8 | -1.8 | -1.8 |"
    assert "| screw | 53.0 ± 4.2 | missing |" in text and "- paired differences: with Student" in text
    assert "paper: prints 96.8 as its average, the mean of its cells is 96.7." in text


def test_latex(folder):
    """For a paper: booktabs, label, caption, the best of each row in bold, nothing that is missing."""
    write_record(folder, "wood", 8, "best", [(0.9, 0.91), (0.9, 0.91)])
    (folder / GRID_FILE).write_text(json.dumps({"objs": [], "shots": [8], "kinds": ["source"]}))
    results = read_results(folder)
    text = to_latex([made for made in make_tables(results) if made.metric in ("image_auroc", "pixel_auroc")], results)
    assert text.count("\\toprule") == text.count("\\bottomrule") == text.count("\\end{table}") == 2
    assert "\\label{tab:image-auroc-k-8}" in text and "\\caption{Image AUROC, K = 8. In percent, mean $\\pm$" in text
    image = text[text.index("\\toprule") : text.index("\\bottomrule")]
    lines = [line for line in image.splitlines() if "&" in line]
    assert {line.count("&") for line in lines} == {7} and "missing" not in text and "source" not in text
    names = [line.split(" &")[0] for line in lines]
    assert names == ["category", "bottle", "screw", "wood", *(f"mean of {n} of 15" for n in (3, 2, 1))]
    assert lines[1] == (
        "bottle & 96.0 $\\pm$ 1.4 & 97.0 $\\pm$ 1.4 & 98.0 $\\pm$ 1.4 & \\textbf{99.8} & \\textbf{99.8} & $-$1.8 & "
        "$-$1.8 \\\\"
    )
    assert "screw & 53.0 $\\pm$ 4.2 & -- & 55.0" not in text and "screw & 53.0 $\\pm$ 4.2 & -- & " in text


def test_csv(folder, tmp_path):
    """Also: intervals stay within percents."""
    write_record(folder, "wood", 8, "best", [(0.9, 0.1), (1.0, 0.0)])
    rows = csv.DictReader(to_csv(make_tables(read_results(folder))).splitlines())
    cells = {(row["metric"], row["category"]): row for row in rows if row["column"] == "best"}
    bottle = cells["image_auroc", "bottle"]
    assert [float(value) for value in bottle["rounds"].split()] == pytest.approx([99, 97])
    assert float(bottle["sd"]) == pytest.approx(np.sqrt(2)) and bottle["shot"] == "8"
    assert float(bottle["low95"]) == pytest.approx(98 - 12.7062 * 1, abs=1e-3)  # t of one degree, times SD / sqrt(2)
    assert float(cells["image_auroc", "wood"]["high95"]) == 100 and float(cells["pixel_auroc", "wood"]["low95"]) == 0


def test_html_is_whole_and_escapes_names(tmp_path):
    name = "<img src=x onerror=alert(1)> $a$"
    write_record(tmp_path, "ring", 2, "last", [(0.9, 0.9), (0.8, 0.9)], data_type="folder")
    (tmp_path / GRID_FILE).write_text(json.dumps({"objs": [name], "shots": [2]}))
    results = read_results(tmp_path)
    page = to_html(make_tables(results), results)
    parser, tags = HTMLParser(), []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert [tag for tag, _ in tags].count("svg") == 2 and [tag for tag, _ in tags].count("table") == 2
    assert not any(tag in ("img", "script", "link") or "src" in attributes for tag, attributes in tags)
    assert "85.0 ± 7.1" in page and page == to_html(make_tables(results), results)


def test_refused_folders(tmp_path):
    with pytest.raises(UserError, match="no results folder"):
        read_results(tmp_path / "nothing")
    for content, words in (
        (None, r"no records of test\.py"),
        ("{", "cannot read "),
        ("{}", "is not a record"),
    ):
        if content:
            (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=words):
            read_results(tmp_path)
    for category, stn_mode in (("bottle", "affine"), ("cable", "scale")):
        write_record(tmp_path, category, 2, "best", [(0.9, 0.9)], stn_mode=stn_mode)
    with pytest.raises(UserError, match="different stn_mode: affine and scale"):
        read_results(tmp_path)


def test_what_a_record_lacks_is_named(with_another_method):
    folder = with_another_method[1]
    made = table(folder, "pixel AUROC, K = 2")
    assert made.notes[0] == "last, mine: pixel AUROC is not in any record (n/a)."
    assert entry(made, "bottle", "last, mine") is NO_TRUTH
    (file,) = folder.iterdir()
    record = json.loads(file.read_text())
    for change, words in (
        ({"date": None}, "date: None is not of type .string."),
        ({"weights": "first"}, "weights: .first. is not one of"),
        ({"rounds": []}, "rounds: .. should be non-empty"),
        ({"rounds": [{"image_auroc": 95}]}, r"rounds\[0\]\.image_auroc: 95 is greater than the maximum of 1"),
        ({"rounds": [{"pixel_auroc": 0.5}]}, r"rounds\[0\]: .image_auroc. is a required property"),
        ({"rounds": [{"image_auroc": 0.5}, {"image_auroc": 0.5, "pro": 0}]}, "other metrics than"),
        ({"defects": {"cut": {"pro": {"mean": 1}}}}, "defects.cut.pro: .rounds. is a required property"),
        ({"rounds": [{"image_auroc": 0.5}]}, "names has 2 rounds, rounds has 1"),
        ({"support_set": {"names": None}}, "it lacks support_set.sha256"),
        ({"arguments": {"obj": "bottle"}}, "config: .shot. is a required property; config: .data_type. is"),
    ):
        file.write_text(json.dumps(record | change))
        with pytest.raises(UserError, match=words):
            read_results(folder)
    file.write_text(json.dumps({"arguments": record["arguments"]}))
    with pytest.raises(UserError, match=r".commit. is a required property; .date. is .* and 3 more"):
        read_results(folder)


def test_the_schema_and_the_committed_records():
    """Records are checked against it where they are read."""
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA_FILE.read_text()))
    folders = map(read_results, (PROJECT_ROOT / "results" / "published").iterdir())
    assert sum(len(records) for results in folders for records in results.records.values()) == 24


def test_columns_are_what_was_scored(folder, tmp_path):
    """Of another scorer alone, without the release's; selection by a source category where it was run."""
    write_record(folder, "bottle", 8, "source", [(0.975, 0.9), (0.955, 0.9)])
    made = table(folder, "image AUROC, K = 8")
    assert made.columns[:4] == ["untrained", "last", "source", "best"]
    assert entry(made, "bottle", "source").mean == pytest.approx(96.5)
    write_record(tmp_path / "other", "bottle", 2, "untrained", [(0.98, 0.95)], scorer="neighbours")
    made = table(tmp_path / "other", "image AUROC, K = 2")
    assert made.columns == ["untrained, neighbours", "paper", "release"]
    assert entry(made, "bottle", "untrained, neighbours").mean == pytest.approx(98)


def test_a_record_of_version_0_1(tmp_path):
    """With "arguments" and "decisive": its numbers are in the tables, as those of the committed results."""
    record = json.loads((PROJECT_ROOT / "tests/data/369ac53/record.json").read_text())
    assert "arguments" in record and "config" not in record
    shutil.copy(PROJECT_ROOT / "tests/data/369ac53/record.json", tmp_path / "a.json")
    category, shot, data_type = (record["arguments"][name] for name in ("obj", "shot", "data_type"))
    results = read_results(tmp_path)
    assert (results.categories, results.shots, results.data_type) == ([category], [shot], data_type)
    (table, *_) = make_tables(results)
    expected = 100 * np.mean([numbers["image_auroc"] for numbers in record["rounds"]])
    assert table.rows[category][table.columns.index(record["weights"])].mean == pytest.approx(expected)


def test_the_committed_tables_are_those_of_the_committed_records():
    folder = PROJECT_ROOT / "results/published/registration"
    results = read_results(folder)
    assert to_markdown(make_tables(results), results) == (folder / "tables.md").read_text()
