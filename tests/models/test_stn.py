"""The backbone: the nine warps, the fused copy, and the files that it loads."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.reference import GOLDEN_CHECKPOINT, TRUNK
from models.regad import CHECKPOINT_PARTS, RegAD, _reject_other_mode, load_checkpoint, untrained
from models.stn import (
    HEADS,
    STN_MODES,
    SpatialTransformer,
    STNResNet,
    _first_convolution,
    fuse_conv_bn,
    without_identity_heads,
)
from models.warp import warp
from tests.evaluation.test_release import recipe_model
from tests.reference import needs_reference
from utils.devices import command_device
from utils.errors import UserError
from utils.naming import CheckpointFiles

SIDE = 64  # pixels; the release has 224, which is slower
COS, SIN = math.cos(0.3), math.sin(0.3)
LITERAL = {  # parameters -> rows of the matrix, as in paper and release
    "affine": ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]),
    "translation": ([0.1, 0.2], [[1, 0, 0.1], [0, 1, 0.2]]),
    "rotation": ([0.3], [[COS, -SIN, 0], [SIN, COS, 0]]),
    "scale": ([2, 3], [[2, 0, 0], [0, 3, 0]]),
    "shear": ([0.1, 0.2], [[1, 0.1, 0], [0.2, 1, 0]]),
    "rotation_scale": ([0.3, 2, 3], [[2 * COS, -SIN, 0], [SIN, 3 * COS, 0]]),
    "translation_scale": ([0.1, 0.2, 2, 3], [[2, 0, 0.1], [0, 3, 0.2]]),
    "rotation_translation": ([0.3, 0.1, 0.2], [[COS, -SIN, 0.1], [SIN, COS, 0.2]]),
    "rotation_translation_scale": ([0.3, 0.1, 0.2, 2, 3], [[2 * COS, -SIN, 0.1], [SIN, 3 * COS, 0.2]]),
}


def shaken(stn_mode: str = "rotation_scale", size: int = SIDE) -> STNResNet:
    """A network whose warps and batch-norms differ from their initial values."""
    torch.manual_seed(0)
    network = STNResNet(stn_mode, size)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "fc.2" in name:
                tensor += 0.02 * torch.randn_like(tensor)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return network.eval()


def images(count: int, size: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("stn_mode", STN_MODES)
def test_matrix_of_each_mode(stn_mode):
    network = STNResNet(stn_mode, SIDE).eval()
    parameters, rows = LITERAL[stn_mode]
    with torch.no_grad():
        network.stn1.fc[2].bias.copy_(torch.tensor(parameters))
        theta = network.stn1(torch.rand(2, 64, SIDE // 4, SIDE // 4))
    torch.testing.assert_close(theta, torch.tensor(rows, dtype=torch.float32).expand(2, 2, 3))


@pytest.mark.parametrize("stn_mode", STN_MODES)
def test_untrained_warps_are_the_identity_and_left_out(stn_mode):
    """The maps without the warps are those of the warps at the identity. The original keeps its heads for training."""
    network = STNResNet(stn_mode, SIDE).eval()
    quick = without_identity_heads(network)
    assert all(getattr(quick, name) is None for name in HEADS) and not any("stn" in key for key in quick.state_dict())
    assert all(isinstance(getattr(network, name), SpatialTransformer) for name in HEADS)
    with torch.no_grad():
        registered = network(images(2))
    for theta in registered.warps:
        assert torch.equal(theta, torch.eye(2, 3).expand(2, 2, 3))
    for moved, back, without in zip(
        registered.maps, network.features(images(2)), quick.features(images(2)), strict=True
    ):
        torch.testing.assert_close(moved, back, rtol=1e-4, atol=1e-4)
        assert (back - without).abs().max() < 1e-5 * back.abs().max()


def test_a_trained_head_stays():
    network = STNResNet("rotation_scale", SIDE).eval()
    with torch.no_grad():
        network.stn2.fc[2].bias[0] = 0.1
    quick = without_identity_heads(network)
    assert quick.stn1 is None and quick.stn2 is network.stn2 and quick.stn3 is None
    assert without_identity_heads(shaken()).stn1 is not None
    for with_heads, without in zip(network.features(images(2)), quick.features(images(2)), strict=True):
        assert (with_heads - without).abs().max() < 1e-5 * with_heads.abs().max()


def test_features_are_unwarped_by_every_inverse():
    """The map of layer2 is un-warped by the inverses of layer2 and then layer1; shown with translations."""
    network = STNResNet("translation", SIDE).eval()
    shifts = (4 / (SIDE // 4), 4 / (SIDE // 8), 4 / (SIDE // 16))  # two positions of each grid, normalised
    with torch.no_grad():
        for stn, shift in zip((network.stn1, network.stn2, network.stn3), shifts, strict=True):
            stn.fc[2].bias.copy_(torch.tensor([shift, 0.0]))
        maps, features = network(images(1)).maps, network.features(images(1))
    assert torch.allclose(features[0][..., 2:], maps[0][..., :-2], atol=1e-4)  # shifted left by 2, back right by 2
    assert torch.allclose(features[1][..., 3:], maps[1][..., :-3], atol=1e-4)  # 2 of layer2 and 2 / 2 of layer1
    assert not torch.allclose(features[1][..., 2:], maps[1][..., :-2], atol=1e-2)


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_shapes_at_sizes_divisible_by_16(size):
    features = STNResNet("affine", size).eval().features(images(1, size))
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, size // 4, size // 4),
        (128, size // 8, size // 8),
        (256, size // 16, size // 16),
    ]


def test_head_sizes_of_the_release():
    sides = [STNResNet().state_dict()[f"stn{i}.fc.0.weight"].shape[1] / 16 for i in (1, 2, 3)]
    assert sides == [14**2, 7**2, 4**2]


@pytest.mark.parametrize("stn_mode", ["rotation_scale", "affine"])
@pytest.mark.parametrize("batch", [1, 5])
def test_fused_gives_the_same_features(stn_mode, batch):
    network = shaken(stn_mode)
    fast = fuse_conv_bn(network)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fast.modules())
    for slow, quick in zip(network.features(images(batch)), fast.features(images(batch)), strict=True):
        assert (slow - quick).norm() / slow.norm() < 1e-5


@pytest.mark.parametrize("make", [fuse_conv_bn, lambda network: network.train()])
def test_grey_images_give_the_same_maps_by_one_channel(make, monkeypatch):
    network, grey = make(shaken().double()), images(3)[:, :1].expand(-1, 3, -1, -1).double()

    def maps_and_gradient() -> list[torch.Tensor]:
        weight = network.conv1.weight.requires_grad_()
        weight.grad = None
        maps = network(grey).maps
        sum(m.square().mean() for m in maps).backward()
        return [*maps, weight.grad]

    short = maps_and_gradient()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # three channels
    for quick, slow in zip(short, maps_and_gradient(), strict=True):
        assert 0 < (slow - quick).norm() / slow.norm() < 1e-12  # not 0: another order of summation


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_grey_images_stay_channels_last(count, channels_last):
    """In another memory format, pooling and all later layers take several times as long."""
    grey = images(count)[:, :1].expand(-1, 3, -1, -1).contiguous()
    grey = grey.to(memory_format=torch.channels_last) if channels_last else grey
    found = _first_convolution(fuse_conv_bn(shaken()).conv1, grey)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_folding_does_not_change_the_network():
    network = shaken().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fuse_conv_bn(network).features(images(2))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def write_checkpoint(path, stn_mode: str, size: int = SIDE):
    model = RegAD(stn_mode, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({part: getattr(model, name).state_dict() for part, name in CHECKPOINT_PARTS.items()}, path)
    return path


@pytest.mark.parametrize("stored", STN_MODES)
def test_a_checkpoint_loads_in_its_own_mode_only(stored, tmp_path):
    named = write_checkpoint(CheckpointFiles.of(tmp_path, stored, 2, "screw").selected, stored)
    loaded = load_checkpoint(named, stored, SIDE)
    assert loaded.stn_mode == stored
    state, renamed = loaded.stn.state_dict(), tmp_path / "weights.pt"
    for asked in set(STN_MODES) - {stored}:
        with pytest.raises(UserError, match=f"named after the STN mode {stored}, not {asked}"):
            _reject_other_mode(named, state, asked)
        if {asked, stored} != {"translation", "shear"}:  # two parameters, both initially 0: cannot be distinguished
            with pytest.raises(UserError, match=str(renamed)):
                _reject_other_mode(renamed, state, asked)
    named.rename(renamed)
    with pytest.raises(UserError, match=str(renamed)):
        load_checkpoint(renamed, "affine" if stored == "rotation" else "rotation", SIDE)


def test_checkpoint_of_another_size_is_rejected(tmp_path):
    path = write_checkpoint(tmp_path / "weights.pt", "affine", 96)
    with pytest.raises(UserError, match=r"does not fit the STN mode affine at 64 pixels.*stn1\.fc\.0\.weight"):
        load_checkpoint(path, "affine", 64)


@pytest.mark.parametrize("content", [{"STN": {}}, {"model": {}}, [1, 2], {"STN": {}, "ENC": {}, "PRED": 3}])
def test_foreign_files_are_rejected(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"is not RegAD's"):
        load_checkpoint(tmp_path / "other.pt", "affine", SIDE)


def test_missing_tensors_are_named(tmp_path):
    path = write_checkpoint(tmp_path / "weights.pt", "affine")
    content = torch.load(path, weights_only=True)
    del content["ENC"]["conv3.weight"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"ENC.*conv3\.weight"):
        load_checkpoint(path, "affine", SIDE)


def test_path_of_a_checkpoint(tmp_path):
    expected = tmp_path / "affine/4/pill/pill_4_affine_model.pt"
    assert CheckpointFiles.of(tmp_path, "affine", 4, "pill").selected == expected


@needs_reference
def test_released_checkpoints_have_the_same_names():
    stored = torch.load(GOLDEN_CHECKPOINT, weights_only=True)
    model = RegAD("rotation_scale")
    for part, attribute in CHECKPOINT_PARTS.items():
        ours = {name: value.shape for name, value in getattr(model, attribute).state_dict().items()}
        assert ours == {name: value.shape for name, value in stored[part].items()}


@needs_reference
def test_file_weights_are_loaded_into_the_backbone():
    stored = torch.load(TRUNK, weights_only=True)
    state = untrained(str(TRUNK), "rotation_scale", SIDE).stn.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())


def test_without_a_connection_the_error_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"Network is unreachable.*give the file, or start from random"):
        untrained("imagenet", "affine", SIDE)


@pytest.mark.cuda
@pytest.mark.parametrize("stn_mode", ["rotation_scale", "affine"])
def test_cuda_equals_cpu(stn_mode):
    command_device("cuda")  # also switches TF32 off
    network = shaken(stn_mode)
    on_cpu = network.features(images(4))
    on_cuda = fuse_conv_bn(network.cuda()).features(images(4).cuda())
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert (a - b.cpu()).norm() / a.norm() < 1e-5


@needs_reference
def test_bf16_leaves_the_warps_in_full_precision():
    """Under autocast a head rounds its convolutions only: for equal maps, its warps are equal to 1e-4."""
    network = recipe_model("rotation_scale").stn
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(images)
            alone = [head(x) for head, x in zip((network.stn1, network.stn2, network.stn3), exact.maps, strict=True)]
        heads = [head(x) for head, x in zip((network.stn1, network.stn2, network.stn3), exact.maps, strict=True)]
    for ours, reference in zip(alone, heads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)
    for ours, reference in zip(rounded.warps, exact.warps, strict=True):  # the backbone is rounded too
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-4)


def test_bf16_keeps_the_identity_exact():
    """Autocast changes no bit of a warp: neither of the identity nor of a scale that bfloat16 would round."""
    x = torch.rand(1, 3, 56, 56)
    theta = torch.tensor([[[0.9975, 0.0, 0.0], [0.0, 0.9975, 0.0]]])
    for matrix in (torch.eye(2, 3)[None], theta):
        expected = warp(x, matrix)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(warp(x, matrix), expected)


def test_registered_frame():
    """Features without the inverse warps are the registered maps, also in the copy for scoring; the default is not."""
    network, x = shaken(), images(2)
    with torch.no_grad():
        maps = network(x).maps
    assert not torch.equal(network.features(x)[2], maps[2])
    network.registered_frame = True
    assert all(torch.equal(one, other) for one, other in zip(network.features(x), maps, strict=True))
    fused = fuse_conv_bn(network)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(fused.features(x), maps, strict=True))
