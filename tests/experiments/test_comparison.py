"""Paired differences: by hand and against scipy, from any baseline, in all metrics, of one folder and of two."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import stats

import reproduce
from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import TYPE_METRICS
from experiments.comparison import pairs_of
from experiments.formats import FORMATS, format_p, to_latex, to_markdown
from experiments.results import read_results
from experiments.run import compare, make_tables
from tests.experiments.test_tables import entry, table, write_record
from utils.errors import UserError

PAIRED = "image AUROC, K = 2: {}, paired"


def titled(tables, title):
    return next(table for table in tables if table.title == title)


@pytest.fixture
def folder(tmp_path):
    """Three methods on two categories, three rounds: all metrics and a defect type."""
    generator = np.random.default_rng(0)
    for category in ("bottle", "cable"):
        for scorer in ("gaussian", "neighbours", "mine"):
            for weights in ("untrained", "last")[: 1 if scorer == "mine" else 2]:
                rounds = [dict(zip(METRIC_NAMES, generator.random(7).tolist(), strict=True)) for _ in range(3)]
                scratch = {name: {"rounds": generator.random(3).tolist()} for name in TYPE_METRICS}
                changes = {"scorer": scorer, "defects": {"scratch": scratch}}
                write_record(tmp_path, category, 2, weights, rounds, **changes)
    return tmp_path


def rounds(folder, category, kind, metric="image_auroc"):
    record = read_results(folder).records[category, 2, kind][0]
    return 100 * np.array([numbers[metric] for numbers in record["rounds"]])


@pytest.mark.parametrize("metric", ["image_auroc", "image_f1_max", "pixel_ap", "pro"])
def test_differences_against_scipy(folder, metric):
    """Interval and p-value are those of scipy's paired t-test; of the mean over categories, too."""
    tables = make_tables(read_results(folder), "neighbours")
    made = next(table for table in tables if table.metric == f"{metric}_paired" and "defect" not in table.title)
    assert made.columns == [
        *("untrained - untrained, neighbours", "last - last, neighbours"),
        "untrained, mine - untrained, neighbours",
    ]
    column, pairs = "untrained, mine - untrained, neighbours", []
    for category in ("bottle", "cable"):
        pairs.append([rounds(folder, category, f"untrained, {name}", metric) for name in ("mine", "neighbours")])
        expected = stats.ttest_rel(*pairs[-1])
        found = entry(made, category, column)
        assert found.p == pytest.approx(expected.pvalue) and found.mean == pytest.approx(np.subtract(*pairs[-1]).mean())
        assert found.interval == pytest.approx(expected.confidence_interval(0.95))
    mean = entry(made, "mean of 2 of 15", column)
    assert mean.p == pytest.approx(stats.ttest_rel(*np.mean(pairs, axis=0)).pvalue)
    over = entry(made, "over categories", column)
    expected = stats.ttest_1samp([np.subtract(*pair).mean() for pair in pairs], 0)
    assert over.p == pytest.approx(expected.pvalue)
    assert over.interval == pytest.approx(expected.confidence_interval(0.95))
    tested = [one for row in made.rows.values() for one in row]
    smallest = min(tested, key=lambda one: one.p)
    assert len(tested) == 6 and smallest.p_holm == pytest.approx(min(1, 6 * smallest.p))
    assert mean.p_holm >= mean.p and f"{column} in " in made.notes[0]


def test_differences_by_defect_type(folder):
    title, records = "PRO by defect type, K = 2: differences from gaussian, paired", read_results(folder).records
    made = titled(make_tables(read_results(folder), "gaussian"), title)
    one, two = (
        records["bottle", 2, kind][0]["defects"]["scratch"]["pro"]["rounds"] for kind in ("last", "last, neighbours")
    )
    found = entry(made, "bottle, scratch", "last, neighbours - last")
    assert found.p == pytest.approx(stats.ttest_rel(two, one).pvalue) and not made.means


@pytest.mark.parametrize(
    ("baseline", "names"),
    [
        ("gaussian", ["untrained, mine - untrained", "untrained, neighbours - untrained", "last, neighbours - last"]),
        ("untrained", ["last - untrained", "last, neighbours - untrained, neighbours"]),
        ("last, neighbours", ["untrained", "last", "untrained, mine", "untrained, neighbours"]),
        ("mine", ["untrained", "last", "untrained, neighbours", "last, neighbours"]),
    ],
)
def test_any_baseline(folder, baseline, names):
    """A scorer, a kind of weights, a column, or a method with one column, from which all others differ."""
    ending = {"last, neighbours": " - last, neighbours", "mine": " - untrained, mine"}.get(baseline, "")
    found = [pair.name for pair in pairs_of(read_results(folder), baseline)]
    assert found == [name + ending for name in names]


def test_without_a_baseline(folder):
    """Two of them, in three metrics; a baseline gives all metrics, and defect types."""
    paired = [made for made in make_tables(read_results(folder)) if made.metric.endswith("_paired")]
    assert [(made.metric, made.title.split("from ")[1]) for made in paired] == [
        (f"{metric}_paired", f"{baseline}, paired")
        for baseline in ("gaussian", "untrained")
        for metric in ("image_auroc", "pixel_auroc", "pro")
    ]
    assert len([made for made in make_tables(read_results(folder), "mine") if made.metric.endswith("_paired")]) == 10


def test_a_folder_as_baseline(folder, tmp_path):
    other = tmp_path / "other"
    write_record(other, "bottle", 2, "last", [(0.5, 0.5)] * 3)
    made = titled(make_tables(read_results(folder), str(other)), PAIRED.format("differences from other"))
    assert made.columns[0] == f"last: {folder.name} - other"
    expected = stats.ttest_rel(rounds(folder, "bottle", "last"), [50, 50, 50])
    assert entry(made, "bottle", made.columns[0]).p == pytest.approx(expected.pvalue)
    assert made.columns[1:] == [f"{folder.name}: last, neighbours - other: last"] and list(made.rows) == ["bottle"]
    with pytest.raises(
        UserError, match=r"nothing is neither a results folder nor another column, scorer, method or kind"
    ):
        make_tables(read_results(folder), "nothing")


def test_commands(folder, tmp_path, capsys):
    """--report and --compare with --baseline."""
    reproduce.main(
        ["--report", str(folder), "--baseline", "mine", "--objs", "bottle", "--columns", "last", "untrained, mine"]
    )
    text = capsys.readouterr().out
    assert "last - untrained, mine |" in text and "neighbours" not in text.split("###", 1)[1] and "cable" not in text
    reproduce.main(["--compare", str(folder), str(folder), "--baseline", "mine", "--format", "csv"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["metric"] for row in rows} >= {"image_auroc_paired", "pro_paired", "pixel_f1_max_paired"}
    assert all(0 <= float(row["p"]) <= float(row["p_holm"]) <= 1 for row in rows if row["p"])


def compared(folder, a, b):
    """The comparison of two folders; a, b: image AUROCs of the rounds by category, or all arguments of a record."""
    for name, records in (("a", a), ("b", b)):
        for category, changes in records.items():
            changes = changes if isinstance(changes, dict) else {"rounds": [(auroc, 0.5) for auroc in changes]}
            write_record(folder / name, category, 2, "last", **{"rounds": [(0.9, 0.5)], **changes})
    return compare(read_results(folder / "a"), read_results(folder / "b"))


def test_equal_and_single_rounds(tmp_path):
    """Without a spread, p is 0 or 1; of a single round there is neither interval nor p."""
    image, pixel = compared(tmp_path, {"bottle": (0.5, 0.75)}, {"bottle": (0.75, 1.0)})
    assert entry(image, "bottle", "last: b - a").p == 0 and entry(pixel, "bottle", "last: b - a").p == 1
    assert "+25.0 (+25.0 to +25.0), p < 0.001" in to_markdown([image]) and format_p(0.0214) == "p 0.021"
    image, _ = compared(tmp_path, {"bottle": [0.5]}, {"bottle": [0.5]})
    assert "| bottle | +0.0 |" in to_markdown([image])


def test_comparison_by_hand(tmp_path):
    before = {"bottle": (0.90, 0.92), "cable": (0.80, 0.80)}
    image, pixel = compared(tmp_path, before, {"bottle": (0.93, 0.93), "cable": (0.79, 0.79), "screw": (0.79, 0.79)})
    mean = entry(image, "mean of 2 of 15", "last: b - a")
    assert list(image.rows) == ["bottle", "cable"] and mean.mean == pytest.approx(0.5)  # of +2 and -1
    assert mean.rounds == pytest.approx([1, 0])  # of +3, +1 and of -1, -1
    over = entry(image, "over categories", "last: b - a")
    assert over.sd == pytest.approx(3 / np.sqrt(2)) and over.interval == pytest.approx((-18.56, 19.56), abs=0.01)
    assert entry(pixel, "mean of 2 of 15", "last: b - a").mean == 0
    text = to_markdown([image, pixel])
    assert "Higher: last: b - a in 1 of 2." in text and "| over categories | +0.5 (-18.6 to +19.6), p 0.795 |" in text


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ({"bottle": {}}, {"bottle": {"support": "1" * 64}}, "different support sets"),
        (
            {"bottle": {"names": [["a.png"]]}},
            {"bottle": {"names": [["b.png"]]}},
            r"different support sets: drawn \w{8} and drawn \w{8}",
        ),
        ({"bottle": [0.9]}, {"bottle": (0.9, 0.9)}, r"2_2.pt 0{8}, 1 rounds and 2_2.pt 0{8}, 2 rounds"),
        ({"bottle": {}}, {"cable": {}}, "in common"),
    ],
)
def test_comparison_needs_the_same_support_sets(a, b, words, tmp_path):
    with pytest.raises(UserError, match=words):
        compared(tmp_path, a, b)


def test_another_method_against_the_release_s_scorer(with_another_method):
    ours, theirs = map(read_results, with_another_method)
    (one,) = compare(ours, theirs)
    assert one.columns == ["b: last, mine - a: last"] and entry(one, "bottle", *one.columns).mean == pytest.approx(4.5)
    (back,) = compare(theirs, ours)
    assert back.columns == ["a: last - b: last, mine"]
    assert entry(back, "bottle", *back.columns).mean == pytest.approx(-4.5)
    assert "bottle & $+$4.5 ($-$1.9 to $+$10.9), p 0.070 \\\\" in to_latex([one])
    row, *_ = csv.DictReader(FORMATS["csv"]([one]).splitlines())
    assert float(row["percent"]) == pytest.approx(4.5) and row["column"] == "b: last, mine - a: last"


def test_another_method_and_the_project_s_own_records(tmp_path):
    """Its settings are its own: no STN mode, another size."""
    write_record(tmp_path, "bottle", 2, "untrained", [(0.97, 0.95), (0.95, 0.93)])
    write_record(tmp_path, "bottle", 2, "untrained", [(0.98, 0.95), (0.96, 0.93)], stn_mode="none", scorer="mine")
    paired = table(tmp_path, PAIRED.format("differences from gaussian"))
    assert entry(paired, "bottle", "untrained, mine - untrained").mean == pytest.approx(1)


def test_scorers_are_compared_on_the_same_weights_only(tmp_path):
    for scorer, digest in (("gaussian", "b"), ("neighbours", "a")):
        changes = {"scorer": scorer, "checkpoint": {"path": "a.pt", "sha256": digest}}
        write_record(tmp_path, "bottle", 2, "last", [(0.97, 0.95), (0.95, 0.93)], **changes)
    assert not [table for table in make_tables(read_results(tmp_path)) if table.title.endswith("paired")]
