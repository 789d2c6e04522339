"""benchmarks/cuda.sh: tried on the CPU with drawn data, and rehearsed on a pretended device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import cuda, plain
from models.regad import RegAD
from tests.device.pretend import PretendCuda
from utils.files import PROJECT_ROOT

TRIAL = ["--device", "cpu", "--small"]


@pytest.mark.slow  # 45 s
def test_all_parts_in_one_go(tmp_path):
    command = ["bash", "benchmarks/cuda.sh", *TRIAL, "--output", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command, cwd=PROJECT_ROOT, env=environment, check=True)
    content = json.loads(next(tmp_path.glob("cuda_cpu*.json")).read_text())
    assert set(content) == set(cuda.PARTS)
    assert not any(content["equality"]["largest_difference"].values())
    assert "convolution" in (tmp_path / "cuda_profile_cpu.txt").read_text()


def test_a_part_that_fails_does_not_cost_the_others(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(cuda.PARTS, "equality", fail)
    with pytest.raises(SystemExit, match="failed: equality"):
        cuda.main([*TRIAL, "--output", str(tmp_path), "--parts", "equality", "network"])
    monkeypatch.setitem(cuda.PARTS, "equality", lambda *_: {"beyond_tolerance": ["features"]})
    with pytest.raises(SystemExit, match="failed: equality"):
        cuda.main([*TRIAL, "--output", str(tmp_path), "--parts", "equality"])
    content = json.loads(next(tmp_path.glob("cuda_cpu*.json")).read_text())
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
    assert part in json.loads((tmp_path / "cuda_pretended.json").read_text())


def test_the_plain_definition_runs_on_the_device_of_its_input():
    with PretendCuda():
        model = RegAD("rotation_scale", 32).to("cuda")
        images = torch.rand(2, 3, 32, 32, device="cuda")
        features = plain.forward(model.stn, images)[1]
        joined = plain.embedding(features)[..., :2]
        assert plain.distances(joined, joined).device.type == features[0].device.type == "cuda"
        assert plain.score_maps(features[0].mean(dim=1), 32).shape == (2, 32, 32)
        plain.training_step(model, plain.optimizers(model, 0.1, 0.9), images, images[:, None])
