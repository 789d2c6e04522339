"""Winograd's convolution against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.winograd import WinogradConv2d, transforms


def convolution(channels: int, filters: int, dtype: torch.dtype) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, filters, 3, padding=1, dtype=dtype).requires_grad_(False)


def test_one_dimension_by_hand():
    output, kernel, inputs = transforms()
    d, g = np.array([3.0, 1, 4, 1, 5, 9]), np.array([2.0, 7, 1])
    np.testing.assert_allclose(output @ ((kernel @ g) * (inputs @ d)), [17, 31, 20, 46])  # 3*2 + 1*7 + 4*1, ...


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 13), st.integers(1, 13))
def test_equals_conv2d_at_any_size(batch, channels, filters, height, width):
    direct = convolution(channels, filters, torch.float64)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(WinogradConv2d(direct)(x), direct(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rounding_stays_near_that_of_a_direct_convolution(memory_format):
    direct = convolution(128, 128, torch.float32)
    x = torch.relu(torch.randn(2, 128, 28, 28, generator=torch.Generator().manual_seed(1)))
    exact = convolution(128, 128, torch.float64)
    exact.load_state_dict({name: value.double() for name, value in direct.state_dict().items()})
    reference = exact(x.double())

    def error(y: torch.Tensor) -> float:
        return float((y - reference).norm() / reference.norm())

    found = WinogradConv2d(direct)(x.contiguous(memory_format=memory_format))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found) < 4 * error(direct(x)) < 1e-5
