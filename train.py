"""Meta-trains the registration network on all categories except the target.

python train.py --obj bottle --shot 2 --stn_mode rotation_scale
python train.py --obj bottle --shot 2 --select source       select the epoch without using bottle
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from datasets.cache import SourceImages, default_cache_dir
from datasets.check import list_test_items_with_notes, print_notes, unread_images
from datasets.episodes import Episode, draw_episodes, read_episodes
from datasets.images import limit_pixels, resolve_bits
from datasets.mvtec import (
    CATEGORIES,
    LabelledDataset,
    category_folder,
    held_out_category,
    list_source_images,
    normal_images,
)
from datasets.support import find_support_rounds
from evaluation.scoring import NotFinite, score_category
from evaluation.statistics import format_summary, summaries
from models.networks import resolve_img_size
from models.regad import save_checkpoint, untrained
from models.stn import BACKBONES, STN_MODES
from scorers.base import Scorer
from scorers.registry import add_scorer_flag, make_scorers
from training.curve import save_curve
from training.identity import identified, require_same
from training.loop import Trainer, learning_rate
from training.records import Earlier, RunFiles, earlier_run, is_selected, outcomes, remove_leftovers, save_history
from utils import flags
from utils.devices import command_device, seed_everything
from utils.errors import UserError, require_positive, run_command
from utils.files import digest, require_writable, save_tensors, write_json
from utils.records import plain_arguments, provenance
from utils.stages import StageClock

MIN_IMG_SIZE = 64  # smaller images leave the batch norm of the last warp head one value per channel
# Arguments that affect the weights or the selected epoch. A run is resumed only with the same values, and with the same
# images: see `_decisive` and training/identity.py.
DECISIVE = (
    *("obj", "shot", "stn_mode", "data_type", "img_size", "episodes", "weights", "epochs", "batch_size", "lr"),
    *("keep_aspect", "momentum", "seed", "inferences", "eval_every", "select", "amp", "tf32"),
    *("scorer", "backbone", "bits", "compile"),
)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of train.py: the flags of the release and those of this project."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("data")
    what.add_argument(
        "--obj",
        type=flags.category_name,
        required=True,
        metavar="CATEGORY",
        help="target category: excluded from training, scored",
    )
    flags.add_data_flags(what, CATEGORIES)
    flags.add_source_flags(what)
    what.add_argument("--shot", type=int, default=2, metavar="K", help="support images per query")
    what.add_argument(
        "--episodes", type=Path, metavar="FILE", help="use these episodes in every epoch (datasets/episodes.py)"
    )
    flags.add_image_flags(parser.add_argument_group("images"))
    how = parser.add_argument_group("training")
    flags.add_network_flags(how, STN_MODES, list(BACKBONES), timm=False)
    flags.add_weights_flag(how, "initial backbone weights")
    how.add_argument("--epochs", type=int, default=50)
    how.add_argument("--batch_size", type=int, default=32, help="queries per step")
    how.add_argument("--lr", type=float, default=0.0001, help="learning rate, decays to 0 with a half cosine")
    how.add_argument("--momentum", type=float, default=0.9)
    flags.add_seed_flag(how)
    score = parser.add_argument_group("scoring and selection of the epoch")
    flags.add_support_flags(score)
    add_scorer_flag(score, several=True)
    score.add_argument("--eval_every", type=int, default=1, metavar="EPOCHS", help="0: never (needs --select last)")
    score.add_argument(
        "--select",
        choices=("best", "last", "source"),
        default="best",
        help="best: by the target's test labels; source: by a held-out source category, without the target",
    )
    score.add_argument(
        "--held_out",
        type=flags.category_name,
        metavar="CATEGORY",
        help="for --select source; default: the next category after the target by name",
    )
    run = parser.add_argument_group("run")
    flags.add_device_flag(run)
    flags.add_workers_flag(run)
    run.add_argument("--cache_dir", default=str(default_cache_dir()), help="cache of decoded images; none: in memory")
    run.add_argument("--save_dir", type=Path, default=flags.DEFAULT_SAVE_DIR, help="folder of the checkpoints")
    begin = run.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="resume an interrupted run, or start a new one")
    begin.add_argument("--overwrite", action="store_true", help="start a new run in place of an earlier one")
    run.add_argument(
        "--save_every", type=float, default=300, metavar="SECONDS", help="interval for saving the state to resume from"
    )
    run.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: bfloat16 (CUDA), changes results")
    run.add_argument("--tf32", action="store_true", help="TF32 (CUDA): faster, changes results")
    run.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Checks all inputs, then trains, scores and saves epoch by epoch."""
    args = get_args_parser().parse_args(argv)
    _check(args)
    limit_pixels(args.max_pixels)
    device = command_device(args.device)
    files = RunFiles.of(args.save_dir, args.stn_mode, args.shot, args.obj, args.backbone)
    sources = list_source_images(args.data_path, args.data_type, args.obj, args.sources, args.source_path)
    scored = _hold_out(args, sources) if args.select == "source" else args.obj
    asked_bits, training = args.bits, [path for paths in sources.values() for path in paths]
    args.bits = resolve_bits(asked_bits, training, "the categories to train on")
    names = {category: [path.name for path in paths] for category, paths in sources.items()}
    decisive = _decisive(args, names)
    earlier = earlier_run(files, args.resume, args.overwrite)
    if earlier:
        require_same(earlier.file, earlier.decisive, decisive)  # before minutes of decoding
    replayed = read_episodes(args.episodes, names) if args.episodes else None
    target = _load_target(args, scored, asked_bits) if args.eval_every else None
    seed_everything(args.seed)  # after all other uses of random numbers: epoch 0 equals test.py --untrained
    trainer = _make_trainer(args, device, new=earlier is None)
    images = _read_sources(args, sources, device)
    decisive |= {"images": images.digest(), "scored": target.digest() if target else None}
    if earlier:
        require_same(earlier.file, earlier.decisive, decisive)
        if earlier.finished:
            history, selected = (earlier.content[key] for key in ("epochs", "selected_epoch"))
            print(f"already finished: {files.record}\n{_format_outcomes(history, selected)}")
            return
        _resume(files, trainer, earlier, scored)
    elif args.resume:
        print(f"nothing to resume at {files.state}: a new run")
    _announce(args, names, scored)
    run = {"arguments": plain_arguments(args), "scored_bits": target and target.bits, **provenance(device)}
    save = partial(trainer.save, files.state, decisive)
    for entry, selected in _epochs(trainer, args, names, replayed, images, save, target):
        trainer.finish_epoch(entry, selected, {**run, **entry})
        save()  # from here on the epoch counts; the other files follow
        _publish(files, trainer, scored, selected)
        print(_format_entry(entry, args.epochs, selected), flush=True)
    _finish(files, trainer, run, decisive)


def _decisive(args: argparse.Namespace, names: dict[str, list[str]]) -> dict:
    """What identifies the run, as far as it is known before images are read."""
    plain = plain_arguments(args)
    decisive = identified({name: plain[name] for name in DECISIVE})
    return decisive | {"sources": sorted(names), "pictures": digest(names)}


def _announce(args: argparse.Namespace, names: dict[str, list[str]], scored: str) -> None:
    where = f" of {args.source_path}" if args.source_path else ""
    print(f"training on {len(names)} categories{where}, {sum(map(len, names.values()))} images; target {args.obj}")
    if args.select == "best":
        print("note: --select best selects the epoch by the target's test labels, as in the published protocol")
    if args.select == "source":
        print(f"the epoch is selected by {scored}, which is excluded from training; score {args.obj} with test.py")


def _epochs(
    trainer: Trainer,
    args: argparse.Namespace,
    names: dict[str, list[str]],
    replayed: list[Episode] | None,
    images: SourceImages,
    save: Callable[[], None],
    target: Target | None,
) -> Iterator[tuple[dict, bool]]:
    """Trains and scores the remaining epochs. Yields the entry of each, and whether its weights are selected."""
    started = time.perf_counter()
    while (epoch := trainer.progress.epoch) <= args.epochs:
        clock = StageClock()  # on CUDA, host time only: synchronisation would slow down training
        episodes: list[Episode] = []
        if epoch:
            episodes = replayed or draw_episodes(names, args.shot, args.batch_size, args.seed, epoch)
            trainer.train_epoch(episodes, images, args.epochs, clock, save, args.save_every)
        entry = _entry(trainer, args, episodes, clock)
        if target and (epoch % args.eval_every == 0 or epoch == args.epochs):
            entry |= _score(trainer, target)
        entry["elapsed_seconds"] = time.perf_counter() - started  # includes saving the previous epoch
        started = time.perf_counter()
        yield entry, is_selected(entry, trainer.progress.history, trainer.progress.selected, args.select)


class Target(NamedTuple):
    """The category to score, with decoded images: the target, or with --select source the held-out category."""

    dataset: LabelledDataset
    labels: list[int]
    rounds: list[torch.Tensor]
    scorers: list[Scorer]
    bits: int  # depth of its 16-bit images

    def digest(self) -> str:
        """SHA-256 of the decoded images and masks, the labels and the support images, in hexadecimal."""
        content = hashlib.sha256(str(self.labels).encode())
        for item in self.dataset:
            for name in sorted(item):
                content.update(item[name].numpy())
        for images in self.rounds:
            content.update(images.contiguous().numpy())
        return content.hexdigest()


def _check(args: argparse.Namespace) -> None:
    for file in RunFiles.of(args.save_dir, args.stn_mode, args.shot, args.obj, args.backbone):
        require_writable(file, "--save_dir")
    if args.cache_dir != "none":
        require_writable(Path(args.cache_dir), "--cache_dir", folder=True)
    require_positive(args, "shot", "epochs", "batch_size", "inferences", "img_size", "max_pixels")
    if args.backbone not in BACKBONES:
        raise UserError(f"--backbone {args.backbone} cannot be trained; choose from {', '.join(BACKBONES)}")
    args.img_size = resolve_img_size(args.backbone, args.img_size, MIN_IMG_SIZE)
    for name in ("num_workers", "eval_every", "save_every", "lr", "momentum"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must not be negative or infinite, got {getattr(args, name)}")
    if args.select != "last" and not args.eval_every:
        raise UserError(f"--select {args.select} needs scores; give --select last with --eval_every 0")
    if args.held_out and args.select != "source":
        raise UserError("--held_out is for --select source")


def _hold_out(args: argparse.Namespace, sources: dict[str, list[Path]]) -> str:
    """Removes the category that selects the epoch from the sources, and stores it in `args.held_out`."""
    if len(sources) < 2:
        raise UserError(f"--select source needs two source categories, one is held out; found {', '.join(sources)}")
    args.held_out = args.held_out or held_out_category(sources, args.obj)
    if args.held_out not in sources:
        raise UserError(f"--held_out {args.held_out} is no source category; they are {', '.join(sources)}")
    del sources[args.held_out]
    return args.held_out


def _read_sources(args: argparse.Namespace, sources: dict[str, list[Path]], device: torch.device) -> SourceImages:
    root = args.source_path or args.data_path
    print_notes(note for name in sources for note in unread_images(root / name))
    return SourceImages(
        *(sources, args.img_size, None if args.cache_dir == "none" else Path(args.cache_dir), args.num_workers, device),
        keep_aspect=args.keep_aspect,
        bits=args.bits,
    )


def _load_target(args: argparse.Namespace, category: str, asked_bits: int | str) -> Target:
    """Reads the category as test.py does, with a bit depth of its own where --bits is auto."""
    if args.select == "source" and args.source_path:
        folder = category_folder(args.source_path, "folder", category)
    else:
        folder = category_folder(args.data_path, args.data_type, category)
    items = list_test_items_with_notes(folder, args.strict)
    bits = resolve_bits(asked_bits, normal_images(folder), f"{category}/train")
    support = find_support_rounds(
        args.support_path, folder, args.shot, args.inferences, args.img_size, args.keep_aspect, bits
    )
    print(f"support: {support.source}")
    dataset = LabelledDataset(items, args.img_size, args.keep_aspect, bits)
    dataset.load(args.num_workers)
    print_notes(dataset.notes())
    return Target(dataset, [item.label for item in items], support.images, make_scorers(args.scorer), bits)


def _make_trainer(args: argparse.Namespace, device: torch.device, new: bool) -> Trainer:
    """The networks before training. Unless the run is `new`, their weights are going to be replaced."""
    model = untrained(args.weights if new else "none", args.stn_mode, args.img_size, args.backbone).to(device)
    return Trainer(model, args.lr, args.momentum, bf16=args.amp == "bf16", tf32=args.tf32, compiled=args.compile)


def _resume(files: RunFiles, trainer: Trainer, earlier: Earlier, scored: str) -> None:
    """Continues from the state of the earlier run, and brings its other files back to what the state says."""
    trainer.restore(earlier.content)
    _publish(files, trainer, scored, new_weights=True)
    print(f"resumed at epoch {trainer.progress.epoch}, step {trainer.progress.step}: {files.state}")


def _publish(files: RunFiles, trainer: Trainer, scored: str, new_weights: bool) -> None:
    """Makes the files beside the state from what the state holds. Those of a run that this one replaces are removed.

    new_weights: the selected weights are not those in their file.
    """
    for file in (files.record, files.last):  # written when the run is finished
        file.unlink(missing_ok=True)
    if new_weights:
        save_tensors(files.selected, trainer.selected)
    save_history(files, trainer.progress.history)
    save_curve(files.curve, trainer.progress.history, scored)


def _entry(trainer: Trainer, args: argparse.Namespace, episodes: Sequence[Episode], clock: StageClock) -> dict:
    """The record entry of an epoch after training, without scores."""
    progress = trainer.progress
    if not progress.epoch:
        return {"epoch": 0, "loss": None, "lr": None, "steps": 0, "seconds": {}}
    return {
        "epoch": progress.epoch,
        "loss": sum(progress.losses) / len(progress.losses),
        "lr": learning_rate(args.lr, progress.epoch, args.epochs),
        "steps": len(episodes),
        "seconds": clock.seconds,
    }


def _score(trainer: Trainer, target: Target) -> dict:
    """Scores the target with the current weights: metrics of the first scorer, and of every scorer if several.

    Raises:
        UserError: a score is not finite; after training, the message names the loss.
    """
    clock = StageClock(trainer.device)
    try:
        scored = list(
            score_category(trainer.model.stn, target.scorers, target.dataset, target.labels, target.rounds, clock)
        )
    except NotFinite as error:
        if not trainer.progress.epoch:  # the weights that were given
            raise
        raise trainer.diverged(f"scores are not finite; {trainer.last_loss()}") from error
    by_scorer = {}
    for scorer in target.scorers:
        rounds = [results[scorer.name].numbers for results in scored]
        by_scorer[scorer.name] = {**summaries(rounds), "rounds": rounds}
    entry = {**next(iter(by_scorer.values())), "scoring_seconds": clock.seconds}
    return entry if len(by_scorer) == 1 else entry | {"scorers": by_scorer}


def _format_entry(entry: dict, epochs: int, is_selected: bool) -> str:
    text = f"epoch {entry['epoch']}/{epochs}: "
    text += (
        "untrained" if entry["loss"] is None else f"loss {entry['loss']:.4f}, {sum(entry['seconds'].values()):.0f} s"
    )
    if entry.get("image_auroc"):
        text += f"; image AUROC {format_summary(entry['image_auroc'])}, pixel {format_summary(entry['pixel_auroc'])}"
        text += f" ({sum(entry['scoring_seconds'].values()):.0f} s)"
    return text + (" *" if is_selected else "")


def _format_outcomes(history: Sequence[dict], selected: int) -> str:
    """Formats the metrics of the untrained, selected and last weights as a table."""
    lines = [f"{'weights':22}{'image AUROC':20}pixel AUROC"]
    for name, entry in outcomes(history, selected).items():
        image, pixel = format_summary(entry["image_auroc"]), format_summary(entry["pixel_auroc"])
        lines.append(f"{name:22}{image:20}{pixel}")
    return "\n".join(lines) if len(lines) > 1 else "no epoch was scored (--eval_every 0)"


def _finish(files: RunFiles, trainer: Trainer, run: dict, decisive: dict) -> None:
    """Writes the last weights and the record, removes the state, and prints the results."""
    history, selected = trainer.progress.history, trainer.progress.selected
    save_checkpoint(files.last, trainer.model, {**run, **history[-1]})
    record = {
        **run,
        "decisive": decisive,
        "selected_epoch": selected,
        "outcomes": outcomes(history, selected),
        "epochs": history,
    }
    write_json(files.record, record)
    remove_leftovers(files)
    files.state.unlink()
    print(f"\n{_format_outcomes(history, selected)}\nweights: {files.selected}\nrecord: {files.record}")


if __name__ == "__main__":
    run_command(main)
