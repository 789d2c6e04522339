"""The metrics of a round by kind of defect, against scikit-learn and a loop over regions on subsets of the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from benchmarks import plain
from evaluation import metrics
from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import AUROCS, IMAGE_METRICS, NO_DEFECTIVE, NO_MASK, NO_NORMAL, RoundMetrics, Truth

KINDS = ("good", "cut", "rust")
SIDE = 4


@st.composite
def rounds(draw):
    """A small test set with its maps: any mixture of kinds in any order, masks that are missing, padding, ties."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    labels = np.array([kind != "good" for kind in kinds])
    shape = (len(kinds), SIDE, SIDE)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = rng.integers(0, draw(st.sampled_from([3, 1000])), shape).astype(np.float32)
    counted = np.ones(shape, bool)
    if draw(st.booleans()):
        counted[:, :, 0] = False  # padding
    has_mask = rng.random(len(kinds)) < draw(st.sampled_from([0, 0.5, 1]))
    counted[labels & ~has_mask] = False
    masks = counted & labels[:, None, None] & (rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 1])))
    return kinds, labels, maps, masks, counted


def expected(labels, maps, masks, counted):
    """Image AUROC, pixel AUROC and PRO of some images by the plain definitions; None without both classes."""
    image = pixel = overlap = None
    if labels.any() and not labels.all():
        image = roc_auc_score(labels, maps.max(axis=(1, 2)))
    truth = masks[counted]
    if truth.any() and not truth.all():
        pixel = roc_auc_score(truth, maps[counted])
        kept = np.where(counted, maps, -np.inf)  # pixels that do not count raise no false alarm
        overlap = pro_of_counted(kept, masks, counted)
    return {"image_auroc": image, "pixel_auroc": pixel, "pro": overlap}


def pro_of_counted(maps, masks, counted):
    """PRO by a loop over thresholds and regions, of the counted pixels."""
    regions, count = metrics.label(masks, metrics.EIGHT_CONNECTED)
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps[counted])[::-1]:
        called = maps >= threshold
        rates.append(called[counted & ~masks].mean())
        overlaps.append(np.mean([called[regions == region].mean() for region in range(1, count + 1)]))
    limit = metrics.PRO_FPR_LIMIT
    inside = [*[rate for rate in rates if rate <= limit], limit]
    heights = np.interp(inside, rates, overlaps)
    heights[: len(inside) - 1] = overlaps[: len(inside) - 1]
    return np.trapezoid(heights, inside) / limit


@given(rounds(), st.booleans())
def test_equal_to_the_definitions_on_subsets(case, all_metrics):
    kinds, labels, maps, masks, counted = case
    truth = Truth(labels, masks if masks.any() else None, None if counted.all() else counted, kinds)
    names = tuple(METRIC_NAMES) if all_metrics else AUROCS
    round_metrics = RoundMetrics(truth, torch.device("cpu"), names)
    everything, by_kind = round_metrics.of_round(maps.max(axis=(1, 2)), torch.from_numpy(maps))
    reasons, kind_reasons = truth.reasons()
    check(everything, expected(labels, maps, masks, counted), reasons)
    assert list(by_kind) == list(kind_reasons) == list(dict.fromkeys(kind for kind in kinds if kind != "good"))
    for kind, numbers in by_kind.items():
        chosen = np.array([other in ("good", kind) for other in kinds])
        check(numbers, expected(labels[chosen], maps[chosen], masks[chosen], counted[chosen]), kind_reasons[kind])
    assert tuple(everything) == names


@given(rounds())
def test_image_metrics_without_maps(case):
    kinds, labels, maps, masks, counted = case
    truth, scores = Truth(labels, masks if masks.any() else None, counted, kinds), maps.max(axis=(1, 2))
    with_maps, by_kind = RoundMetrics(truth, torch.device("cpu")).of_round(scores, torch.from_numpy(maps))
    alone, by_kind_alone = RoundMetrics(truth, torch.device("cpu"), IMAGE_METRICS).of_round(scores, None)
    assert alone == {name: with_maps[name] for name in IMAGE_METRICS}
    assert by_kind_alone == {kind: {"image_auroc": one["image_auroc"]} for kind, one in by_kind.items()}


def check(numbers, plain_numbers, reasons):
    for name, number in numbers.items():
        assert (number is None) == (name in reasons), name
        if name in plain_numbers:
            assert number == (None if plain_numbers[name] is None else pytest.approx(plain_numbers[name], abs=1e-9)), (
                name
            )


@given(rounds())
def test_all_images_as_without_kinds(case):
    """Bit for bit: counting by kind changes no number."""
    kinds, labels, maps, masks, counted = case
    order = np.argsort([kind != "good" for kind in kinds], kind="stable")
    order = np.array(sorted(order, key=lambda index: (labels[index], kinds.index(kinds[index]))))
    parts = (labels[order], masks[order] if masks.any() else None, counted[order])
    results = []
    for of_kind in (None, [kinds[index] for index in order]):
        round_metrics = RoundMetrics(Truth(*parts, of_kind), torch.device("cpu"))
        scores = torch.from_numpy(maps[order])
        results.append(round_metrics.of_round(maps[order].max(axis=(1, 2)), scores)[0])
    assert results[0] == results[1]


def test_several_chunks(monkeypatch):
    """Sorting in chunks inside the parts."""
    rng = np.random.default_rng(0)
    kinds = ["good"] * 3 + ["cut"] * 2 + ["rust"] * 2
    labels = np.array([kind != "good" for kind in kinds])
    maps = rng.gamma(3, size=(7, 32, 32)).astype(np.float32)
    masks = labels[:, None, None] & (rng.random(maps.shape) < 0.02)
    monkeypatch.setattr(metrics, "SORT_CHUNK", 500)
    by_kind = RoundMetrics(Truth(labels, masks, None, kinds), torch.device("cpu")).of_round(
        maps.max(axis=(1, 2)), torch.from_numpy(maps)
    )[1]
    for kind, numbers in by_kind.items():
        chosen = np.array([other in ("good", kind) for other in kinds])
        assert numbers["pixel_auroc"] == pytest.approx(roc_auc_score(masks[chosen].ravel(), maps[chosen].ravel()))
        assert numbers["pro"] == pytest.approx(plain.pro(maps[chosen], masks[chosen]), abs=1e-9)


@given(rounds())
def test_on_a_device_as_here(case):
    _, labels, maps, masks, _ = case
    parts = [maps[labels == which].ravel() for which in (False, True)]
    truths = [masks[labels == which].ravel() for which in (False, True)]
    if not masks.any():
        return
    here = metrics._count(parts, truths)
    there = metrics._count_on_device([torch.from_numpy(part) for part in parts], truths)
    assert np.array_equal(here[0], there[0]) and np.array_equal(here[1], there[1])
    for part, (one, other) in enumerate(zip(here[2], there[2], strict=True)):
        assert np.array_equal(one, other), part


@pytest.mark.parametrize(
    ("labels", "masked", "image", "pixel"),
    [
        ([False, False], False, NO_DEFECTIVE, NO_DEFECTIVE),
        ([True, True], False, NO_NORMAL, NO_MASK),
        ([True, True], True, NO_NORMAL, None),
        ([True, False], False, None, NO_MASK),
    ],
)
def test_reasons(labels, masked, image, pixel):
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, 0, 0] = masked
    reasons, _ = Truth(np.array(labels), masks if masked else None).reasons()
    assert (reasons.get("image_auroc"), reasons.get("pro")) == (image, pixel)
