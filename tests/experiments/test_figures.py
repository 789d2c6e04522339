"""What lies beside records: intervals over test images, and figures for a paper."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import reproduce
from datasets.images import read_image
from datasets.mvtec import LabelledDataset, list_test_items
from evaluation.per_image import image_name, write_scores
from evaluation.saved_maps import save_maps
from experiments.examples import examples_figure, read_examples
from experiments.figures import table_figure
from experiments.results import read_results
from experiments.run import make_tables
from experiments.saved_scores import over_images
from experiments.tables import value_table
from tests.experiments.test_tables import entry
from utils.errors import UserError
from utils.naming import round_maps

SIZE = 32


@pytest.fixture(scope="module")
def folder(demo_data, tmp_path_factory):
    """Imported scores and maps of two methods on the ring, two rounds; the second method is the better one."""
    items, generator, place = (
        list_test_items(demo_data / "ring"),
        np.random.default_rng(0),
        tmp_path_factory.mktemp("a"),
    )
    labels = np.array([item.label for item in items])
    masks = np.stack([item["mask"].numpy() for item in LabelledDataset(items, SIZE)])
    common = f"--obj ring --shot 1 --data_type folder --inferences 2 --kind untrained --output {place}/out".split()
    for name, gain in (("one", 0.5), ("two", 2.0)):
        maps = (generator.normal(3, 0.3, (2, len(items), SIZE, SIZE)) + gain * masks).astype(np.float32)
        write_scores(place / f"{name}.csv", items, generator.normal(gain * labels, 1, (2, len(items))))
        for number, of_round in enumerate(maps):
            save_maps(round_maps(place / name, number), items, of_round)
        given = ["--import", f"{place}/{name}.csv", "--name", name, "--maps", str(place / name)]
        reproduce.main([*common, *given, "--data_path", str(demo_data)])
    return place / "out"


def test_intervals_over_test_images(folder, capsys, tmp_path):
    """They hold the numbers, pixel metrics need the data, and a difference has one of its own."""
    results = read_results(folder)
    tables = [made for made in make_tables(results, "one") if made.metric.endswith("_images")]
    assert [made.metric for made in tables] == [
        *("image_auroc_images", "image_ap_images", "image_f1_max_images"),
        *("pixel_auroc_images", "pixel_ap_images", "pixel_f1_max_images", "pro_images"),
    ]
    for made in tables:
        columns = ["untrained, one", "untrained, two", "untrained, two - untrained, one"]
        assert made.columns == columns and made.intervals
        one, two, difference = (entry(made, "ring", column) for column in columns)
        assert difference.mean == pytest.approx(two.mean - one.mean)
        assert all(
            found.interval[0] - 1e-9 <= found.mean <= found.interval[1] + 1e-9 for found in (one, two, difference)
        )
        assert entry(made, "mean", columns[0]).interval == pytest.approx(one.interval)
    (pixel,) = [made for made in tables if made.metric == "pixel_auroc_images"]
    assert entry(pixel, "ring", columns[2]).interval[0] > 0
    capsys.readouterr()
    without = over_images(results, data_path=tmp_path / "nowhere")
    assert [made.metric for made in without] == ["image_auroc_images", "image_ap_images", "image_f1_max_images"]
    assert "no intervals of pixel metrics over test images: no data folder" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "ring_1_untrained_two.csv").unlink()
    (first, *_) = over_images(read_results(tmp_path / "out"))
    assert first.columns == ["untrained, one"]


def test_the_bars_are_the_intervals(folder):
    tables = make_tables(read_results(folder))
    shown = [made for made in tables if made.metric in ("image_auroc", "pro")]
    figure = table_figure(shown, [made for made in tables if made.metric.endswith("_images")])
    assert len(figure.axes) == 2
    for axis, made in zip(figure.axes, shown, strict=True):
        bars = [segment for bar in axis.collections for segment in bar.get_segments()]
        ends = {tuple(np.round(segment[:, 0], 6)) for segment in bars}
        for column in made.columns:
            assert tuple(np.round(entry(made, "ring", column).interval, 6)) in ends
        assert sum(line.get_linewidth() < 1 for line in axis.lines) >= 4  # over test images: two rows, two columns
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["95 % over support sets", "95 % over test images"]
    assert table_figure([]) is None


def test_examples_are_the_saved_maps(folder, demo_data):
    results, items = read_results(folder), list_test_items(demo_data / "ring")
    (examples,) = read_examples(results, 1, ["good/000.png", "rust/001.png"])
    chosen = [index for index, item in enumerate(items) if image_name(item) in examples.names]
    assert len(chosen) == 2 and list(examples.columns) == ["untrained, one", "untrained, two"]
    dataset = LabelledDataset([items[index] for index in chosen], SIZE)
    for column, name in (("untrained, one", "one"), ("untrained, two", "two")):
        with np.load(folder.with_name(name) / "round_1.npz") as saved:
            normal = np.median([maps.max() for item, maps in zip(items, saved["maps"], strict=True) if not item.label])
            np.testing.assert_allclose(examples.columns[column], saved["maps"][chosen] / normal, rtol=1e-6)
    for number, one in enumerate(dataset):
        np.testing.assert_array_equal(examples.masks[number], one["mask"].numpy())
        np.testing.assert_array_equal(examples.images[number], one["image"].permute(1, 2, 0).numpy())
    (name,) = results.records["ring", 1, "untrained, one"][0]["support_set"]["names"][1]
    np.testing.assert_array_equal(examples.support, read_image(demo_data / "ring/train/good" / name, SIZE)[None])
    figure = examples_figure([examples])
    assert len(figure.axes) == 2 * 5 + 1 and len(figure.axes[0].images) == 1 and not figure.axes[5].images
    (bar,) = [axis for axis in figure.axes if "median image score" in axis.get_xlabel()]
    assert bar.get_xlim() == pytest.approx(figure.axes[4].images[0].get_clim())


def test_figures_fit_a_page(folder):
    """Of one to fifteen rows; of three numbers of shots on fifteen categories, too."""
    results = read_results(folder)
    (examples, *_), (shown, *_) = read_examples(results), value_table(results, "pro", 1)
    for count, shots in ((1, 1), (15, 3)):
        rows = {f"category {number}": shown.rows["ring"] for number in range(count)}
        of_shots = [shown._replace(shot=shot, rows=rows) for shot in range(shots)]
        for figure in (examples_figure([examples._replace(names=examples.names[:1])] * count), table_figure(of_shots)):
            width, height = figure.get_size_inches()
            assert width == 7 and height <= 9.6


def test_what_examples_lack(folder, tmp_path, monkeypatch):
    results = read_results(folder)
    monkeypatch.setattr("experiments.examples.MOST", 3)
    for call, words in (
        (lambda: read_examples(results, 2), "ring has 2 rounds, counted from 0"),
        (lambda: read_examples(results, 0, ["good/999.png"]), r"no test image good/999\.png in ring"),
        (lambda: read_examples(results._replace(shots=[1, 2])), "one number of shots, not of K = 1, 2"),
        (lambda: read_examples(results, data_path=tmp_path), "no category folder"),
        (lambda: read_examples(results), "4 test images do not fit a page, at most 3 do"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "ring_1_untrained_two_maps").mkdir()  # preferred to the given ones, but empty
    with pytest.raises(UserError, match=r"no saved maps .*round_0\.npz of untrained, two; score again with"):
        read_examples(read_results(tmp_path / "out"))
