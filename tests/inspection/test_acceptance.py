"""Known defects, acceptance, calibration with other parts, and what a detector file says of itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

import predict
from inspection.detector import FewShotDetector, OtherPartError
from inspection.document import CONFIDENCE, as_text, describe, interval, propose, worse_than
from utils.errors import UserError
from utils.files import sha256

FLAGS = ("--device", "cpu")
SCORES = st.lists(st.floats(0.5, 2.0), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_no_threshold_separates_better_than_the_proposed_one(normal, defects):
    normal, defects = np.array(normal), np.array(defects)
    found = propose(normal, defects)
    gain = found.found / found.defects - found.rejected / found.normal
    for value in np.concatenate([normal, defects]):
        assert gain >= (defects > value).mean() - (normal > value).mean() - 1e-9
    assert (found.defects, found.normal) == (len(defects), len(normal))


def test_the_middle_of_the_gap_is_proposed_with_counts_and_intervals():
    found = propose(np.array([1.0, 1.1]), np.array([1.5, 1.6, 1.7]))
    assert found.threshold == pytest.approx(1.3)
    assert str(found) == (
        "1.300: 3 of 3 (95 % 29 to 100 %) known defects and 0 of 2 (95 % 0 to 84 %) normal images above it"
    )
    assert interval(0, 60) == pytest.approx((0, 0.0596), abs=1e-4)  # 1 - 0.025 ** (1 / 60)
    for count in range(8):
        exact = binomtest(count, 7).proportion_ci(CONFIDENCE, method="exact")
        assert interval(count, 7) == pytest.approx(tuple(exact), abs=1e-12)


def test_what_is_worse():
    one, other = ({"confusion": {"known_defects": {"missed": share}}} for share in (0.1, 0.2))
    assert worse_than(other, one) == "it misses 10% of its known defects, this one 20%"
    assert "was not compared with any" not in worse_than(one, other) == worse_than(None, None) == ""
    assert "this one was not compared with any" in worse_than(None, one)


@pytest.fixture(scope="module")
def part(rings, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("part") / "part.regad"
    flags = ["--weights", "none", "--img_size", "64", "--part", "ring 7", "--save", str(file), *FLAGS]
    predict.main(["--support", *map(str, rings["support"]), *flags])
    return file


def call(part: Path, *flags: object) -> None:
    predict.main(["--detector", str(part), *map(str, flags), *FLAGS])


def test_an_acceptance_is_written_and_kept(part, rings, tmp_path, capsys):
    target = tmp_path / "accepted.regad"
    call(part, "--defects", *rings["defect"], "--threshold", 0.5, "--save", target)
    printed = capsys.readouterr().out
    assert "threshold that separates best from 5 support images (leave-one-out):" in printed and "--adopt" in printed
    assert re.search(r"\d  .+\.png: (defective|review, .)", printed)
    accepted = json.loads((tmp_path / "accepted.acceptance.json").read_text())
    detector = FewShotDetector.load(target, "cpu")
    assert detector.document["acceptance"] == accepted and detector.threshold.value == accepted["threshold"] == 0.5
    assert {row["sha256"] for row in accepted["known_defects"]} == {sha256(path) for path in rings["defect"]}
    counts = accepted["confusion"]["known_defects"]
    assert counts["normal"] == 0 and counts["missed_interval"] == list(interval(0, len(rings["defect"])))
    assert len(accepted["normal_images"]) == 5 and accepted["user"] and accepted["host"]
    with pytest.raises(UserError, match=r"is not overwritten: .* this one was not compared with any"):
        call(part, "--threshold", 0.4, "--save", target)
    call(target, "--threshold", 0.4, "--save", target, "--force")
    changed = FewShotDetector.load(target, "cpu")
    assert changed.threshold.value == 0.4
    assert f"before the last change, id {accepted['decision_id']}, " in as_text(describe(changed, target))
    assert "before the last change" not in as_text(describe(detector, target))


def test_a_threshold_is_adopted_on_request_only(part, rings, tmp_path, capsys):
    before = FewShotDetector.load(part, "cpu")
    call(part, "--defects", *rings["defect"], "--adopt", "--save", tmp_path / "part.regad")
    detector = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    scores = detector.score(rings["defect"])[0]
    assert detector.threshold.value == propose(before.loo_scores.scores[:, 0], scores).threshold
    assert detector.threshold.how == "separates known defects best"
    assert detector.identity() == before.identity() and detector.decision_identity() != before.decision_identity()
    assert f"{detector.threshold.value:.3f}" in capsys.readouterr().out


def test_a_threshold_above_known_defects_is_not_saved(part, rings, tmp_path):
    """The lower threshold is raised, too: nobody would look at the defects."""
    strict = tmp_path / "strict.regad"
    detector = FewShotDetector.load(part, "cpu")
    detector.threshold = detector.threshold._replace(value=9.0, review=9.0)
    detector.save(strict)
    target = tmp_path / "new.regad"
    with pytest.raises(UserError, match="known defects are below the threshold"):
        call(strict, "--defects", *rings["defect"], "--save", target)
    assert not target.exists()
    call(strict, "--defects", *rings["defect"], "--save", target, "--force")
    assert target.exists()


def test_the_smallest_defect_is_kept_and_decides(part, rings, tmp_path):
    """In square millimetres of pixels of half a millimetre: 1,100 mm2 are 4,400 pixels, more than the image has."""
    target, out = tmp_path / "part.regad", tmp_path / "out"
    smallest = ("--min_area", 1100, "--mm_per_pixel", 0.5)
    inputs = ("--input", *rings["defect"], "--output", out, "--no_images")
    call(part, *smallest, "--threshold", 0.9, *inputs, "--save", target)
    detector = FewShotDetector.load(target, "cpu")
    assert detector.min_area == 4400
    rows = json.loads((out / "scores.json").read_text())["images"]
    counted = [row for row in rows if "of at least 4400 pixels" in (row["reason"] or "")]
    assert counted and all(row["decision"] == "normal" and row["score"] > row["review_threshold"] for row in counted)
    with pytest.raises(UserError, match="needs --min_area"):
        call(part, "--mm_per_pixel", 0.5, "--save", target)


def test_calibration_with_another_part_is_refused(part, rings, tmp_path):
    """A grey frame among right images; the detector and its file stay as they are."""
    folder = tmp_path / "normal"
    folder.mkdir()
    for path in rings["good"]:
        shutil.copy(path, folder)
    Image.new("RGB", (64, 64), (90, 90, 90)).save(folder / "other.png")
    content = part.read_bytes()
    for more in ((), ("--threshold", 1)):
        with pytest.raises(UserError, match="1 of 4 normal images are not like the support images: "):
            call(part, "--calibrate", folder, "--save", part, *more)
    assert part.read_bytes() == content
    detector = FewShotDetector.load(part, "cpu")
    with pytest.raises(OtherPartError, match=r"other\.png \(hardly any contrast\)"):
        detector.calibrate(0.05, sorted(folder.iterdir()))
    detector.calibrate(0.05, sorted(folder.iterdir()), force=True)
    assert len(detector.calibration.scores) == 4 and len(detector.gate.further) == 4


def test_a_file_describes_itself(part, rings, tmp_path, capsys):
    target = tmp_path / "calibrated.regad"
    call(part, "--calibrate", *rings["good"], "--defects", *rings["defect"], "--threshold", 0.5, "--save", target)
    capsys.readouterr()
    call(target, "--describe", "json")
    found = json.loads(capsys.readouterr().out)
    detector = FewShotDetector.load(target, "cpu")
    assert found["part"] == "ring 7" and found["id"] == detector.decision_identity() != found["features_id"]
    assert [one["sha256"] for one in found["support"]] == [sha256(path) for path in rings["support"]]
    assert len(found["weights_sha256"]) == 64 and found["threshold"]["value"] == 0.5
    changes = [(entry["change"], len(entry.get("images", ()))) for entry in found["history"]]
    assert changes == [("fitted", 0), ("thresholds computed", 0), ("thresholds computed", 3), ("threshold given", 0)]
    assert found["history"][2]["images"][0]["sha256"] == sha256(rings["good"][0])
    assert all(entry["user"] and entry["date"] and entry["versions"]["torch"] for entry in found["history"])
    assert found["history"][-1]["id"] == found["id"] and found["acceptance"]["decision_id"] == found["id"]
    call(target, "--describe")
    printed = capsys.readouterr().out
    assert "part:        ring 7" in printed and "known defects" in printed and found["id"] in printed


def test_a_detector_of_an_earlier_version_describes_itself(part, capsys, tmp_path):
    detector = FewShotDetector.load(part, "cpu")
    detector.document, detector.gate = {}, None
    detector.save(tmp_path / "old.regad")
    call(tmp_path / "old.regad", "--describe")
    assert "part:        not named" in capsys.readouterr().out
