"""Support sets: the draw, the file, and files that are rejected."""

from __future__ import annotations

import os
import pickle
import re
import shlex
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch

import make_support
from benchmarks.reference import DATA, GOLDEN, golden_rounds
from datasets.manifest import draw_manifest
from datasets.support import (
    load_support_rounds,
    read_support_images,
    support_file,
)
from tests.flags import words
from tests.reference import needs_reference
from utils.errors import UserError
from utils.files import save_tensors

SHOT, ROUNDS, SIZE = 2, 3, 16
NAMES = [f"{number:03d}.png" for number in range(100)]


def right_rounds() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.rand(SHOT, 3, SIZE, SIZE, generator=generator) for _ in range(ROUNDS)]
    rounds[0][0, 0, 0, :2] = torch.tensor([0.0, 1.0])  # both ends are allowed
    return rounds


def with_value(value: float) -> list[torch.Tensor]:
    rounds = right_rounds()
    rounds[1][1, 2, 3, 4] = value
    return rounds


@pytest.fixture
def file(tmp_path) -> Path:
    """The path of the support set under test; its folder exists."""
    path = support_file(tmp_path / "support set", "screw", SHOT, ROUNDS)
    path.parent.mkdir(parents=True)
    return path


def load(path: Path) -> list[torch.Tensor]:
    return load_support_rounds(path, SHOT, ROUNDS, SIZE)


def test_path_equals_the_release():
    assert support_file(Path("support_set"), "metal_nut", 4, 10) == Path("support_set/metal_nut/4_10.pt")


def test_saved_rounds_come_back(tmp_path):
    path = support_file(tmp_path / "new folder", "screw", SHOT, ROUNDS)
    save_tensors(path, right_rounds())
    assert list(path.parent.iterdir()) == [path]
    for found, saved in zip(load(path), right_rounds(), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, saved)


LAYOUTS = {
    "channels last": lambda images: images.to(memory_format=torch.channels_last),
    "permuted": lambda images: images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "sliced": lambda images: torch.stack([images, images * 0], dim=-1)[..., 0],
    "with a gradient": lambda images: images.clone().requires_grad_(),
    "a parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_is_read(layout, file):
    rounds = [LAYOUTS[layout](images) for images in right_rounds()]
    assert not all(images.is_contiguous() and not images.requires_grad for images in rounds)
    torch.save(rounds, file)
    for found, saved in zip(load(file), right_rounds(), strict=True):
        assert found.is_contiguous() and not found.requires_grad and torch.equal(found, saved)
        found.view(-1).numpy()


WRONG = {
    "a tensor": (lambda: torch.stack(right_rounds()), "is not a list of tensors, one per round"),
    "a dict": (lambda: dict(enumerate(right_rounds())), "is not a list of tensors, one per round"),
    "without values": (
        lambda: [images.to("meta") for images in right_rounds()],
        "is not a list of tensors, one per round",
    ),
    "one round is no tensor": (lambda: [*right_rounds()[:2], None], "is not a list of tensors, one per round"),
    "fewer rounds": (lambda: right_rounds()[:2], "has 2 rounds, not 3"),
    "no rounds": (list, "has 0 rounds, not 3"),
    "fewer images": (lambda: [r[:1] for r in right_rounds()], r"round 0 has shape \(1, 3, 16, 16\) instead of"),
    "another size": (
        lambda: [r[..., :8, :8] for r in right_rounds()],
        r"shape \(2, 3, 8, 8\) instead of",
    ),
    "not square": (lambda: [r[..., :8] for r in right_rounds()], r"round 0 has shape \(2, 3, 16, 8\)"),
    "grey": (lambda: [r[:, :1] for r in right_rounds()], r"round 0 has shape \(2, 1, 16, 16\)"),
    "channels last": (lambda: [r.permute(0, 2, 3, 1) for r in right_rounds()], r"shape \(2, 16, 16, 3\)"),
    "above 1": (lambda: with_value(1.001), "round 1 does not consist of floats between 0 and 1"),
    "below 0": (lambda: with_value(-0.001), "round 1 does not consist of floats between 0 and 1"),
    "NaN": (lambda: with_value(torch.nan), "round 1 does not consist of floats between 0 and 1"),
    "bytes": (lambda: [(255 * r).byte() for r in right_rounds()], "round 0 does not consist of floats"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_rejected(case, file):
    content, sentence = WRONG[case]
    torch.save(content(), file)
    with pytest.raises(UserError, match=sentence) as caught:
        load(file)
    assert str(caught.value).startswith(f"support set {file}")


DAMAGES = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "saved web page": lambda whole: b"<!DOCTYPE html>\n<html><head><title>Google Drive</title></head></html>\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_rejected(damage, file):
    torch.save(right_rounds(), file)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(UserError, match=re.escape(f"support set {file} cannot be read as a torch file")) as caught:
        load(file)
    assert "\n" not in str(caught.value)


class Payload:
    """An object that runs a shell command when it is unpickled without protection."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.witness))}",)


def save_pickled(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_pickled])
def test_pickles_that_run_code_are_rejected_and_not_run(save, file, tmp_path):
    witness = tmp_path / "executed"
    save([*right_rounds()[:2], Payload(witness)], file)
    with pytest.raises(UserError, match=re.escape(str(file)) + ".*could run code"):
        load(file)
    assert not witness.exists()
    os.system(Payload(witness).__reduce__()[1][0])
    assert witness.exists()  # the payload works


def test_missing_file_names_the_command_that_makes_it(demo_data, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "screw").symlink_to(demo_data / "ring")
    path = support_file(tmp_path / "support set", "screw", SHOT, ROUNDS)
    with pytest.raises(UserError, match=re.escape(f"no support set {path}; create it with: ")) as caught:
        load(path)
    python, command, *arguments = shlex.split(
        str(caught.value).split("create it with: ")[1].replace("<data folder>", "data")
    )
    assert (python, command, arguments[-2:]) == ("python", "make_support.py", ["--data_path", "data"])
    make_support.main([*arguments[:-1], str(tmp_path / "data")])
    assert len(load(path)) == ROUNDS


def test_every_image_has_the_same_probability():
    """2000 draws of 2 out of 10: each 400 times, standard deviation 18."""
    counts = Counter(chain(*draw_manifest("screw", NAMES[:10], 2, 2000, 0).rounds))
    assert len(counts) == 10 and all(320 < count < 480 for count in counts.values())


def test_draw_of_fixed_names():
    """Computed with `printf 0/screw/1/000.png | sha256sum` of each name, sorted. Published draws depend on it."""
    assert draw_manifest("screw", NAMES, 4, 2, 0).rounds[1] == ["093.png", "094.png", "044.png", "079.png"]


def make(demo_data: Path, support_path: Path, flags: str) -> None:
    given = {"data_type": "folder", "rounds": ROUNDS, "img_size": SIZE}
    make_support.main([*words(data_path=demo_data, support_path=support_path, **given), *flags.split()])


def test_command_writes_what_it_prints(demo_data, tmp_path, capsys):
    make(demo_data, tmp_path, "--obj ring weave --shots 1 2")
    printed = capsys.readouterr().out.splitlines()
    for category, shot in (("ring", 1), ("ring", 2), ("weave", 1), ("weave", 2)):
        path = support_file(tmp_path, category, shot, ROUNDS)
        assert printed.pop(0) == f"wrote {path}"
        for number, saved in enumerate(load_support_rounds(path, shot, ROUNDS, SIZE)):
            names = printed.pop(0).removeprefix(f"  round {number}: ").split()
            images = [demo_data / category / "train/good" / name for name in names]
            assert torch.equal(saved, read_support_images(images, SIZE))
    assert not printed
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted([f"{shot}_{ROUNDS}.{ending}" for shot in (1, 2) for ending in ("pt", "json")] * 2)


@pytest.mark.parametrize("flags", ["--shots 0", "--shots 2 -1", "--rounds 0", "--rounds -1", "--img_size 0"])
def test_command_rejects_numbers_below_1(demo_data, tmp_path, flags):
    flag, number = flags.split()[0], flags.split()[-1]
    with pytest.raises(UserError, match=f"{flag} must be at least 1, got {number}"):
        make(demo_data, tmp_path / "support", f"--obj ring {flags}")
    assert not (tmp_path / "support").exists()


def test_decode_images(demo_data):
    """Channels first, value / 255 exactly."""
    paths = sorted((demo_data / "ring/train/good").iterdir())[:3]
    images = read_support_images(paths, SIZE)
    assert images.shape == (3, 3, SIZE, SIZE) and images.dtype == torch.float32 and images.is_contiguous()
    levels = torch.arange(256).float() / 255
    assert torch.isin(images, levels).all() and len(images.unique()) > 50


@needs_reference
@pytest.mark.parametrize("shot", ["2", "4", "8"])
def test_support_sets_equal_the_release_bit_for_bit(shot):
    recorded = golden_rounds()[shot]
    path = support_file(GOLDEN / "support_set", "screw", int(shot), len(recorded))
    for saved, one in zip(load_support_rounds(path, int(shot), len(recorded), 224), recorded, strict=True):
        assert torch.equal(read_support_images([DATA / "screw/train/good" / n for n in one["support"]], 224), saved)
