"""The quality gate: what it measures, its limits, and what it stops on real parts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import t

from benchmarks.changes import CHANGES
from benchmarks.reference import DATA, draw_support_images
from datasets.images import decode_image, to_square
from inspection import report
from inspection.images import as_tensor
from inspection.quality import MEASURES, SPREAD, STEP, QualityGate, _quantiles, measure, readable
from reports.page import CHART_HEIGHT, CHART_WIDTH

SIZE = 128
NAMES = list(MEASURES)


def square(change: str = "unchanged", seed: int = 0) -> torch.Tensor:
    """A bright disc with a texture on a dark ground, from an image of 160 pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:160, :160]
    disc = np.hypot(x - 80, y - 80) < 40
    values = np.where(disc, 180 + 20 * np.sin(x / 3), 40)[..., None] * (1.0, 0.95, 0.9)
    image = Image.fromarray((values + rng.normal(0, 2, values.shape)).clip(0, 255).astype(np.uint8))
    return as_tensor(to_square(CHANGES[change](image), SIZE))


@pytest.fixture(scope="module")
def gate() -> QualityGate:
    return QualityGate.of([square(seed=seed) for seed in range(1, 9)])


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-4, 0.01, 1.0]))
def test_quantiles_are_those_of_sorted_values(seed, spread):
    values = np.random.default_rng(seed).normal(0, spread, (40, 41)).astype(np.float32)
    exact = np.quantile(values.clip(min=0), (0.25, 0.5, 0.99), method="inverted_cdf")
    assert np.abs(_quantiles(values, 0.25, 0.5, 0.99) - exact).max() <= STEP


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unchanged", ""),
        ("25 % of the light", "darker"),
        ("60 %", "darker"),
        ("130 %", "brighter"),
        ("blur, sigma 2", "less sharp"),
        ("noise", "noisier"),
        ("5 % shift", "further right"),
        ("20 % larger", "larger"),
        ("20 % smaller", "smaller"),
    ],
)
def test_what_is_changed_is_said(gate, change, words):
    reason = gate.reason(measure(square(change)))
    assert words in reason and bool(words) == reason.endswith(" than the support images")


def test_the_measures_of_an_even_image():
    """Nothing divides by 0, and black differs from white in the light alone."""
    white, black = (readable(measure(torch.full((3, 32, 32), value))) for value in (1.0, 0.0))
    assert white["light"] == pytest.approx(1 + 1 / 255) and black["light"] == pytest.approx(1 / 255)
    assert white["red"] == white["blue"] == black["red"] == 1 and white["x"] == pytest.approx(0.5)
    assert all(np.isfinite(list(one.values())).all() for one in (white, black))


def test_limits_by_the_definition_for_one_image():
    """Of one image nothing is known but what is typical: four images' worth."""
    gate = QualityGate(np.zeros((1, len(NAMES))))
    rates = np.array([[0.005, *[0.001] * 9], [0.001] * 10])  # darker images are stopped more easily
    assert gate.margins == pytest.approx(t.ppf(1 - rates, 4) * SPREAD * np.sqrt(2))
    x = t.ppf(0.999, 4) * SPREAD[7] * np.sqrt(2)
    assert gate.limits()["x"] == pytest.approx({"low": -x, "typical": 0, "high": x})


@given(st.integers(1, 12), st.floats(0.1, 5), st.integers(0, 99))
def test_the_order_of_images_does_not_matter_and_more_of_the_same_narrow_the_limits(count, factor, seed):
    values = factor * SPREAD * np.random.default_rng(seed).normal(size=(count, len(NAMES)))
    gate, turned = QualityGate(values), QualityGate(values[::-1])
    assert gate.margins == pytest.approx(turned.margins) and gate.mean == pytest.approx(turned.mean)
    assert (QualityGate(values, values).margins <= gate.margins * (1 + 1e-9)).all()
    again = QualityGate.from_state(QualityGate(values, values).state())
    assert (again.margins == QualityGate(values, values).margins).all()


def test_a_part_that_varies_has_wider_limits_for_all_measures():
    even, uneven = (np.random.default_rng(0).normal(0, SPREAD, (2, len(NAMES))) for _ in range(2))
    uneven = np.concatenate([uneven[:, :3], 20 * uneven[:, 3:]], axis=1)
    assert (QualityGate(uneven).margins[:, :3] > QualityGate(even).margins[:, :3]).all()


def inputs(paths, change: str = "unchanged") -> list[torch.Tensor]:
    return [as_tensor(to_square(CHANGES[change](decode_image(path)), 256)) for path in paths]


def test_a_drift_is_said_before_the_limit_is_reached(gate):
    """Light that falls by two thirds of the way to the limit, image by image."""
    light = gate.mean[0] - np.linspace(0, 0.9, 100) * gate.margins[0, 0]
    rows = [readable(np.array([value, *gate.mean[1:]])) for value in light]
    assert gate.drift(rows[:19]) == gate.drift(rows[:50]) == gate.drift([{}] * 99) == []
    (sentence,) = gate.drift(rows)
    assert sentence.startswith("the newest 50 images are darker than the support images: light ")


def test_charts_of_quality_show_medians_in_the_order_of_time(gate, monkeypatch):
    """Two days of 30 images in at most 15 values a day; the light falls to the lower limit."""
    monkeypatch.setattr(report, "CHART_VALUES", 30)
    light = gate.mean[0] - np.linspace(0, 1, 60) * gate.margins[0, 0]
    rows = [
        SimpleNamespace(time=f"2026-01-0{1 + number // 30}T02:00", quality=readable(np.array([value, *gate.mean[1:]])))
        for number, value in enumerate(light)
    ]
    assert report.quality_charts(gate, rows[:19]) == []
    charts = report.quality_charts(gate, rows)
    assert [chart.title.split()[0] for chart in charts] == NAMES
    falling = charts[0]
    assert falling.days == [15] and falling.values == [
        pytest.approx((rows[n].quality["light"] + rows[n + 1].quality["light"]) / 2) for n in range(0, 60, 2)
    ]
    assert falling.y(falling.high) == CHART_HEIGHT / 4 and falling.y(falling.low) == 3 * CHART_HEIGHT / 4
    points = [[float(number) for number in point.split(",")] for point in falling.points.split()]
    assert points[0][0] == 0 and points[-1][0] == CHART_WIDTH
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert points[-1][1] == pytest.approx(3 * CHART_HEIGHT / 4, abs=1)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    ("category", "kind", "change", "least"),
    [
        ("magnetic_tile", "defective", "25 % of the light", 0.5),
        ("magnetic_tile", "defective", "blur, sigma 2", 0.6),
        ("bottle", "defective", "60 %", 1.0),
        ("bottle", "good", "blur, sigma 2", 1.0),
        ("bottle", "good", "JPEG 20", 0.6),
        ("transistor", "defective", "40 %", 1.0),
        ("bottle", "good", "unchanged", 0.0),
        ("transistor", "good", "unchanged", 0.0),
    ],
)
def test_real_parts(category, kind, change, least):
    """The share of images that are stopped, over three draws; of unchanged good ones at most one of twelve."""
    folder = DATA / category / "test"
    paths = [path for path in sorted(folder.glob("*/*")) if (path.parent.name == "good") == (kind == "good")]
    paths = paths[:: len(paths) // 12][:12]
    gates = [QualityGate.of(inputs(draw)) for draw in draw_support_images(DATA / category, 4, 3, seed=0)]
    measured = [measure(one) for one in inputs(paths, change)]
    stopped = np.mean([bool(gate.reason(values)) for gate in gates for values in measured])
    assert stopped >= least and (kind == "defective" or change != "unchanged" or stopped <= 1 / 12)
