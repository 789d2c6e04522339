"""The process set-up of the commands: no TF32, the device is printed, a GPU that is passed over is mentioned.

tests/experiments/test_reproduce.py has that of reproduce.py. And the memory layout, which follows the device.
"""

from __future__ import annotations

import glob

import pytest
import torch

import export
import predict
import test as test_command
import train
from models import stn
from models.regad import RegAD
from training.loop import Trainer
from utils import devices
from utils.errors import UserError

RUNS = {  # each ends in an error that follows the set-up
    "train": (train, "--obj ring --data_path absent --data_type folder"),
    "test": (test_command, "--obj ring --data_path absent --data_type folder"),
    "predict": (predict, "--support absent.png --input absent.png --device cpu --output"),
    "export": (export, "--support absent.png --output"),
}


@pytest.fixture
def as_in_containers():
    """TF32 is on, as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE leaves it."""
    libraries = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = True
    yield libraries
    for library, value in zip(libraries, before, strict=True):
        library.allow_tf32 = value


@pytest.mark.parametrize("name", RUNS)
def test_a_command_switches_tf32_off_and_prints_its_device(name, as_in_containers, tmp_path, capsys):
    command, given = RUNS[name]
    paths = [str(tmp_path / "out")] if given.endswith("--output") else ["--device", "cpu"]
    with pytest.raises(UserError):
        command.main([*given.split(), *paths])
    assert not any(library.allow_tf32 for library in as_in_containers)
    assert capsys.readouterr().out.count("device: cpu (") == 1


@pytest.mark.parametrize(
    ("file", "build", "name"),
    [(True, "12.8", "auto"), (False, "12.8", "auto")] + [(True, None, "auto"), (True, "12.8", "cpu")],
)
def test_a_gpu_that_is_passed_over_is_mentioned(file, build, name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"] if file else [])

    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.cuda, "init", fail)
    devices._why_no_cuda.cache_clear()
    devices.command_device(name)
    devices._why_no_cuda.cache_clear()
    warned = "PyTorch cannot use it: The NVIDIA driver on your system is too old\n" in capsys.readouterr().err
    assert warned == (file and build is not None and name == "auto")


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, torch.channels_last),
        ("cuda", torch.float32, torch.contiguous_format),
        ("cuda", torch.bfloat16, torch.channels_last),
    ],
)
def test_the_layout_of_each_device(device, dtype, expected):
    assert stn.layout(torch.device(device), dtype) == expected


@pytest.mark.parametrize("chosen", [torch.contiguous_format, torch.channels_last])
def test_the_network_and_its_training_have_the_layout(chosen, monkeypatch):
    monkeypatch.setattr(stn, "LAYOUTS", {("cpu", torch.float32): chosen})
    model = RegAD("rotation_scale", 64)
    for network in (stn.fuse_conv_bn(model.stn), Trainer(model, 0.01, 0.9).model.stn):
        assert network.layer1[0].conv1.weight.is_contiguous(memory_format=chosen)
