"""The figure of warps: angles and scales of matrices by hand, and the command."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from examples import warp_figure
from models.regad import RegAD, save_checkpoint
from utils.errors import UserError


def test_rotations_and_scales_by_hand():
    angle, wide, high = math.radians(30), 0.9, 1.2
    theta = [[wide * math.cos(angle), -math.sin(angle), 0], [math.sin(angle), high * math.cos(angle), 0]]
    degrees, scales = warp_figure.rotations_and_scales(torch.tensor([theta]))
    assert degrees == pytest.approx([30], abs=1e-3) and scales[0] == pytest.approx([wide, high])


def test_the_command(demo_data, tmp_path, capsys):
    model = RegAD()
    with torch.no_grad():
        model.stn.stn1.fc[2].bias.copy_(torch.tensor([math.radians(-20), 1.1, 0.9]))
    save_checkpoint(tmp_path / "a.pt", model, {})
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
