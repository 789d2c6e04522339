"""benchmarks/cuda.sh: tried on the CPU with drawn data, and rehearsed on a pretended device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cuda, plain
from models.regad import RegAD
from tests.device.pretend import PretendCuda
from utils.files import PROJECT_ROOT

TRIAL = ["--device", "cpu", "--small"]


def results(folder: Path) -> dict[str, dict]:
    """The files of the parts, by part."""
    return {file.stem.rpartition("_")[2]: json.loads(file.read_text()) for file in folder.glob("cuda_cpu*.json")}


@pytest.mark.slow  # 45 s
def test_all_parts_in_one_go(tmp_path):
    command = ["bash", "benchmarks/cuda.sh", *TRIAL, "--output", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command, cwd=PROJECT_ROOT, env=environment, check=True)
    content = results(tmp_path)
    assert set(content) == set(cuda.MAIN_PARTS)
    assert not any(content["equality"]["largest_difference"].values())


def test_a_total_limit(tmp_path):
    """Parts that have no time left are named; the others are unaffected."""
    environment = os.environ | {"PYTHON": "true", "TOTAL_SECONDS": "0"}
    command = ["bash", "benchmarks/cuda.sh", *TRIAL]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and all(f"{part} (no time left)" in done.stdout for part in cuda.MAIN_PARTS)


def test_a_part_that_fails_does_not_cost_the_others(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(cuda.PARTS, "equality", fail)
    with pytest.raises(SystemExit, match="failed: equality"):
        cuda.main([*TRIAL, "--output", str(tmp_path), "--parts", "equality", "network"])
    monkeypatch.setitem(cuda.PARTS, "equality", lambda *_: {"beyond_tolerance": ["features"]})
    with pytest.raises(SystemExit, match="failed: equality"):
        cuda.main([*TRIAL, "--output", str(tmp_path), "--parts", "equality"])
    content = results(tmp_path)
    assert content["network"]["images_per_second"] and content["equality"]["beyond_tolerance"] == ["features"]


@pytest.mark.slow  # 20 s
@pytest.mark.parametrize("part", ["equality", "network", "cell"])
def test_parts_are_rehearsed_on_a_device(part, tmp_path):
    with PretendCuda():
        arguments = ["--device", "cuda", "--small", "--output", str(tmp_path), "--parts", part]
        if part == "equality":  # what the pretended device returns is invented
            with pytest.raises(SystemExit):
                cuda.main(arguments)
        else:
            cuda.main(arguments)
    assert (tmp_path / f"cuda_pretended_{part}.json").is_file()


def test_the_plain_definition_runs_on_the_device_of_its_input():
    with PretendCuda():
        model = RegAD("rotation_scale", 32).to("cuda")
        images = torch.rand(2, 3, 32, 32, device="cuda")
        features = plain.forward(model.stn, images)[1]
        joined = plain.embedding(features)[..., :2]
        assert plain.distances(joined, joined).device.type == features[0].device.type == "cuda"
        assert plain.score_maps(features[0].mean(dim=1), 32).shape == (2, 32, 32)
        plain.training_step(model, plain.optimizers(model, 0.1, 0.9), images, images[:, None])
