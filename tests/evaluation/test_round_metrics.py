"""The metrics of a round by defect type, against scikit-learn and a loop over regions on subsets of the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from evaluation import metrics
from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import AUROCS, IMAGE_METRICS, NO_DEFECTIVE, NO_MASK, NO_NORMAL, GroundTruth, RoundMetrics

DEFECT_TYPES = ("good", "cut", "rust")
SIDE = 4


@st.composite
def rounds(draw):
    """A small test set with its maps: defect types in any order, missing masks, padding, ties."""
    defect_types = draw(st.lists(st.sampled_from(DEFECT_TYPES), min_size=1, max_size=6))
    labels = np.array([defect_type != "good" for defect_type in defect_types])
    shape = (len(defect_types), SIDE, SIDE)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = rng.integers(0, draw(st.sampled_from([3, 1000])), shape).astype(np.float32)
    valid_mask = np.ones(shape, bool)
    if draw(st.booleans()):
        valid_mask[:, :, 0] = False  # padding
    has_mask = rng.random(len(defect_types)) < draw(st.sampled_from([0, 0.5, 1]))
    valid_mask[labels & ~has_mask] = False
    masks = valid_mask & labels[:, None, None] & (rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 1])))
    return defect_types, labels, maps, masks, valid_mask


def expected(labels, maps, masks, valid_mask):
    """Image AUROC, pixel AUROC and PRO of some images by the plain definitions; None without both classes."""
    image = pixel = overlap = None
    if labels.any() and not labels.all():
        image = roc_auc_score(labels, maps.max(axis=(1, 2)))
    truth = masks[valid_mask]
    if truth.any() and not truth.all():
        pixel = roc_auc_score(truth, maps[valid_mask])
        kept = np.where(valid_mask, maps, -np.inf)  # pixels that do not count are no false positives
        overlap = pro_of_valid(kept, masks, valid_mask)
    return {"image_auroc": image, "pixel_auroc": pixel, "pro": overlap}


def pro_of_valid(maps, masks, valid_mask):
    """PRO by a loop over thresholds and regions, of the valid pixels."""
    regions, count = metrics.label(masks, metrics.EIGHT_CONNECTED)
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps[valid_mask])[::-1]:
        flagged = maps >= threshold
        rates.append(flagged[valid_mask & ~masks].mean())
        overlaps.append(np.mean([flagged[regions == region].mean() for region in range(1, count + 1)]))
    limit = metrics.PRO_FPR_LIMIT
    inside = [*[rate for rate in rates if rate <= limit], limit]
    heights = np.interp(inside, rates, overlaps)
    heights[: len(inside) - 1] = overlaps[: len(inside) - 1]
    return np.trapezoid(heights, inside) / limit


@given(rounds(), st.booleans())
def test_equal_to_the_definitions_on_subsets(case, all_metrics):
    defect_types, labels, maps, masks, valid_mask = case
    truth = GroundTruth(labels, masks if masks.any() else None, None if valid_mask.all() else valid_mask, defect_types)
    names = tuple(METRIC_NAMES) if all_metrics else AUROCS
    round_metrics = RoundMetrics(truth, torch.device("cpu"), names)
    everything, by_type = round_metrics.of_round(maps.max(axis=(1, 2)), torch.from_numpy(maps))
    reasons, type_reasons = truth.reasons()
    check(everything, expected(labels, maps, masks, valid_mask), reasons)
    assert list(by_type) == list(type_reasons) == list(dict.fromkeys(one for one in defect_types if one != "good"))
    for name, numbers in by_type.items():
        chosen = np.array([other in ("good", name) for other in defect_types])
        check(numbers, expected(labels[chosen], maps[chosen], masks[chosen], valid_mask[chosen]), type_reasons[name])
    assert tuple(everything) == names


@given(rounds())
def test_image_metrics_without_maps(case):
    defect_types, labels, maps, masks, valid_mask = case
    truth, scores = GroundTruth(labels, masks if masks.any() else None, valid_mask, defect_types), maps.max(axis=(1, 2))
    with_maps, by_type = RoundMetrics(truth, torch.device("cpu")).of_round(scores, torch.from_numpy(maps))
    alone, by_type_alone = RoundMetrics(truth, torch.device("cpu"), IMAGE_METRICS).of_round(scores, None)
    assert alone == {name: with_maps[name] for name in IMAGE_METRICS}
    assert by_type_alone == {defect_type: {"image_auroc": one["image_auroc"]} for defect_type, one in by_type.items()}


def check(numbers, plain_numbers, reasons):
    for name, number in numbers.items():
        assert (number is None) == (name in reasons), name
        if name in plain_numbers:
            assert number == (None if plain_numbers[name] is None else pytest.approx(plain_numbers[name], abs=1e-9)), (
                name
            )


@given(rounds())
def test_all_images_as_without_defect_types(case):
    defect_types, labels, maps, masks, valid_mask = case
    scores, parts = maps.max(axis=(1, 2)), (labels, masks if masks.any() else None, valid_mask)
    numbers, expected = (
        RoundMetrics(GroundTruth(*parts, types), torch.device("cpu")).of_round(scores, torch.from_numpy(maps))[0]
        for types in (defect_types, None)
    )
    assert numbers == pytest.approx(expected, abs=1e-12)


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
    reasons, _ = GroundTruth(np.array(labels), masks if masked else None).reasons()
    assert (reasons.get("image_auroc"), reasons.get("pro")) == (image, pixel)
