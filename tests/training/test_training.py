"""Training steps against the release's trace and the plain definition; runs, their files and what they refuse."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from benchmarks import plain
from benchmarks.reference import DATA, GOLDEN, GOLDEN_CHECKPOINT
from datasets.cache import SourceImages
from datasets.episodes import draw_episodes, read_episodes
from datasets.mvtec import list_source_images
from losses.norm_loss import registration_loss
from models.regad import CHECKPOINT_PARTS, RECIPE, RegAD, load_checkpoint
from tests.commands.test_commands import test_command
from tests.flags import small_run
from tests.reference import needs_reference
from training.loop import Trainer, learning_rate
from utils.errors import UserError
from utils.naming import CheckpointFiles
from utils.stages import StageClock

CPU = torch.device("cpu")
SIZE = 64
WITHOUT_SCORES = {"select": "last", "eval_every": 0}  # which take most of the time of a run


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The recorded trace, its episodes as `read_episodes` gives them, and the images that they name."""
    recorded = json.loads((GOLDEN / "train_trace.json").read_text())
    file = tmp_path_factory.mktemp("trace") / "episodes.json"
    file.write_text(json.dumps(recorded["episodes"]))
    sources = list_source_images(DATA, "folder", target="bottle")  # no episode is of it
    names = {category: [path.name for path in paths] for category, paths in sources.items()}
    episodes = read_episodes(file, names)
    wanted = defaultdict(set)
    for e in episodes:
        wanted[e.category] |= {*e.query, *(n for k in e.support for n in k)}
    few = {c: [path for path in sources[c] if path.name in of_category] for c, of_category in wanted.items()}
    return recorded, episodes, few


class DoubleImages(SourceImages):
    """The images in float64."""

    def episode(self, episode):
        return tuple(images.double() for images in super().episode(episode))


def golden_trainer(dtype: torch.dtype, recorded: dict) -> Trainer:
    model = load_checkpoint(GOLDEN_CHECKPOINT, recorded["stn_mode"], 224).to(dtype).train()
    return Trainer(model, recorded["lr"], recorded["momentum"])


def states(model: RegAD) -> dict[str, torch.Tensor]:
    parts = {part: getattr(model, name).state_dict() for part, name in CHECKPOINT_PARTS.items()}
    return {f"{part}.{key}": value.clone() for part, state in parts.items() for key, value in state.items()}


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("path", ["the release's memory order", "as trained"])
def test_golden_trace(path, trace, monkeypatch):
    """Losses, and the norms, sums and changes of all tensors after six steps, within bounds that hold on any processor.

    Largest differences measured in the release's memory order (NCHW, three channels for grey), on one processor with
    ATEN_CPU_CAPABILITY=default, avx2 and avx512 and with 1 and 2 threads: losses 3.2e-11; of its norm, a tensor's
    norm, change and first values 2.9e-10, and 3.5e-6 in the heads that predict the warps. Their gradient is
    discontinuous where a sampling position or a pooled maximum moves to another cell. In training's own order sums are
    rounded differently, and six steps amplify this.
    """
    recorded, episodes, sources = trace
    release_order = path != "as trained"
    images = DoubleImages(sources, 224, None, 0, CPU)
    trainer = golden_trainer(torch.float64, recorded)
    if release_order:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # all three channels
        trainer.model.to(memory_format=torch.contiguous_format)
    start, losses = states(trainer.model), []
    for episode in episodes:
        query, support = images.episode(episode)
        if release_order:
            query, support = query.contiguous(), support.contiguous()
        losses.append(trainer.step(query, support, StageClock()).item())
    assert losses == pytest.approx(recorded["losses"], abs=1e-9 if release_order else 1e-8)
    final = {name: value.double() for name, value in states(trainer.model).items()}
    assert final.keys() == recorded["final"].keys()
    bound_of_heads, bound_of_others = (1e-4, 1e-8) if release_order else (2e-2, 1e-5)
    for name, value in final.items():
        bound = bound_of_heads if ".stn" in name else bound_of_others
        expected, scale = recorded["final"][name], value.norm().item()
        assert scale == pytest.approx(expected["norm"], rel=bound), name
        spread = math.sqrt(value.numel())  # how much more than the norm a sum can move
        assert value.sum().item() == pytest.approx(expected["sum"], rel=bound, abs=bound * scale * spread), name
        change = (value - start[name].double()).norm().item()
        assert change == pytest.approx(expected["change"], rel=bound, abs=bound * scale), name
        assert value.flatten()[:3].tolist() == pytest.approx(expected["first"], rel=bound, abs=bound * scale), name


@needs_reference
def test_golden_trace_in_float32(trace):
    """Only the first loss is compared: after one update, rounding errors are too large."""
    recorded, episodes, sources = trace
    query, support = SourceImages(sources, 224, None, 0, CPU).episode(episodes[0])
    loss = golden_trainer(torch.float32, recorded).step(query, support, StageClock())
    assert loss.item() == pytest.approx(recorded["losses"][0], abs=1e-6)


def test_step_equals_the_plain_step(demo_data):
    """Loss and all weights after one update, for coloured images in float64."""
    sources = list_source_images(demo_data, "folder", "ring")
    names = {category: [path.name for path in paths] for category, paths in sources.items()}
    images = DoubleImages(sources, SIZE, None, 0, CPU)
    (episode,) = draw_episodes(names, shot=3, batch_size=8, seed=0, epoch=1)
    query, support = images.episode(episode)
    torch.manual_seed(0)
    model, twin = RegAD("affine", SIZE).double().train(), RegAD("affine", SIZE).double().train()
    with torch.no_grad():
        for head in (model.stn.stn1, model.stn.stn2, model.stn.stn3):  # away from the identity, where gradients jump
            head.fc[2].bias.add_(0.1 * torch.randn(6, dtype=torch.float64))
    twin.load_state_dict(model.state_dict())
    expected = plain.training_step(twin, plain.optimizers(twin, 0.1, 0.9), query, support)
    assert Trainer(model, 0.1, 0.9).step(query, support, StageClock()).item() == pytest.approx(expected, abs=1e-12)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-7, atol=1e-9, msg=name)


def test_loss_against_each_support_image():
    """The mean over the support images of the losses against one of them, as all have the same statistics in eval."""
    torch.manual_seed(0)
    model = RegAD("rotation_scale", SIZE).eval()
    query, support = torch.rand(3, 3, SIZE, SIZE), torch.rand(3, 2, 3, SIZE, SIZE)
    with torch.no_grad():
        single = [model(query, support[:, k : k + 1]).item() for k in range(2)]
        assert model(query, support, each=True).item() == pytest.approx(sum(single) / 2, abs=1e-6)
        assert model(query, support[:, :1], each=True).item() == single[0]
        assert model(query, support).item() != pytest.approx(sum(single) / 2, abs=1e-4)


def test_loss_by_hand():
    """Two images of one position and two channels; cosines 1 and 0 on one side, -1 and 0.6 on the other."""
    z_support = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    p_query = torch.tensor([[5.0, 0.0], [1.0, 0.0]]).view(2, 2, 1, 1)
    z_query = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(2, 2, 1, 1)
    p_support = torch.tensor([[-2.0, -2.0], [0.8, 0.6]]).view(2, 2, 1, 1)
    loss = registration_loss(p_query, z_query, p_support, z_support)
    assert loss.item() == pytest.approx(-((1 + 0) / 2 + (-1 + 0.6) / 2) / 2)


def test_gradient_stops_at_z():
    p, z = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in "pz")
    registration_loss(p, z, p, z).backward()
    assert z.grad is None and p.grad.abs().max() > 0


def test_learning_rates():
    assert learning_rate(1e-4, 50, 50) == 0 and learning_rate(1e-4, 25, 50) == pytest.approx(5e-5)
    assert learning_rate(1e-4, 1, 50) == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi / 50)))


def arguments(data: Path, folder: Path, **changes: object) -> list[str]:
    """All arguments of a run of train.py on the small synthetic data."""
    given = {"shot": 1, "epochs": 2, "batch_size": 2, "inferences": 2, "lr": 0.01}
    given |= {"cache_dir": folder / "cache", "save_dir": folder / "save"}
    return small_run(data, **given | changes)


def files(folder: Path, shot: int = 1, stn_mode: str = "rotation_scale") -> CheckpointFiles:
    return CheckpointFiles.of(folder / "save", stn_mode, shot, "ring")


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return {f"{part}.{name}": value for part in CHECKPOINT_PARTS for name, value in content[part].items()}


def assert_equal_bits(first: Path, second: Path) -> None:
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.fixture(scope="module")
def undisturbed(demo_data, tmp_path_factory) -> Path:
    """The folder of a run without interruption; other runs are compared with it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train.main(arguments(demo_data, folder))
    return folder


def test_a_run_leaves_safetensors_files_and_a_model_card(undisturbed):
    found = files(undisturbed)
    selected, source, last = found.portable
    assert not source.exists()
    for portable, file in ((selected, found.selected), (last, found.last)):
        of_both = [states(load_checkpoint(one, "rotation_scale", SIZE)) for one in (portable, file)]
        assert all(torch.equal(value, of_both[1][name]) for name, value in of_both[0].items())
    card, record = found.card.read_text(encoding="utf-8"), json.loads(found.record.read_text())
    assert re.search(r"images of: (\w+ \(\d+\), )*weave \(5\)", card) and "ring (" not in card
    assert "Licence of the data: unknown to this program" in card and f"Record: `{found.record.name}`" in card
    assert f"| torch | {record['versions']['torch']} |" in card and "| lr | 0.01 |" in card
    for name, entry in record["outcomes"].items():
        assert f"| {name} | {entry['image_auroc']['mean']:.4f}" in card
    assert "the test labels of the target" in card and found.selected.stem in card


def test_a_run_leaves_whole_records(undisturbed):
    found = files(undisturbed)
    assert not found.state.exists()
    lines = [json.loads(line) for line in found.epochs.read_text().splitlines()]
    record = json.loads(found.record.read_text())
    assert record["epochs"] == lines and [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["steps"] for line in lines] == [0, 3, 3]
    assert lines[0]["loss"] is None and -1 <= lines[1]["loss"] < 0 and lines[2]["lr"] == 0
    sums = [line["image_auroc"]["mean"] + line["pixel_auroc"]["mean"] for line in lines]
    assert record["selected_epoch"] == sums.index(max(sums))
    assert record["config"]["seed"] == 668 and record["versions"]["torch"] and record["resolved"]["held_out"] is None
    assert found.curve.read_bytes().startswith(b"\x89PNG")
    for file, epoch in ((found.selected, record["selected_epoch"]), (found.last, 2)):
        recipe = torch.load(file, weights_only=True)[RECIPE]
        assert recipe["epoch"] == epoch and recipe["config"]["obj"] == "ring"


def test_training_moves_weights_and_the_last_epoch_only_statistics(undisturbed, demo_data, tmp_path):
    """The learning rate of the last epoch is 0 (release behaviour)."""
    train.main(arguments(demo_data, tmp_path, epochs=1, **WITHOUT_SCORES))
    torch.manual_seed(668)
    start = {f"STN.{name}": value for name, value in RegAD("rotation_scale", SIZE).stn.state_dict().items()}
    one, two = weights(files(tmp_path).last), weights(files(undisturbed).last)
    for name, value in start.items():
        assert torch.equal(value, one[name]) == ("running" not in name and "num_batches" not in name), name
    assert not torch.equal(start["STN.conv1.weight"], two["STN.conv1.weight"])


@pytest.mark.parametrize("which", ["_model", "_last"])
def test_training_and_test_py_give_equal_numbers(which, undisturbed, demo_data, tmp_path):
    record = json.loads(files(undisturbed).record.read_text())
    entry = record["epochs"][record["selected_epoch"] if which == "_model" else 2]
    checkpoint = files(undisturbed).selected if which == "_model" else files(undisturbed).last
    test_command.main(small_run(demo_data, shot=1, inferences=2, checkpoint=checkpoint, output=tmp_path))
    (file,) = tmp_path.glob("*.json")
    scored = json.loads(file.read_text())
    rounds = [{key: one[key] for key in ("image_auroc", "pixel_auroc")} for one in scored["rounds"]]
    assert rounds == entry["rounds"]


def test_same_seed_same_bits(undisturbed, demo_data, tmp_path):
    """For any number of workers, with or without a cache, for any --eval_every."""
    train.main(arguments(demo_data, tmp_path, num_workers=2, cache_dir="none", eval_every=2))
    assert_equal_bits(files(undisturbed).last, files(tmp_path).last)


def test_another_seed_gives_other_weights(undisturbed, demo_data, tmp_path):
    train.main(arguments(demo_data, tmp_path, seed=1, **WITHOUT_SCORES))
    a, b = (weights(files(folder).last) for folder in (undisturbed, tmp_path))
    assert not torch.equal(a["STN.conv1.weight"], b["STN.conv1.weight"])


def test_the_second_epoch_opens_no_image(demo_data, tmp_path, monkeypatch):
    import datasets.images

    opened, original = [], datasets.images.Image.open

    def spy(path, *rest, **options):
        opened.append(path)
        return original(path, *rest, **options)

    monkeypatch.setattr(datasets.images.Image, "open", spy)
    counts = []
    original_epoch = Trainer.train_epoch
    monkeypatch.setattr(
        Trainer, "train_epoch", lambda *a, **k: (counts.append(len(opened)), original_epoch(*a, **k))[1]
    )
    train.main(arguments(demo_data, tmp_path, epochs=3, inferences=1))
    assert len(counts) == 3 and counts[0] == len(opened) == counts[2] > 10
    monkeypatch.delattr("datasets.cache.in_threads")  # another run takes all source images from the cache
    train.main(arguments(demo_data, tmp_path, save_dir=tmp_path / "other", epochs=1, **WITHOUT_SCORES))


def test_trained_modes_are_tested_with_the_published_command(demo_data, tmp_path, monkeypatch):
    stn_mode = "translation_scale"
    monkeypatch.chdir(tmp_path)
    train.main(arguments(demo_data, tmp_path, stn_mode=stn_mode, epochs=1, shot=2, save_dir="save_checkpoints"))
    test_command.main(small_run(demo_data, shot=2, stn_mode=stn_mode, inferences=2))
    assert (tmp_path / f"results/ring_2_{stn_mode}.json").is_file()


def test_tiny_data(demo_data, tmp_path):
    """A first try: two categories with three images each, one epoch."""
    for category in ("ring", "weave"):
        for source in sorted((demo_data / category / "train/good").iterdir())[:3]:
            link = tmp_path / "data" / category / "train/good" / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
        (tmp_path / "data" / category / "test").symlink_to(demo_data / category / "test")
        (tmp_path / "data" / category / "ground_truth").symlink_to(demo_data / category / "ground_truth")
    more = ["--tensorboard"] if find_spec("tensorboard") else []
    train.main([*arguments(tmp_path / "data", tmp_path, epochs=1, batch_size=32, shot=2), *more])
    found = files(tmp_path, shot=2)
    assert found.record.is_file() and len(list(found.events.glob("events.out.*"))) == len(more)


def test_resume_after_the_end_changes_nothing(undisturbed, demo_data, capsys):
    before = files(undisturbed).last.stat().st_mtime_ns
    train.main([*arguments(demo_data, undisturbed), "--resume"])
    assert "already finished" in capsys.readouterr().out
    assert files(undisturbed).last.stat().st_mtime_ns == before


def interrupt_in_step(monkeypatch, number: int) -> None:
    """Raises KeyboardInterrupt in step `number` of the run."""
    original, steps = Trainer.step, []

    def step(self, *rest):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        return original(self, *rest)

    monkeypatch.setattr(Trainer, "step", step)


def test_an_unfinished_run_is_not_overwritten(demo_data, tmp_path, monkeypatch):
    interrupt_in_step(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(demo_data, tmp_path, **WITHOUT_SCORES))
    with pytest.raises(UserError, match=r"unfinished run; resume it, or start a new run in its place"):
        train.main(arguments(demo_data, tmp_path, **WITHOUT_SCORES))
    with pytest.raises(UserError, match=r"lr 0\.01, now 0\.5; restore them"):
        train.main([*arguments(demo_data, tmp_path, lr=0.5, **WITHOUT_SCORES), "--resume"])
    monkeypatch.undo()
    train.main([*arguments(demo_data, tmp_path, epochs=1, lr=0.5, **WITHOUT_SCORES), "--overwrite"])
    assert len(json.loads(files(tmp_path).record.read_text())["epochs"]) == 2 and not files(tmp_path).state.exists()


@pytest.mark.parametrize("lost", [[], ["record"], ["record", "selected"]])
def test_a_finished_run_is_not_overwritten(lost, undisturbed, demo_data, tmp_path):
    """Neither by a plain call nor, where its record was lost, by --resume."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    found = files(tmp_path)
    for name in lost:
        getattr(found, name).unlink()
    before = {file.name: file.read_bytes() for file in found.state.parent.iterdir()}
    for flags in ([], ["--resume"] if lost else []):
        with pytest.raises(
            UserError, match=r"belongs to an earlier run; start a new run in its place, or give another folder"
        ):
            train.main([*arguments(demo_data, tmp_path), *flags])
    assert {file.name: file.read_bytes() for file in found.state.parent.iterdir()} == before


def test_resume_and_overwrite_exclude_each_other(demo_data, tmp_path):
    with pytest.raises(UserError, match="--resume and --overwrite exclude each other"):
        train.main([*arguments(demo_data, tmp_path), "--resume", "--overwrite"])


def test_weights_of_others_are_not_overwritten(demo_data, tmp_path):
    target = files(tmp_path).selected
    target.parent.mkdir(parents=True)
    torch.save({"STN": {}, "ENC": {}, "PRED": {}}, target)
    before = target.read_bytes()
    for flags in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(UserError, match=r"was not written by train\.py"):
            train.main([*arguments(demo_data, tmp_path), *flags])
    assert target.read_bytes() == before


def test_a_loss_that_is_not_finite_names_its_episode(demo_data, tmp_path, monkeypatch):
    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *rest: original(self, *rest) * math.nan)
    with pytest.raises(UserError, match=r"loss is nan in epoch 1, step 0: category weave, queries \d+\.png") as caught:
        train.main(arguments(demo_data, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("lr", "changes"), [
    (1e9, {}), (1e38, {}), (1e20, {"batch_size": 8}), (1e38, {"batch_size": 8, "eval_every": 0, "select": "last"}),
])  # fmt: skip
def test_a_diverged_training_names_loss_epoch_and_step(lr, changes, demo_data, tmp_path):
    """Whether the loss or the scores show it first; batches of 8 make one step per epoch."""
    with pytest.raises(UserError, match=r"loss (is|was) \S+ in epoch [12], step \d.*a learning rate below") as caught:
        train.main(arguments(demo_data, tmp_path, lr=lr, **changes))
    assert "\n" not in str(caught.value) and "checkpoint" not in str(caught.value)


MISTAKES = {
    "too small": ({"img_size": 48}, r"the image size must be a multiple of 16 from 64 on, got 48"),
    "no epochs": ({"epochs": 0}, r"--epochs must be at least 1"),
    "negative rate": ({"lr": -1}, r"--lr must be at least 0"),
    "infinite rate": ({"lr": "inf"}, r"--lr must be a finite number"),
    "best without scores": ({"eval_every": 0}, r"--select best needs scores"),
    "no weights file": ({"weights": "/nowhere.pth"}, r"no weights file /nowhere\.pth"),
    "no data": ({"data_path": "/nowhere"}, r"no category to train on in /nowhere|no data folder /nowhere"),
    "no such category": ({"obj": "bolt"}, r"no category folder .*bolt"),
    "no support set": ({"support_path": "/nowhere"}, r"no support set /nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence_before_anything_is_written(mistake, demo_data, tmp_path):
    change, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence) as caught:
        train.main(arguments(demo_data, tmp_path, **change))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pt"))


def test_a_category_with_a_single_image_is_rejected(demo_data, tmp_path):
    lonely = tmp_path / "data" / "lonely" / "train" / "good"
    lonely.mkdir(parents=True)
    os.symlink(next((demo_data / "ring/train/good").iterdir()), lonely / "000.png")
    (tmp_path / "data" / "ring").symlink_to(demo_data / "ring")
    with pytest.raises(UserError, match=r"lonely/train/good has one image; training needs at least two"):
        train.main(arguments(tmp_path / "data", tmp_path))


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_for_training_steps_only(enabled, monkeypatch):
    """Within a step TF32 is as asked, afterwards as before: epochs are scored as test.py scores them."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    seen, before = [], [of_library.allow_tf32 for of_library in settings]  # matrix products: never, warps need them
    model = RegAD("affine", 64)
    trainer = Trainer(model, 0.01, 0.9, tf32=enabled)
    trainer.loss = lambda *inputs: seen.append([one.allow_tf32 for one in settings]) or model(*inputs)
    images = torch.rand(2, 3, 64, 64)
    trainer.step(images, images[:, None], StageClock())
    assert seen == [[enabled, before[1]]] and [of_library.allow_tf32 for of_library in settings] == before
