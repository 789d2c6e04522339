"""Large images: tiles cover an image and leave no seam, detectors find small defects, regions limit what is scored."""

from __future__ import annotations

import argparse
import functools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import predict
from benchmarks import tiles as benchmark
from inspection import tiles
from inspection.detector import FewShotDetector
from inspection.export import ExportedDetector
from inspection.region import RegionWarning, inside_map, pixels, read_region
from inspection.tiles import OVERLAP, Layout, Tiling, fitting_corners, joined_map, resolve_tiling, shrink_warning
from models.regad import untrained
from tests.reference import needs_reference
from utils.choices import tile_side
from utils.errors import UserError

SIZE = 64


def surface(seed: int, width: int = 160, height: int = 112) -> Image.Image:
    """A grey image of a fine random texture."""
    values = np.random.default_rng(seed).normal(128, 12, (height, width))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def with_spot(image: Image.Image, x: int, y: int, side: int = 10) -> Image.Image:
    """The image with a bright square of side `side` at (x, y)."""
    values = np.array(image)
    values[y : y + side, x : x + side] = 250
    return Image.fromarray(values)


neighbours_detector = functools.partial(FewShotDetector, device="cpu", scorer="neighbours")  # the one for tiles


@pytest.fixture(scope="module", autouse=True)
def _few_tiles():
    """Detectors are fitted to 60 tiles, which takes less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "FIT_TILES", 60)
        yield


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return untrained("none", img_size=SIZE).stn.eval()


@pytest.fixture(scope="module")
def detector(network):
    """Fitted to large images, which are cut into tiles of 48 pixels."""
    detector = neighbours_detector(network, tile=48).fit([surface(seed) for seed in range(3)])
    detector.calibrate(0.05)
    return detector


@given(st.integers(20, 900), st.integers(20, 900), st.integers(16, 300), st.sampled_from([16, 64, 224]))
def test_tiles_cover_the_image_and_overlap(width, height, side, size):
    layout = Tiling(side, side, side, False).layout(width, height, size)
    if max(width, height) <= side:
        assert layout is None
        return
    for starts, length in ((layout.columns, layout.across), (layout.rows, layout.down)):
        covered = np.zeros(length, int)
        for start in starts:
            covered[max(start, 0) : start + size] += 1
        assert covered.min() > 0 and starts == sorted(set(starts))
        if length >= size:
            assert starts[0] == 0 and starts[-1] == length - size
            assert np.diff(starts).max(initial=0) <= size * (1 - OVERLAP) + 1  # + 1: rounding
        else:
            assert len(starts) == 1 and starts[0] <= 0 and starts[0] + size >= length


@given(st.integers(65, 300), st.integers(65, 300), st.integers(1, 5))
def test_a_joined_map_of_grey_values_is_the_resized_image(width, height, group):
    """Cutting, resizing, weighting and joining return the image itself where the map of a tile is the tile."""
    across, down = np.linspace(0, 255, width), np.linspace(1, 0.5, height)
    image = Image.fromarray(np.outer(down, across).astype(np.uint8))
    layout = Tiling(64, 64, 64, False).layout(width, height, 32)
    found = joined_map(image, layout, lambda tiles: tiles[:, 0].numpy(), group)
    expected = image.resize((layout.across, layout.down), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(found, np.asarray(expected, float), atol=4)


def test_a_tile_that_protrudes_is_filled_by_reflection():
    image = surface(0, 200, 30)
    layout = Tiling(60, 60, 60, False).layout(200, 30, SIZE)
    assert layout.down == SIZE // 2 and layout.rows == [-SIZE // 4]
    tile = layout.cut(image, *layout.corners[0])
    assert tile.shape == (3, SIZE, SIZE) and (tile[:, SIZE // 4 - 1] == tile[:, SIZE // 4]).all()


def test_auto_follows_the_support():
    assert resolve_tiling("off", [(4000, 3000)], SIZE, False) is None
    assert resolve_tiling(100, [(4000, 3000)], SIZE, False) == Tiling(100, 100, 100, False)
    large = resolve_tiling("auto", [(4000, 3000)] * 2, SIZE, False)
    assert large == Tiling(SIZE, SIZE, 4 * SIZE, False)
    sizes = [(100, 60), (120, 70), (140, 80)]
    assert resolve_tiling("auto", sizes, SIZE, False) == Tiling(120, 70, 4 * SIZE, True)
    assert resolve_tiling("auto", sizes, SIZE, True) == Tiling(120, 120, 4 * SIZE, True)
    assert large.layout(4 * SIZE, SIZE, SIZE) is None and large.layout(4 * SIZE + 1, SIZE, SIZE)
    assert shrink_warning(4 * SIZE, 1, SIZE) is None and "shrink 5.0 times" in shrink_warning(1, 5 * SIZE, SIZE)


@pytest.mark.parametrize("text", ["-5", "0", "15", "all", "1.5"])
def test_sides_of_tiles(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither auto nor off nor a number from 16"):
        tile_side(text)
    assert tile_side("off") == "off" and tile_side("300") == 300


def test_number_of_fitted_tiles_is_bounded():
    layouts = [Layout(4000, 3000, 4000, 3000, 224), None, Layout(300, 300, 300, 300, 224)]
    chosen = fitting_corners(layouts)
    assert len(chosen[0]) == min(len(layouts[0].corners), tiles.FIT_TILES // 3) and chosen[1] == []
    assert all(set(chosen[number]) <= set(layouts[number].corners) for number in (0, 2))
    assert chosen == fitting_corners(layouts) and fitting_corners(layouts[2:]) == [layouts[2].corners]


def test_a_small_defect_in_a_large_image(detector):
    clean = [surface(seed) for seed in range(10, 14)]
    places = [(5, 5), (95, 70), (145, 95), (47, 30)]
    spotted = [with_spot(image, *place) for image, place in zip(clean, places, strict=True)]
    scores, maps = detector.score([*clean, *spotted])
    assert scores[4:].min() > scores[:4].max()
    for place, scored in zip(places, maps[4:], strict=True):
        restored = detector.restore(scored, 160, 112)
        assert restored.shape == (112, 160) and scored.shape != restored.shape
        y, x = np.unravel_index(restored.argmax(), restored.shape)
        assert abs(x - place[0] - 5) <= 15 and abs(y - place[1] - 5) <= 15
    assert all(score == scored.max() for score, scored in zip(scores, maps, strict=True))
    assert scores[0] < detector.threshold.value < scores[4]


def test_large_and_small_images_in_one_call(detector, network):
    small = surface(20, 40, 48)
    assert detector.layout_of(*small.size) is None
    mixed, maps = detector.score([surface(10), small, surface(11), small])
    assert isinstance(maps, list) and maps[1].shape == (SIZE, SIZE)
    alone = [detector.score([image])[0][0] for image in (surface(10), small, surface(11), small)]
    np.testing.assert_allclose(mixed, alone, rtol=1e-5)


def test_images_that_are_not_cut_are_scored_as_without_tiles(network):
    images = [surface(seed, 90, 70) for seed in range(4)]
    pairs = []
    for tile in ("auto", "off"):
        detector = neighbours_detector(network, tile=tile).fit(images[:3])
        detector.calibrate(0.05)
        pairs.append((*detector.score(images), *detector.loo_scores, detector.threshold))
    assert all(np.array_equal(one, other) for one, other in zip(*pairs, strict=True))


def test_a_whole_image_is_left_out_with_all_its_tiles(detector, network, monkeypatch):
    monkeypatch.setattr(tiles, "FIT_TILES", 2048)
    images = [surface(seed, 110, 90) for seed in range(2)]  # so few tiles that the detector is fitted to all
    loo_scores = neighbours_detector(network, tile=48).fit(images).loo_scores
    for number, other in ((0, 1), (1, 0)):
        score, maps = neighbours_detector(network, tile=48).fit([images[other]]).score([images[number]])
        np.testing.assert_allclose(loo_scores.scores[number], score, rtol=1e-4)
        np.testing.assert_allclose(loo_scores.maps[number], pixels(maps[0], None, SIZE), rtol=1e-3)
    assert loo_scores.scores.shape == (2, 1) and detector.loo_scores.scores.shape == (3, 1)


def test_small_support_and_large_images(network):
    """The tiles have the size of the support images: an image that is one of them repeated has its scores."""
    part = surface(0, 60, 45)
    tiled = Image.fromarray(np.tile(np.array(part), (7, 5)))
    detector = neighbours_detector(network, tile="auto").fit([part, surface(1, 60, 45)])
    assert detector.tiling == Tiling(60, 45, 4 * SIZE, True) and not detector.cuts_support
    layout = detector.layout_of(*tiled.size)
    assert layout.across == 5 * SIZE and layout.down == 7 * SIZE
    scores, maps = detector.score([tiled])
    assert maps[0].shape == (7 * SIZE, 5 * SIZE)
    spotted, maps = detector.score([with_spot(tiled, 130, 222)])
    y, x = np.unravel_index(maps[0].argmax(), maps[0].shape)
    assert spotted > scores and abs(x * 60 / SIZE - 135) < 20 and abs(y * 45 / SIZE - 227) < 20


def test_saved_tiles_and_region(detector, network, tmp_path):
    inside = np.zeros((14, 20), bool)
    inside[3:9, 4:12] = True
    fitted = neighbours_detector(network, tile=48, region=inside).fit([surface(seed) for seed in range(2)])
    fitted.save(tmp_path / "part.regad")
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert loaded.tile == 48 and loaded.tiling == fitted.tiling and (loaded.region == inside).all()
    one, other = (each.score([surface(5)]) for each in (fitted, loaded))
    assert one[0] == other[0] and (one[1][0] == other[1][0]).all()
    content = torch.load(tmp_path / "part.regad", weights_only=True)
    torch.save({k: v for k, v in content.items() if k not in ("tile", "tiling", "region")}, tmp_path / "old.regad")
    old = FewShotDetector.load(tmp_path / "old.regad", "cpu")
    assert old.tile == "off" and old.layout_of(4000, 3000) is None and old.region is None
    with pytest.raises(UserError, match="scores single tiles: fit the detector without a region"):
        ExportedDetector(fitted)


@pytest.mark.parametrize("tile", ["off", 48])
def test_only_the_region_is_scored(network, tile):
    left, right = with_spot(surface(8), 30, 50), with_spot(surface(8), 120, 50)
    images = [surface(seed) for seed in range(3)]
    region = read_region("0,0,0.5,1", None, [(160, 112)])
    whole = neighbours_detector(network, tile=tile).fit(images)
    half = neighbours_detector(network, tile=tile, region=region).fit(images)
    for image in (left, right, surface(8)):
        (scores, maps), (everywhere, all_maps) = half.score([image]), whole.score([image])
        inside = inside_map(region, *maps[0].shape[::-1])
        assert abs(inside.mean() - 0.5) < 0.01
        np.testing.assert_array_equal(maps[0], np.where(inside, all_maps[0], 0))
        assert scores[0] == maps[0].max() <= everywhere[0]
    assert half.score([right])[0] < half.score([left])[0]
    assert (half.loo_scores.scores[:, 0] <= whole.loo_scores.scores[:, 0]).all() and half.loo_scores.maps.min() > 0
    assert half.calibrate(0.05, [surface(seed) for seed in (4, 5)]).region > 0
    if tile == "off":
        others = neighbours_detector(network, tile=tile, region=region).fit(images[1:], for_threshold=False)
        np.testing.assert_allclose(half.loo_scores.scores[0, 0], others.score(images[:1])[0][0], rtol=1e-4)
        squares = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in (left, right)])
        with torch.inference_mode():
            maps, scores = ExportedDetector(half).eval()(torch.from_numpy(squares))
        assert (maps[:, :, SIZE // 2 :] == 0).all() and (scores == maps.flatten(1).amax(1)).all()


def test_rectangles_and_masks(tmp_path):
    sizes = [(160, 112)] * 2
    rectangle = read_region("16,14,80,56", None, sizes)
    assert rectangle[14:70, 16:96].all() and rectangle.sum() == 80 * 56
    assert (read_region("0.1, 0.125, 0.5, 0.5", None, sizes) == rectangle).all()
    mask = tmp_path / "mask.png"
    Image.fromarray(np.uint8(255) * rectangle).resize((80, 56)).save(mask)
    assert (read_region(str(mask), None, sizes) != rectangle).mean() < 0.02
    assert (read_region(None, mask, sizes) == ~read_region(str(mask), None, sizes)).all()
    both = read_region("0,0,60,112", mask, sizes)
    assert both[:, :14].all() and not both[:, 60:].any() and not both[30:60, 20:].any()
    (tmp_path / "broken.png").write_text("no image")
    for region, ignore, sentence in (
        (str(mask), mask, "excludes all 160x112 pixels"),
        ("500,500,10,10", None, "the region excludes all"),
        ("0,0,0,10", None, "not a rectangle"),
        ("-1,0,5,5", None, "not a rectangle"),
        ("nowhere.png", None, r"no mask file nowhere\.png"),
        (None, tmp_path / "broken.png", "cannot read the image"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_region(region, ignore, sizes)
    Image.fromarray(np.full((50, 50), 255, np.uint8)).save(tmp_path / "square.png")
    with pytest.warns(RegionWarning, match="50x50 pixels is stretched to images of 160x112"):
        assert read_region(str(tmp_path / "square.png"), None, sizes).all()
    with pytest.raises(UserError, match="differ in size: give fractions"):
        read_region("0,0,50,50", None, [*sizes, (90, 90)])


def test_predict_says_how_images_are_cut(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, image in {"0": surface(0, 300, 200), "1": surface(1, 300, 200), "in/clean": surface(3, 300, 200)}.items():
        image.save(tmp_path / f"{name}.png")
    with_spot(surface(2, 300, 200), 240, 140, 16).save(tmp_path / "in/spot.png")
    flags = ["--weights", "none", "--img_size", str(SIZE), "--device", "cpu", "--maps", "npy"]
    flags += ["--backbone", "resnet18", "--scorer", "neighbours", "--input", str(tmp_path / "in")]
    flags += ["--support", str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--output"]
    predict.main([*flags, str(tmp_path / "out"), "--tile", "auto", "--save", str(tmp_path / "part.regad")])
    printed = capsys.readouterr()
    assert "above 256 pixels are cut into tiles of 64 x 64" in printed.out
    assert printed.err.count("tiles: 300 x 200 pixels in 6 x 4 = 24 tiles") == 1
    spot, clean = (np.load(tmp_path / "out" / "maps" / f"{name}.png.npy") for name in ("spot", "clean"))
    y, x = np.unravel_index(spot.argmax(), spot.shape)
    assert spot.shape == (200, 300) and spot.max() > clean.max() and abs(x - 248) < 30 and abs(y - 148) < 30
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert "tiles of 64 x 64" in record["tiles"] and record["has_region"] is False
    predict.main([*flags, str(tmp_path / "off")])
    assert "warning: images of 300 x 200 pixels shrink 4.7 times to 64 x 64" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--tile: a saved detector keeps what it was fitted with"):
        saved = ["--detector", str(tmp_path / "part.regad"), "--input", str(tmp_path / "in"), "--tile", "64"]
        predict.main([*saved, "--output", str(tmp_path / "out2")])


@needs_reference
def test_blowholes_in_small_mosaics():
    """A small version of the benchmark: 800 x 375 pixels, 2 parts each."""
    flags = ["--grid", "2", "1", "--count", "2", "--shot", "2", "--tile", "224", "--device", "cpu"]
    content = benchmark.measure(benchmark.get_args_parser().parse_args(flags))
    clean, defective = content["images"][:2], content["images"][2:]
    assert all(row["at_defect"] for row in defective)
    assert min(row["score"] for row in defective) > max(row["score"] for row in clean)
    assert "AUROC 1.000" in benchmark.report(content) and "2 of 2" in benchmark.report(content)
