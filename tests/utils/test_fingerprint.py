"""Fingerprints: equal for equal content, and what differs is named."""

from __future__ import annotations

import json

from utils import fingerprint as module
from utils.fingerprint import FileDigests, changes, fingerprint

SETTINGS, INPUTS = {"img_size": 224, "backbone": "resnet18"}, {"test_images": "a" * 64}


def test_equal_after_json_and_independent_of_code(monkeypatch):
    before = fingerprint(SETTINGS, INPUTS)
    assert changes(json.loads(json.dumps(before)), fingerprint(SETTINGS, INPUTS)) == []
    monkeypatch.setattr(module, "METHOD_VERSION", module.METHOD_VERSION + 1)
    assert changes(before, fingerprint(SETTINGS, INPUTS)) == [
        f"method_version {module.METHOD_VERSION - 1}, now {module.METHOD_VERSION}"
    ]


def test_what_differs_is_named():
    now = fingerprint(SETTINGS | {"img_size": 64, "bits": 8}, {"test_images": "b" * 64})
    assert changes(fingerprint(SETTINGS, INPUTS), now) == [
        "img_size 224, now 64",
        "bits None, now 8",
        "other test images",
    ]
    assert changes({"decisive": {}}, now) == changes(None, now) == ["no fingerprint"]


def test_digests_of_files_depend_on_names_and_content_only(tmp_path):
    for folder, order in (("one", "ab"), ("other", "ba")):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(name)
    one, other = ([tmp_path / folder / name for name in "ab"] for folder in ("one", "other"))
    digests = FileDigests()
    assert digests.together(one) == digests.together(other[::-1])
    (tmp_path / "other" / "a").write_text("c")
    assert FileDigests().together(one) != FileDigests().together(other)
    assert digests.together(one) == digests.together(other), "each file is read once"
