"""The images and pages that test.py draws of a scored category."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from datasets.images import decode_image
from datasets.mvtec import LabelledDataset, list_test_items
from evaluation import gallery
from evaluation.gallery import SHEET_COLUMNS, TILE, Scored, choose_examples, save_gallery, with_own_threshold
from evaluation.round_metrics import NO_MASK, GroundTruth
from evaluation.statistics import metric_entries, summaries
from reports.drawing import CAPTION_HEIGHT, GAP
from reports.page import PageTable

SIZE = 64


@pytest.fixture
def scored(demo_data) -> Scored:
    """The ring's test images with random scores. Each map is constant except at its maximum."""
    dataset = LabelledDataset(list_test_items(demo_data / "ring"), SIZE)
    labels = np.array([item.label for item in dataset.items])
    maps = np.full((len(labels), SIZE, SIZE), 1.0, np.float32)
    maps[:, 20, 30] = np.random.default_rng(0).normal(10 + 2 * labels, 2)
    return with_own_threshold(dataset, maps)


def test_threshold_finds_most_defects_at_fewest_false_positives(scored):
    def youden(limit: float) -> float:
        called = scored.scores > limit
        return called[scored.labels].mean() - called[~scored.labels].mean()

    assert youden(scored.threshold) == pytest.approx(max(youden(score - 1e-3) for score in scored.scores))
    assert 0 < scored.wrong.sum() < len(scored.scores)


def test_worst_come_first(scored):
    order, wrong = scored.worst_first(), scored.wrong
    assert wrong[order[: wrong.sum()]].all() and not wrong[order[wrong.sum() :]].any()
    missed, positives = (order[(wrong & kind)[order]] for kind in (scored.labels, ~scored.labels))
    assert (np.diff(scored.scores[missed]) >= 0).all() and (np.diff(scored.scores[positives]) <= 0).all()


def test_threshold_is_a_number_where_scores_say_nothing(scored):
    flat = with_own_threshold(scored.dataset, np.ones_like(scored.maps))
    assert np.isfinite(flat.threshold)
    upside_down = np.where(scored.labels, 1.0, 2.0)[:, None, None] * np.ones_like(scored.maps)
    assert np.isfinite(with_own_threshold(scored.dataset, upside_down).threshold)


def test_examples_come_from_every_folder(scored):
    items = scored.dataset.items
    kinds = {item.defect for item in items}
    assert {items[index].defect for index in choose_examples(items, len(kinds))} == kinds
    assert choose_examples(items, -1) == list(range(len(items)))


@pytest.mark.parametrize("count", [3, -1])
def test_files(scored, tmp_path, monkeypatch, count):
    monkeypatch.setattr(gallery, "PAGE_IMAGES", 2)
    save_gallery(tmp_path, "ring", scored, count, workers=2)
    assert len(list(tmp_path.glob("*/*.jpg"))) == (3 if count == 3 else len(scored.scores))
    sheet = decode_image(tmp_path / "contact_sheet.jpg")
    assert sheet.width == SHEET_COLUMNS * (2 * TILE + 2 * GAP) - GAP
    page = (tmp_path / "report.html").read_text()
    rows = [json.loads(row) for row in re.findall(r'class="row">(.*?)</script>', page)]
    assert [row["score"] for row in rows] == scored.scores.tolist()
    assert [index for index, row in enumerate(rows) if row["thumbnail"]] == sorted(scored.worst_first()[:2])
    assert [row["defect_type"] == "good" for row in rows] == (~scored.labels).tolist()
    assert f"{(scored.wrong & scored.labels).sum()} missed" in page


def test_panels_show_truth_and_heat(scored, tmp_path):
    index = int(scored.scores.argmax())
    scored.maps[index, 18:23, 28:33] = scored.scores[index]  # more than the compression hides
    save_gallery(tmp_path, "ring", scored, -1, workers=2)
    panels = np.asarray(decode_image(tmp_path / f"{scored.name(index)}.jpg")).astype(int)[2 * CAPTION_HEIGHT :]
    image, truth, heat, over = (panels[:, at : at + SIZE] for at in range(0, panels.shape[1], SIZE + GAP))
    for seen in (heat.sum(axis=2), abs(over - image).sum(axis=2)):  # equally bright far above the threshold
        brightest = np.argwhere(seen > 0.8 * seen.max())
        assert brightest.mean(axis=0) == pytest.approx((20, 30), abs=2) and len(brightest) < SIZE**2 / 10
    changed = np.argwhere(abs(truth - image).sum(axis=2) > 120)
    marked = np.argwhere(scored.dataset[index]["mask"].numpy())
    np.testing.assert_allclose(changed.min(axis=0), marked.min(axis=0), atol=2)
    np.testing.assert_allclose(changed.max(axis=0), marked.max(axis=0), atol=2)


def test_page_shows_all_metrics_with_their_spread(scored, tmp_path):
    """Of all rounds, and of each defect type; what cannot be computed with its reason."""
    rounds = [{"image_auroc": auroc, "pixel_auroc": None} for auroc in (0.5, 0.7)]
    truth = GroundTruth(scored.labels, None, None, np.where(scored.labels, "rust", "good"))
    tables = gallery.metric_tables(metric_entries(truth, [(numbers, {"rust": numbers}) for numbers in rounds]))
    save_gallery(tmp_path, "ring", scored, 0, 1, tables)
    page = re.sub(r"<[^>]*>", "|", (tmp_path / "report.html").read_text())
    page = re.sub(r"[|\s]*\|[|\s]*", "|", page)
    assert "|image AUROC|0.6000 +- 0.1414|0.0000 to 1.0000|" in page and f"|pixel AUROC|n/a|{NO_MASK}|" in page
    assert (
        "|defect type|images|image AUROC|pixel AUROC|" in page
        and f"|rust|{scored.labels.sum()}|0.6000 +- 0.1414|n/a|" in page
    )


def test_one_round_has_no_spread():
    """Neither an empty column nor the word."""
    rounds, defects = [{"image_auroc": 0.5}], {"rust": {"images": 3, "image_auroc": None}}
    entries = {"rounds": rounds, **summaries(rounds), "not_available": {}, "defects": defects}
    table, types = gallery.metric_tables(entries)
    assert table == PageTable("Metrics", ("metric", "one round"), [("image AUROC", "0.5000")])
    assert types.title == "Each defect type against all normal images"


@pytest.mark.parametrize("label", [False, True])
def test_one_class_has_no_threshold(label, scored):
    """Images are called nothing; the most unusual normal one, or the least unusual defective one, comes first."""
    chosen = np.flatnonzero(scored.labels == label)
    items = [scored.dataset.items[index] for index in chosen]
    one = with_own_threshold(LabelledDataset(items, SIZE), scored.maps[chosen])
    assert one.threshold is None and not one.wrong.any() and one.limits[0] < one.limits[1]
    first = one.scores[one.worst_first()[0]]
    assert first == (one.scores.min() if label else one.scores.max())
