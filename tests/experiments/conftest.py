"""Records that several tests of tables share."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_tables import write_record


@pytest.fixture
def with_another_method(tmp_path):
    """Two folders: the project's last weights, and another method's record of them, without pixel metrics."""
    names = [["1.png"], ["2.png"]]
    record = write_record(tmp_path / "a", "bottle", 2, "last", [(0.90, 0.5), (0.92, 0.5)], names=names)
    rounds = [{"image_auroc": 0.95}, {"image_auroc": 0.96}]
    record |= {"scorer": "mine", "rounds": rounds, "commit": None, "arguments": {"obj": "bottle", "shot": 2}}
    record["arguments"]["data_type"] = "mvtec"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.json").write_text(json.dumps(record))
    return tmp_path / "a", tmp_path / "b"
