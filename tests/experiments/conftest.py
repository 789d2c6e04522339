"""Records that several tests of tables share."""

from __future__ import annotations

import pytest

from tests.experiments.test_tables import write_record


@pytest.fixture
def with_another_method(tmp_path):
    """Two folders: the project's last weights, and another method's record of them, without pixel metrics."""
    names, arguments = [["1.png"], ["2.png"]], {"obj": "bottle", "shot": 2, "data_type": "mvtec"}
    write_record(tmp_path / "a", "bottle", 2, "last", [(0.90, 0.5), (0.92, 0.5)], names=names)
    rounds, changes = [{"image_auroc": 0.95}, {"image_auroc": 0.96}], {"commit": None, "arguments": arguments}
    write_record(tmp_path / "b", "bottle", 2, "last", rounds, names=names, scorer="mine", **changes)
    return tmp_path / "a", tmp_path / "b"
