"""The figure of warps: angles and scales of matrices by hand, and the command."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import fixed_warp
from datasets.images import read_image
from datasets.mvtec import list_test_items
from examples import warp_figure
from models.regad import RegAD, checkpoint, load_checkpoint
from utils.errors import UserError
from utils.files import save_tensors


def test_rotations_and_scales_by_hand():
    angle, wide, high = math.radians(30), 0.9, 1.2
    theta = [[wide * math.cos(angle), -math.sin(angle), 0], [math.sin(angle), high * math.cos(angle), 0]]
    degrees, scales = warp_figure.rotations_and_scales(torch.tensor([theta]))
    assert degrees == pytest.approx([30], abs=1e-3) and scales[0] == pytest.approx([wide, high])


def test_the_command(demo_data, tmp_path, capsys):
    model = RegAD()
    with torch.no_grad():
        model.stn.stn1.fc[2].bias.copy_(torch.tensor([math.radians(-20), 1.1, 0.9]))
    save_tensors(tmp_path / "a.pt", checkpoint(model, {}))
    words = ["--obj", "ring", "--data_type", "folder", "--weights", "none", "--images", "2"]
    words += [
        "--data_path",
        str(demo_data),
        "--checkpoints",
        str(tmp_path / "a.pt"),
        "--output",
        str(tmp_path / "w.png"),
    ]
    with pytest.raises(UserError, match="--names has 0 titles for 1 checkpoints"):
        warp_figure.main(words)
    warp_figure.main([*words, "--names", "turned"])
    printed = capsys.readouterr().out
    assert "untrained, STN 1: rotation 0.000 +- 0.000 degrees, scales 1.000 +- 0.000 and 1.000" in printed
    assert "turned, STN 1: rotation -20.000 +- 0.000 degrees, scales 1.100 +- 0.000 and 0.900" in printed
    with Image.open(tmp_path / "w.png") as figure:
        assert figure.size[0] > 200


def test_a_fixed_warp(demo_data, tmp_path, capsys):
    """The warps of the written checkpoint are the means of the trained ones, whatever the image."""
    torch.manual_seed(0)
    model = RegAD()
    with torch.no_grad():
        for stn in (model.stn.stn1, model.stn.stn2, model.stn.stn3):
            stn.fc[2].weight.normal_(std=0.01)
    save_tensors(tmp_path / "trained.pt", checkpoint(model, {}))
    files = [str(tmp_path / name) for name in ("trained.pt", "fixed.pt")]
    fixed_warp.main([*files, "--obj", "ring", "--data_path", str(demo_data)])
    items = list_test_items(demo_data / "ring")[:: fixed_warp.EVERY]
    images = np.stack([read_image(item.image, 224) for item in items])
    expected = fixed_warp.mean_warps(model, images)
    fixed = load_checkpoint(tmp_path / "fixed.pt", "rotation_scale", 224).stn.eval()
    noise = torch.rand(2, 3, 224, 224)
    for theta, (angle, *scales) in zip(fixed(noise).warps, expected, strict=True):
        angles, both = warp_figure.rotations_and_scales(theta.detach())
        assert angles == pytest.approx([angle] * 2, abs=1e-3) and both[1] == pytest.approx(scales, abs=1e-4)
    assert abs(expected[0][0]) > 0.1
    fixed_warp.main(["none", files[1], "--warp", "5", "1", "1.1", "--weights", "none"])
    assert "STN 3: 5.00 degrees, scales 1.000 and 1.100" in capsys.readouterr().out
    with pytest.raises(UserError, match="give --obj or --warp"):
        fixed_warp.main(files)
