"""16-bit grey files of cameras with fewer bits: the same numbers as from 8-bit files, in every command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

import make_support
import predict
import train
from datasets.images import (
    ClippedWarning,
    clipping_note,
    eight_bit,
    full_scale,
    largest_values,
    resolve_bits,
    smallest_depth,
)
from datasets.manifest import load_manifest
from inspection.detector import FewShotDetector
from inspection.export import export_metadata
from models.regad import untrained
from tests.commands.test_commands import test_command
from tests.flags import small_run, words
from utils.choices import BIT_DEPTHS
from utils.devices import seed_everything
from utils.errors import UserError

SIZE = 64
SUPPORT = {"obj": "ring", "data_type": "folder", "img_size": SIZE}


def stored(values: np.ndarray, bits: int) -> Image.Image:
    """Grey values 0..255 as a camera of `bits` bits gives them: a 16-bit image whose range is 0..2**bits - 1."""
    return Image.fromarray(np.rint(values * (full_scale(bits) / 255)).astype(np.uint16))


def grey_file(source: Path, target: Path, bits: int | None) -> Path:
    """A grey copy of the image `source`: as 16-bit PNG with `bits` bits, or with None as 8-bit PNG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        grey = image.convert("L")
    (stored(np.asarray(grey), bits) if bits else grey).save(target)
    return target


def grey_copy(data: Path, target: Path, bits: int | None) -> Path:
    """A copy of a data folder with grey images of `bits` bits; masks are copied as they are."""
    for file in data.rglob("*.png"):
        place = target / file.relative_to(data)
        if "ground_truth" in file.parts:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        else:
            grey_file(file, place, bits)
    return target


@given(st.sampled_from(BIT_DEPTHS), st.lists(st.integers(0, 255), min_size=1, max_size=9))
def test_every_depth_gives_back_the_8_bit_values(bits, values):
    """For each depth all 256 levels survive, whatever the brightest pixel of an image is."""
    found = eight_bit(stored(np.array([values]), bits), bits)
    assert found.mode == "L" and np.asarray(found)[0].tolist() == values
    assert clipping_note(found, "x.png", bits) is None


@given(st.sampled_from(BIT_DEPTHS), st.lists(st.integers(0, 65535), min_size=1, max_size=9))
def test_values_beyond_the_depth_become_white_and_are_named(bits, values):
    found = eight_bit(Image.fromarray(np.array([values], np.uint16)), bits)
    expected = [min(255, round(value * 255 / full_scale(bits))) for value in values]
    assert np.asarray(found)[0].tolist() == expected
    note = clipping_note(found, "x.png", bits)
    assert (note is None) == (max(values) <= full_scale(bits))
    if note:
        assert note.startswith(f"x.png has values up to {max(values)}, above the {full_scale(bits)} of {bits} bits")


@given(st.lists(st.integers(0, 65535), max_size=5))
def test_the_smallest_depth_that_holds_all_images(values):
    images = [Image.fromarray(np.array([[0, value]], np.uint16)) for value in values]
    bits = smallest_depth(value for _, value in largest_values(images))
    assert bits == 16 if not values else max(values) <= full_scale(bits)
    smaller = [depth for depth in BIT_DEPTHS if depth < bits]
    assert not values or not smaller or max(values) > full_scale(smaller[-1])


def test_only_16_bit_files_are_decoded_to_find_the_depth(tmp_path, monkeypatch, capsys):
    values = np.arange(256).reshape(16, 16)
    for name, image in {
        "a.png": Image.fromarray(values.astype(np.uint8)),
        "b.jpg": Image.fromarray(values.astype(np.uint8)).convert("RGB"),
        "c.png": stored(values, 12),
        "d.tif": stored(values, 10),
        "e.tif": stored(values, 8),
    }.items():
        image.save(tmp_path / name)
    (tmp_path / "f.png").write_bytes(b"broken")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "g.tif")  # no reader accepts it
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.filename) or load(self))
    paths = sorted(tmp_path.iterdir())
    found = largest_values(paths)
    assert found == [(str(tmp_path / "c.png"), 4095), (str(tmp_path / "d.tif"), 1023), (str(tmp_path / "e.tif"), 255)]
    assert {Path(name).name for name in decoded if name} == {"c.png", "d.tif", "e.tif", "g.tif"}
    assert resolve_bits("auto", paths, "the test") == 12
    assert capsys.readouterr().out == "bits: 12 (3 16-bit image(s) of the test, largest value 4095)\n"
    assert resolve_bits("auto", paths[:2], "the test") == 16 and resolve_bits(16, paths, "the test") == 16
    assert capsys.readouterr().out == ""
    assert resolve_bits(10, paths, "the test") == 10
    warning = capsys.readouterr().out.splitlines()[1]
    assert warning.startswith(f"warning: {tmp_path / 'c.png'} has values up to 4095, above the 1023 of 10 bits")


def test_commands_give_the_numbers_of_8_bit_files(demo_data, tmp_path, capsys):
    """Training, support set and scoring; the depth is in the records."""
    bits, records, losses = 10, {}, {}
    for depth in (None, bits):
        data, out = grey_copy(demo_data, tmp_path / f"data {depth}", depth), tmp_path / f"out {depth}"
        make_support.main(words(data_path=data, shots=2, rounds=2, support_path=out / "support", **SUPPORT))
        common = {"support_path": out / "support", "inferences": 2, "save_dir": out}
        train.main(small_run(data, epochs=1, batch_size=4, select="last", cache_dir=out / "cache", **common))
        test_command.main(small_run(data, output=out, **common))
        printed = capsys.readouterr().out
        assert (f"bits: {bits} (5 16-bit image(s) of ring/train" in printed) == bool(depth)
        assert ("bits:" in printed) == bool(depth) and "warning" not in printed
        (record,) = (json.loads(file.read_text()) for file in out.glob("*.json"))
        (training,) = (json.loads(file.read_text()) for file in out.rglob("*record*.json"))
        found = record["resolved"]["bits"], training["resolved"]["bits"], training["resolved"]["scored_bits"]
        assert set(found) == {depth or 16}
        assert load_manifest(out / "support/ring/2_2.json").bits == (depth or 16)
        records[depth], losses[depth] = record["rounds"], training["epochs"][1]["loss"]
    assert records[None] == records[bits] and losses[None] == losses[bits]


def test_a_test_image_beyond_the_depth_is_named_and_does_not_decide(demo_data, tmp_path, capsys):
    data = grey_copy(demo_data, tmp_path / "data", 10)
    bright = grey_file(demo_data / "ring/test/good/000.png", data / "ring/test/good/000.png", 12)
    test_command.main(small_run(data, untrained=True, output=tmp_path))
    printed = capsys.readouterr().out
    assert "bits: 10 (" in printed
    (note,) = [line for line in printed.splitlines() if line.startswith("note")]
    assert str(bright) in note and "1023 of 10 bits" in note


def test_a_support_set_of_another_depth_is_refused(demo_data, tmp_path):
    data = grey_copy(demo_data, tmp_path / "data", 12)
    make_support.main(words(data_path=data, rounds=1, support_path=tmp_path, bits=16, **SUPPORT))
    command = small_run(data, untrained=True, output=tmp_path / "out", support_path=tmp_path, inferences=1)
    with pytest.raises(UserError, match="was made for 16 bits, not 12; create it again"):
        test_command.main(command)
    test_command.main([*command, "--bits", "16"])


def test_the_depth_decides_whether_a_run_is_the_same(demo_data, tmp_path, capsys):
    flags = {"epochs": 1, "select": "last", "eval_every": 0, "resume": True}
    command = small_run(demo_data, save_dir=tmp_path, cache_dir=tmp_path / "cache", **flags)
    train.main(command)
    capsys.readouterr()
    train.main(command)
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="bits 16, now 12"):
        train.main([*command, "--bits", "12"])


@pytest.fixture(scope="module")
def network():
    seed_everything(0)
    return untrained("none", img_size=SIZE).stn.eval()


@pytest.fixture(scope="module")
def greys(demo_data, tmp_path_factory) -> dict[int | None, tuple[list[Path], list[Path]]]:
    """Support and test images of ring, by depth; None: 8-bit files."""
    root = tmp_path_factory.mktemp("greys")
    found = {}
    for bits in (None, *BIT_DEPTHS):
        data = grey_copy(demo_data / "ring", root / f"{bits}", bits)
        found[bits] = sorted((data / "train/good").iterdir())[:3], sorted((data / "test").rglob("*.png"))
    return found


def test_the_detector_s_scores_are_those_of_8_bit_files(network, greys):
    """For each depth, of files and of PIL images."""
    expected, _ = FewShotDetector(network, "cpu").fit(greys[None][0], False).score(greys[None][1])
    for bits in BIT_DEPTHS:
        detector = FewShotDetector(network, "cpu").fit(greys[bits][0], False)
        opened = FewShotDetector(network, "cpu").fit(list(map(Image.open, greys[bits][0])), False)
        assert detector.bits == opened.bits == bits
        assert (detector.score(greys[bits][1])[0] == expected).all()
        assert (opened.score(list(map(Image.open, greys[bits][1])))[0] == expected).all()


def test_the_depth_is_stored_with_the_detector(network, greys, tmp_path):
    support, images = greys[10]
    detector = FewShotDetector(network, "cpu").fit(support)
    detector.save(tmp_path / "part.regad")
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert loaded.bits == 10 and (loaded.score(images)[0] == detector.score(images)[0]).all()
    assert export_metadata(loaded)["bits"] == "10"
    content = torch.load(tmp_path / "part.regad")
    del content["bits"]
    torch.save(content, tmp_path / "old.regad")
    assert FewShotDetector.load(tmp_path / "old.regad", "cpu").bits == 16
    torch.save(content | {"bits": 11}, tmp_path / "wrong.regad")
    with pytest.raises(UserError, match="bits must be"):
        FewShotDetector.load(tmp_path / "wrong.regad", "cpu")


def test_an_image_beyond_the_depth_of_the_detector_is_named(network, greys):
    detector = FewShotDetector(network, "cpu").fit(greys[10][0])
    bright = greys[12][1][0]
    with pytest.warns(ClippedWarning, match=f"{bright} has values up to .* above the 1023 of 10 bits"):
        detector.score([bright])
    with pytest.warns(ClippedWarning, match="an image has values up to"), Image.open(bright) as image:
        detector.score([image])


def test_predict_says_the_depth_and_names_images_beyond_it(greys, tmp_path, capsys):
    support, images = greys[10]
    bright = greys[12][1][0]
    base = ["--input", str(bright), str(images[1]), "--output", str(tmp_path / "out"), "--device", "cpu", "--no_images"]
    fitting = ["--weights", "none", "--img_size", str(SIZE), "--save", str(tmp_path / "part.regad")]
    predict.main(["--support", *map(str, support), *fitting, *base])
    printed = capsys.readouterr()
    assert "bits: 10 (3 16-bit image(s) of the support" in printed.out
    assert re.search(r", 0 failed(, \d for review)?, 1 with a warning: ", printed.out)
    assert f"warning: {bright} has values up to" in printed.err
    record = json.loads((tmp_path / "out/scores.json").read_text())
    assert record["bits"] == 10 and [bool(row["warning"]) for row in record["images"]] == [True, False]
    assert str(bright) in record["images"][0]["warning"]
    assert "1023 of 10 bits" in (tmp_path / "out/report.html").read_text()
    other = ["--detector", str(tmp_path / "part.regad"), "--overwrite", *base]
    predict.main([*other, "--bits", "12", "--calibrate", *map(str, greys[12][1][2:5])])
    printed = capsys.readouterr()
    assert "has values up to" not in printed.out + printed.err and "beyond" not in printed.out
    predict.main([*other, "--calibrate", *map(str, greys[12][1][2:5])])
    printed = capsys.readouterr()
    beyond = [line for line in printed.out.splitlines() if "has values up to" in line]
    assert len(beyond) == 1 and beyond[0].startswith("warning: ") and "(and 2 more images)" in beyond[0]
