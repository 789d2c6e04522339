"""Scorers and backbones through the commands: test.py, train.py, reproduce.py, predict.py, export.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import predict
import reproduce
import train
from tests.commands.test_commands import test_command
from tests.flags import small_run
from utils.errors import UserError
from utils.files import PROJECT_ROOT

SIZE = "64"


@pytest.fixture
def mine(tmp_path) -> str:
    """The example scorer in docs/extend.md, as a file."""
    block = re.search(r"```python\n(# nearest\.py\n.*?)```", (PROJECT_ROOT / "docs/extend.md").read_text(), re.DOTALL)
    (tmp_path / "nearest.py").write_text(block[1])
    return f"{tmp_path / 'nearest.py'}:NearestView"


def score(demo_data: Path, output: Path, *flags: str) -> dict[str, dict]:
    """Runs test.py untrained on the synthetic rings; returns the records by file name."""
    given = {"shot": 2, "inferences": 2, "untrained": True, "img_size": None, "output": output}
    test_command.main([*small_run(demo_data, **given), *flags])
    return {path.name: json.loads(path.read_text()) for path in output.glob("*.json")}


def test_several_scorers_share_a_run_and_give_what_each_gives_alone(demo_data, mine, tmp_path, capsys):
    flags = ("--img_size", SIZE, "--scorer")
    together = score(demo_data, tmp_path / "all", *flags, "gaussian", "neighbours", mine)
    assert set(together) == {
        f"ring_2_rotation_scale_untrained{ending}.json" for ending in ("", "_neighbours", "_nearest")
    }
    assert "round 0, neighbours: image AUROC" in capsys.readouterr().out
    for name in ("gaussian", "neighbours", mine):
        (record,) = score(demo_data, tmp_path / "alone" / name.rsplit(":")[-1], *flags, name).values()
        (shared,) = (other for other in together.values() if other["scorer"] == record["scorer"])
        assert record["config"]["scorer"] == name and record["scorer"] == name.rsplit(":")[-1].replace(
            "NearestView", "nearest"
        )
        for alone, among in zip(record["rounds"], shared["rounds"], strict=True):  # last digits depend on the batch
            assert alone == pytest.approx(among, abs=2e-3)


def test_reproduce_has_a_column_per_scorer_and_paired_differences(demo_data, mine, tmp_path, capsys):
    score(demo_data, tmp_path / "out", "--img_size", SIZE, "--scorer", "gaussian", mine)
    reproduce.main(["--report", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| category | untrained | untrained, nearest |" in printed
    assert "image AUROC, K = 2: differences from gaussian, paired" in printed
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("ring*.json"))]
    first, second = ([100 * numbers["image_auroc"] for numbers in record["rounds"]] for record in records)
    difference = np.subtract(second, first) if records[1]["scorer"] == "nearest" else np.subtract(first, second)
    assert f"| ring | {difference.mean():+.1f} (" in printed


def test_a_model_of_timm_through_test_reproduce_and_predict(demo_data, tmp_path, capsys):
    pytest.importorskip("timm")
    output = tmp_path / "out"
    records = score(demo_data, output, "--backbone", "timm:test_vit", "--scorer", "gaussian", "neighbours")
    assert set(records) == {"ring_2_timm-test_vit_untrained.json", "ring_2_timm-test_vit_untrained_neighbours.json"}
    assert {record["resolved"]["img_size"] for record in records.values()} == {160}
    reproduce.main(["--report", str(output)])
    assert "- backbone: timm:test_vit" in capsys.readouterr().out
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]
    inputs = ["--input", str(demo_data / "ring/test"), "--device", "cpu"]
    detector = ["--support", *map(str, support), "--backbone", "timm:test_vit", "--weights", "none"]
    predict.main([*detector, *inputs, "--output", str(tmp_path / "a"), "--save", str(tmp_path / "part.regad")])
    predict.main(["--detector", str(tmp_path / "part.regad"), *inputs, "--output", str(tmp_path / "b")])
    first, second = (json.loads((tmp_path / name / "scores.json").read_text())["images"] for name in "ab")
    assert [row["score"] for row in first] == [row["score"] for row in second] and len(first) == 9
    with pytest.raises(UserError, match="timm:test_vit is not trained here: give --untrained"):
        test_command.main(["--obj", "ring", "--backbone", "timm:test_vit"])


@pytest.mark.slow
def test_a_table_of_a_model_of_timm_and_two_scorers(demo_data, tmp_path, capsys):
    pytest.importorskip("timm")
    grid = ["--objs", "ring", "--shots", "1", "--inferences", "2", "--data_type", "folder", "--data_path"]
    grid += [str(demo_data), "--backbone", "timm:test_vit", "--weights", "none", "--num_workers", "0"]
    grid += ["--scorer", "gaussian", "neighbours", "--device", "cpu", "--output", str(tmp_path)]
    reproduce.main(grid)
    printed = capsys.readouterr().out
    assert "1 runs, 0 finished, 1 to do" in printed and "| category | untrained |" in printed
    reproduce.main([*grid, "--dry_run"])
    assert "1 runs, 1 finished, 0 to do" in capsys.readouterr().out


def test_predict_says_its_scorer_and_a_foreign_one_is_given_again(demo_data, mine, tmp_path, capsys):
    support = [str(path) for path in sorted((demo_data / "ring/train/good").iterdir())[:3]]
    common = ["--weights", "none", "--img_size", SIZE, "--device", "cpu", "--no_pictures"]
    inputs = ["--input", str(demo_data / "ring/test/good")]
    predict.main(["--support", *support, *inputs, *common, "--output", str(tmp_path / "default")])
    assert "scorer: combined" in capsys.readouterr().out
    file = tmp_path / "part.regad"
    predict.main(["--support", *support, *common, "--scorer", mine, "--save", str(file)])
    saved = ["--detector", str(file), *inputs, "--device", "cpu", "--no_pictures", "--output", str(tmp_path / "saved")]
    with pytest.raises(UserError, match=r"needs its scorer nearest as FILE\.py:CLASS"):
        predict.main(saved)
    with pytest.raises(UserError, match="made with the scorer nearest, not gaussian"):
        predict.main([*saved, "--scorer", "gaussian"])
    predict.main([*saved, "--scorer", mine])
    assert "scorer: nearest" in capsys.readouterr().out


def test_epochs_are_scored_by_every_scorer_and_chosen_by_the_first(demo_data, tmp_path):
    flags = {"shot": 1, "epochs": 1, "inferences": 2, "cache_dir": "none", "scorer": ("neighbours", "gaussian")}
    train.main(small_run(demo_data, save_dir=tmp_path, **flags))
    (record,) = tmp_path.rglob("*_record.json")
    epochs = json.loads(record.read_text())["epochs"]
    for entry in epochs:
        assert list(entry["scorers"]) == ["neighbours", "gaussian"]
        assert entry["image_auroc"] == entry["scorers"]["neighbours"]["image_auroc"]
