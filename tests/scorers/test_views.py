"""Views, warps and score maps against kornia, scipy, and small images with known results."""

from __future__ import annotations

import math

import kornia
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import plain
from models.regad import RegAD
from models.stn import fuse_conv_bn
from models.warp import inverse_affine, sampling_grid, warp
from scorers.features import FeatureStore, _write_together, write_support_images
from scorers.maps import score_map_matrix
from scorers.registry import make_scorers
from scorers.views import ROTATION_ANGLES, TRANSLATIONS, VIEWS_PER_IMAGE, support_views

SIDE = 32


def random_image(size: int = SIDE) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_views_are_the_release_s():
    image = random_image()
    views = support_views(image)
    assert len(views) == VIEWS_PER_IMAGE == 22
    expected = [image]
    for angle in ROTATION_ANGLES:
        degrees = torch.tensor([math.degrees(angle)])
        expected.append(
            kornia.geometry.rotate(image, degrees, mode="bilinear", padding_mode="reflection", align_corners=False)
        )
    for x, y in TRANSLATIONS:
        pixels = torch.tensor([[-x * SIDE / 2, -y * SIDE / 2]])
        expected.append(
            kornia.geometry.translate(image, pixels, mode="bilinear", padding_mode="reflection", align_corners=False)
        )
    expected.append(kornia.geometry.hflip(image))
    expected += [torch.from_numpy(np.rot90(image.numpy(), turns, (2, 3)).copy()) for turns in (1, 2, 3)]
    expected.append(kornia.color.rgb_to_grayscale(image).expand(-1, 3, -1, -1))
    torch.testing.assert_close(views, torch.cat(expected), rtol=0, atol=5e-5)


def test_tables_of_the_release():
    assert [round(angle * 16 / math.pi) for angle in ROTATION_ANGLES] == [-4, -3, -2, -1, 1, 2, 3, 4]
    assert TRANSLATIONS[:4] == ((0.2, 0.2), (-0.2, 0.2), (-0.2, -0.2), (0.2, -0.2))
    assert TRANSLATIONS[4:] == ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))


def test_positive_translation_moves_left_and_up():
    dot = torch.zeros(1, 3, 20, 20)
    dot[..., 10, 12] = 1
    moved = support_views(dot)[9, 0]  # the first translation, (.2, .2): a tenth of the side
    assert (moved == moved.max()).nonzero().tolist() == [[8, 10]]


def test_views_of_several_images_stay_apart():
    images = torch.cat([random_image(), 1 - random_image()])
    both = support_views(images).unflatten(0, (VIEWS_PER_IMAGE, 2))
    for number in (0, 1):
        torch.testing.assert_close(both[:, number], support_views(images[number : number + 1]))


@pytest.mark.parametrize("batch_size", [4, 22, 66])
@pytest.mark.parametrize("names", [["neighbours"], ["gaussian", "neighbours"]])
def test_images_whose_views_share_network_passes(names, batch_size):
    """As on CUDA: the same features as one image after the other, whichever scorers need them."""
    torch.manual_seed(0)
    network = RegAD("rotation_scale", SIDE).double().stn
    for stn in (network.stn1, network.stn2, network.stn3):
        torch.nn.init.normal_(stn.fc[2].weight, std=0.01)
    images = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64)
    network, scorers = fuse_conv_bn(network), make_scorers(names)
    alone, together = (FeatureStore(scorers, 4, with_views=True) for _ in range(2))
    order = [2, 0, 3]
    write_support_images(alone, order, network, images, batch_size)
    needed = sorted({view for scorer in scorers for view in scorer.views})
    _write_together(together, order, network, images, needed, batch_size)
    for number in order:
        ours, expected = together.part(number, number + 1), alone.part(number, number + 1)
        for name in names:
            for one, other in zip(ours[name], expected[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_reflection_outside():
    row = torch.arange(4.0).view(1, 1, 1, 4)
    shift = torch.tensor([[[1.0, 0, 1], [0, 1, 0]]])  # half the width: outputs 0..3 read inputs 2..5
    assert warp(row, shift).flatten().tolist() == [2, 3, 3, 2]


@given(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), st.sampled_from([(5, 7), (8, 8), (14, 14)]))
def test_channels_last_route_equals_grid_sample(offsets, sides):
    x = torch.rand(2, 8, *sides, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64) + torch.tensor(offsets, dtype=torch.float64)
    theta = theta.view(1, 2, 3) * torch.tensor([1.0, 0.5]).view(2, 1, 1).double()
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    torch.testing.assert_close(sampling_grid(theta, *sides), grid, rtol=1e-12, atol=1e-12)
    expected = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    with torch.no_grad():
        found = warp(x.contiguous(memory_format=torch.channels_last), theta)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_inverse_affine():
    theta = torch.eye(2, 3, dtype=torch.float64) + 0.3 * torch.randn(
        50, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    full = torch.cat([theta, torch.tensor([0.0, 0, 1], dtype=torch.float64).expand(50, 1, 3)], dim=1)
    torch.testing.assert_close(inverse_affine(theta), torch.linalg.inv(full)[:, :2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("grid", "size"), [(56, 224), (64, 256), (8, 32), (20, 80), (4, 16)])
def test_score_map_is_bilinear_then_gaussian_filter(grid, size):
    distance = torch.rand(3, grid, grid, generator=torch.Generator().manual_seed(0)) * 40
    matrix = score_map_matrix(grid, size)
    expected = plain.score_maps(distance.double(), size)
    np.testing.assert_allclose((matrix @ distance @ matrix.T).numpy(), expected, rtol=3e-6)
