"""CUDA against the CPU at the smallest size: networks, scorers, a detector, and each command once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import export
import predict
import test as test_command
import train
from datasets.images import read_image
from inspection.detector import FewShotDetector
from models.regad import RegAD
from models.stn import fuse_conv_bn
from scorers.registry import SCORERS, make_scorer
from tests.flags import small_run
from utils.devices import command_device
from utils.stages import StageClock

pytestmark = pytest.mark.cuda
DEVICE, SIZE = "cuda", 64
DTYPES = {torch.float32: 1e-3, torch.float64: 1e-9}  # largest relative difference, by norm


def shaken(dtype: torch.dtype) -> RegAD:
    """Networks whose warps differ from the identity."""
    torch.manual_seed(0)
    model = RegAD("affine", SIZE)
    for head in (model.stn.stn1, model.stn.stn2, model.stn.stn3):
        torch.nn.init.normal_(head.fc[2].weight, std=0.005)
    return model.to(dtype)


def images(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.cpu() - reference).norm() / reference.norm())


@pytest.fixture(autouse=True)
def settings():
    command_device(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features(dtype):
    network, inputs = shaken(dtype).stn.eval(), images(4, dtype)
    expected = network.features(inputs)
    found = fuse_conv_bn(network.to(DEVICE)).features(inputs.to(DEVICE))
    assert max(relative(*pair) for pair in zip(found, expected, strict=True)) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(dtype):
    query, support = images(4, dtype), images(4, dtype).roll(1, 0)[:, None]
    gradients = []
    for device in ("cpu", DEVICE):
        model = shaken(dtype).train().to(device)
        model(query.to(device), support.to(device)).backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert relative(gradients[1], gradients[0]) < 30 * DTYPES[dtype]


@pytest.mark.parametrize("name", SCORERS)
def test_distances(name):
    scorer, network = make_scorer(name), shaken(torch.float32).stn.eval()
    views, tests = (network.features(some) for some in images(27, torch.float32).split((24, 3)))
    found = []
    for device in ("cpu", DEVICE):
        support, test = (scorer.prepare([layer.to(device) for layer in maps]) for maps in (views, tests))
        found.append(scorer.measure(support, test, StageClock(torch.device(device))))
    assert relative(found[1], found[0]) < 1e-3


@pytest.mark.parametrize("name", SCORERS)
def test_a_detector(name, demo_data):
    files = sorted((demo_data / "ring/train/good").iterdir())
    squares = [read_image(file, SIZE) for file in files]
    network = shaken(torch.float32).stn.eval()
    fitted = [FewShotDetector(network, on, scorer=name).fit(squares[:2]) for on in ("cpu", DEVICE)]
    reference, found = (detector.score(squares[2:])[0] for detector in fitted)
    np.testing.assert_allclose(found, reference, rtol=1e-2)


def test_each_command(demo_data, tmp_path):
    given = {"device": DEVICE, "shot": 2, "inferences": 1, "save_dir": tmp_path / "save"}
    train.main(small_run(demo_data, epochs=1, batch_size=3, cache_dir="none", amp="bf16", tf32=True, **given))
    test_command.main(small_run(demo_data, scorer=tuple(SCORERS), output=tmp_path, **given))
    assert len(list(tmp_path.glob("*.json"))) == len(SCORERS)
    support = [str(file) for file in sorted((demo_data / "ring/train/good").iterdir())[:2]]
    detector = [*["--weights", "none", "--img_size"], str(SIZE), "--support", *support]
    saved = tmp_path / "part.regad"
    inputs = ["--input", support[0], "--device", DEVICE, "--save", str(saved), "--output", str(tmp_path / "out")]
    predict.main([*detector, *inputs])
    assert json.loads((tmp_path / "out/scores.json").read_text())["resolved"]["device"].startswith(DEVICE)
    export.main(
        ["--detector", str(saved), "--format", "pt2", "--output", str(tmp_path / "part.pt2"), "--check", *support]
    )
