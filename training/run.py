"""Implements train.py: trains, scores and saves epoch by epoch. A run can be killed and resumed at any point."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from datasets.cache import SourceImages
from datasets.check import list_test_items_with_notes, print_notes, report_content
from datasets.episodes import Episode, draw_episodes, read_episodes
from datasets.images import limit_pixels, resolve_bits
from datasets.layouts import layout_of, short_name
from datasets.mvtec import (
    LabelledDataset,
    LabelledImage,
    category_folder,
    held_out_category,
    list_source_images,
    list_test_items,
    normal_images,
)
from datasets.support import SupportRounds, find_support_rounds
from evaluation.run import digest_items, digest_scorer, digest_support, digest_weights
from evaluation.scoring import NotFinite, score_category
from evaluation.statistics import format_summary, summaries
from models.networks import network_name, resolve_img_size
from models.regad import checkpoint, save_portable, untrained
from scorers.base import Scorer
from scorers.registry import make_scorers
from training.card import model_card
from training.config import TrainingConfig
from training.curve import Events, save_curve
from training.loop import Trainer, learning_rate
from training.state import earlier_run, is_selected, outcomes, remove_leftovers, save_history
from utils.devices import command_device, reader_threads, seed_everything
from utils.errors import UserError, format_elapsed, require_packages
from utils.files import locked, require_writable, save_tensors, whole_file, write_json
from utils.fingerprint import FileDigests, fingerprint
from utils.naming import CheckpointFiles
from utils.records import provenance
from utils.stages import StageClock

MIN_IMG_SIZE = 64  # with smaller images, the batch norm of the last warp head has one value per channel
CURVE_SECONDS = 60.0  # the curve is drawn at most this often, and at the end


class Target(NamedTuple):
    """A category to score: the target, or a held-out source category. bits: bit depth of its 16-bit images."""

    category: str
    folder: Path
    items: list[LabelledImage]
    bits: int
    support: SupportRounds


class Inputs(NamedTuple):
    """The inputs of a run.

    sources: training images by category. scored: the categories whose AUROCs select the epoch, which are the target or,
    with --select source, the held-out categories; empty with --eval_every 0. further: held-out categories that select
    further weights. resolved: values that follow from data and backbone. fingerprint: see utils/fingerprint.py.
    """

    sources: dict[str, list[Path]]
    scored: list[Target]
    further: list[Target]
    resolved: dict
    fingerprint: dict

    @property
    def scored_names(self) -> str:
        """The names of the categories in `scored`, as text."""
        return ", ".join(target.category for target in self.scored) or "no category"

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of the training images by category."""
        return {category: [short_name(path) for path in paths] for category, paths in self.sources.items()}


def checkpoint_files(config: TrainingConfig) -> CheckpointFiles:
    """The files that a run writes."""
    network = network_name(config.backbone, config.stn_mode)
    return CheckpointFiles.of(config.save_dir, network, config.shot, config.obj)


def read_inputs(config: TrainingConfig, check: bool = False, digests: FileDigests | None = None) -> Inputs:
    """Lists all inputs of a run, and computes its fingerprint. Trains nothing.

    check: also read the headers of the images to score, and print notes on the data.

    Raises:
        UserError: data or a support set cannot be used.
    """
    digests = digests or FileDigests()
    sources = list_source_images(config.data_path, config.data_type, config.obj, config.sources, config.source_path)
    held_out = _held_out(config, sources)
    sources = {name: paths for name, paths in sources.items() if name not in held_out}
    images = [path for paths in sources.values() for path in paths]
    resolved = {
        "bits": resolve_bits(config.bits, images, "the categories to train on"),
        "img_size": resolve_img_size(config.backbone, config.img_size, MIN_IMG_SIZE),
        "held_out": (held_out[0] if len(held_out) == 1 else held_out) if held_out else None,
    }
    target = partial(_target, config, img_size=resolved["img_size"], check=check)
    root, data_type = (config.source_path, "folder") if config.source_path else (config.data_path, config.data_type)
    scored, further = [target(name, root, data_type) for name in held_out], []
    if config.select != "source" and config.eval_every:
        scored, further = [target(config.obj, config.data_path, config.data_type)], scored
    inputs = {
        "sources": {name: digests.together(paths) for name, paths in sources.items()},
        "weights": digest_weights(config.weights, config.seed, digests),
        "episodes": digests.of([config.episodes])[0] if config.episodes else None,
        "scorers": [digest_scorer(spec, digests) for spec in config.scorer] if scored else [],
    }
    targets = [*scored, *further]
    digested = [[each.bits, digest_items(each.items, digests), digest_support(each.support)] for each in targets]
    if targets:
        resolved["scored_bits"], inputs["test_images"], inputs["support_images"] = digested[0]
    if targets[1:]:
        inputs["further_scored"] = {
            each.category: digest for each, digest in zip(targets[1:], digested[1:], strict=True)
        }
    settings = config.results_part() | resolved | {"seed": config.seed}
    return Inputs(sources, scored, further, resolved, fingerprint(settings, inputs))


def _held_out(config: TrainingConfig, sources: dict[str, list[Path]]) -> list[str]:
    """The categories that select an epoch and are excluded from training; empty if the epoch is selected otherwise."""
    if config.select != "source" and not config.held_out:
        return []
    if len(sources) < 2:
        raise UserError(
            f"--select source needs two source categories, one is held out; found {', '.join(sources)}", ("sources",)
        )
    held_out = sorted(set(config.held_out or [held_out_category(sources, config.obj)]))
    if unknown := [name for name in held_out if name not in sources]:
        raise UserError(f"--held_out {unknown[0]} is not a source category; choose from {', '.join(sources)}")
    if len(held_out) == len(sources):
        raise UserError("--held_out leaves no source category to train on", ("held_out",))
    return held_out


def _target(config: TrainingConfig, category: str, root: Path, data_type: str, img_size: int, check: bool) -> Target:
    """A category to score, read as by test.py: --bits auto is resolved from its own training images."""
    folder = category_folder(root, data_type, category)
    items = (list_test_items_with_notes if check else list_test_items)(folder, config.strict)
    bits = resolve_bits(config.bits, normal_images(folder), f"{category}/train")
    decoding = img_size, config.keep_aspect, bits
    support = find_support_rounds(config.support_path, folder, config.shot, config.inferences, *decoding)
    return Target(category, folder, items, bits, support)


def run(config: TrainingConfig, digests: FileDigests | None = None) -> None:
    """Checks all inputs, then trains, scores and saves epoch by epoch. digests: known ones of files.

    Raises:
        UserError: data or weights cannot be used, an earlier run would be overwritten or has other settings, another
            process trains into the same files, or the training diverges.
    """
    files = checkpoint_files(config)
    for file in files:
        require_writable(file, "--save_dir")
    if config.cache_dir != "none":
        require_writable(Path(config.cache_dir), "--cache_dir", folder=True)
    if config.tensorboard:
        require_packages("tensorboard", requirements=None)
    limit_pixels(config.max_pixels)
    device, digests = command_device(config.device), digests or FileDigests()
    inputs = read_inputs(config, check=True, digests=digests)
    with locked([files.state]):
        _run(config, files, device, inputs, digests)


def _run(
    config: TrainingConfig, files: CheckpointFiles, device: torch.device, inputs: Inputs, digests: FileDigests
) -> None:
    earlier = earlier_run(files, config.resume, config.overwrite, inputs.fingerprint)
    if earlier and earlier.finished:
        history, selected = (earlier.content[key] for key in ("epochs", "selected_epoch"))
        print(f"already finished: {files.record}\n{_format_outcomes(history, selected)}")
        return
    fixed_episodes = _read_episodes(config, inputs.names) if config.episodes else None
    scorings = [Scoring(config, targets, device, digests) for targets in (inputs.scored, inputs.further) if targets]
    seed_everything(config.seed)  # after all other uses of random numbers: epoch 0 equals test.py --untrained
    trainer = _make_trainer(config, inputs, device, new=earlier is None)
    images = _read_sources(config, inputs, device, digests)
    if earlier:
        trainer.restore(earlier.content)
        _publish(files, trainer, new_weights=True)
        print(f"resumed at epoch {trainer.progress.epoch}, step {trainer.progress.step}: {files.state}")
    elif config.resume:
        print(f"nothing to resume at {files.state}: a new run")
    _announce(config, inputs)
    description = {"command": "train.py", "config": config.plain(), "resolved": inputs.resolved}
    description |= {"fingerprint": inputs.fingerprint, **provenance(device)}
    _train(config, files, trainer, inputs, images, fixed_episodes, scorings, description)
    _finish(config, files, trainer, description, inputs)


def _train(
    config: TrainingConfig,
    files: CheckpointFiles,
    trainer: Trainer,
    inputs: Inputs,
    images: SourceImages,
    fixed_episodes: list[Episode] | None,
    scorings: Sequence[Scoring],
    description: dict,
) -> None:
    """The remaining epochs: train, score, select, save. Epoch 0 is the untrained network.

    description: the entries of records that are the same for all epochs.
    """
    progress, started = trainer.progress, time.perf_counter()
    drawn = started
    save = partial(trainer.save, files.state, inputs.fingerprint)
    events = Events(files.events, progress.history) if config.tensorboard else None
    while (epoch := progress.epoch) <= config.epochs:
        clock = StageClock()  # on CUDA, host time only: synchronisation would slow down training
        entry = {"epoch": epoch, "loss": None, "lr": None, "steps": 0, "seconds": {}}
        if epoch:
            episodes = fixed_episodes or draw_episodes(inputs.names, config.shot, config.batch_size, config.seed, epoch)
            episodes = episodes[: config.steps]
            trainer.train_epoch(episodes, images, config.epochs, clock, save, config.save_every)
            loss = sum(progress.losses) / len(progress.losses)
            lr = learning_rate(config.lr, epoch, config.epochs)
            entry |= {"loss": loss, "lr": lr, "steps": len(episodes), "seconds": clock.seconds}
        if scorings and (epoch % config.eval_every == 0 or epoch == config.epochs):
            entry |= scorings[0].score(trainer)
            if inputs.further:
                entry["held_out"] = scorings[1].score(trainer)
        entry["elapsed_seconds"] = time.perf_counter() - started  # includes saving the previous epoch
        started = time.perf_counter()
        selected = is_selected(entry, progress.history, progress.selected, config.select)
        held_out = [earlier.get("held_out", {}) for earlier in progress.history]
        source = bool(inputs.further) and is_selected(entry.get("held_out", {}), held_out, progress.source, "source")
        if events:
            events.add(entry, progress.losses)
        trainer.finish_epoch(entry, selected, source, {**description, **entry})
        save()  # from here on the epoch counts; the other files follow
        _publish(files, trainer, selected or source)
        if started - drawn > CURVE_SECONDS:
            save_curve(files.curve, progress.history, inputs.scored_names)
            drawn = started
        print(_format_entry(entry, config.epochs, selected) + _time_left(progress.history, config.epochs), flush=True)


def _publish(files: CheckpointFiles, trainer: Trainer, new_weights: bool) -> None:
    """Writes the files that follow from the state, and removes those of a run that this one replaces.

    new_weights: whether the selected weights differ from those in their file.
    """
    for file in (files.record, files.last, files.card, *files.portable):  # written when the run is finished
        file.unlink(missing_ok=True)
    if new_weights:
        save_tensors(files.selected, trainer.selected)
        files.source.unlink(missing_ok=True)
        if trainer.source:
            save_tensors(files.source, trainer.source)
    save_history(files, trainer.progress.history)


def _finish(
    config: TrainingConfig, files: CheckpointFiles, trainer: Trainer, description: dict, inputs: Inputs
) -> None:
    """Writes the last weights and all other files, the record last; removes the state and prints the results."""
    history, selected = trainer.progress.history, trainer.progress.selected
    last = checkpoint(trainer.model, {**description, **history[-1]})
    save_tensors(files.last, last)
    for file, content in zip(files.portable, (trainer.selected, trainer.source, last), strict=True):
        if content:
            save_portable(file, content)
    save_curve(files.curve, history, inputs.scored_names)
    record = description | ({"source_epoch": trainer.progress.source} if inputs.further else {})
    record |= {"selected_epoch": selected, "outcomes": outcomes(history, selected), "epochs": history}
    with whole_file(files.card) as aside:
        aside.write_text(model_card(config, files, inputs.sources, record), encoding="utf-8")
    write_json(files.record, record)
    remove_leftovers(files)
    files.state.unlink()
    print(f"\n{_format_outcomes(history, selected)}\nweights: {files.selected}\nrecord: {files.record}")


def _announce(config: TrainingConfig, inputs: Inputs) -> None:
    where = f" of {config.source_path}" if config.source_path else ""
    images = sum(map(len, inputs.sources.values()))
    print(f"training on {len(inputs.sources)} categories{where}, {images} images; target {config.obj}")
    if config.select == "best":
        print("note: --select best selects the epoch by the target's test labels, as in the published protocol")
    held_out = inputs.resolved["held_out"]
    names = ", ".join([held_out] if isinstance(held_out, str) else held_out or [])
    if held_out and config.select == "source":
        print(f"the epoch is selected by {names}, not trained on; score {config.obj} with test.py")
    elif held_out:
        print(f"further weights, in the file {checkpoint_files(config).source.name}, are selected by {names}")


def _read_episodes(config: TrainingConfig, names: dict[str, list[str]]) -> list[Episode]:
    """The episodes of --episodes.

    Raises:
        UserError: the file cannot be used, or has another number of support images than --shot.
    """
    episodes = read_episodes(config.episodes, names)
    shots = sorted({len(support) for episode in episodes for support in episode.support})
    if shots != [config.shot]:
        numbers = " and ".join(map(str, shots))
        raise UserError(f"{config.episodes} has {numbers} support images per query, not --shot {config.shot}")
    return episodes


def _read_sources(config: TrainingConfig, inputs: Inputs, device: torch.device, digests: FileDigests) -> SourceImages:
    root = config.source_path or config.data_path
    print_notes(note for name in inputs.sources for note in layout_of(root / name).stray(root / name, []))
    cache_dir = None if config.cache_dir == "none" else Path(config.cache_dir)
    readers = reader_threads(config.num_workers, device)
    return SourceImages(
        *(inputs.sources, inputs.resolved["img_size"], cache_dir, readers, device),
        keep_aspect=config.keep_aspect,
        bits=inputs.resolved["bits"],
        digests=digests,
    )


def _make_trainer(config: TrainingConfig, inputs: Inputs, device: torch.device, new: bool) -> Trainer:
    """The networks before training. A resumed run (not `new`) replaces their weights, so none are read."""
    weights = config.weights if new else "none"
    model = untrained(weights, config.stn_mode, inputs.resolved["img_size"], config.backbone).to(device)
    precision = {"bf16": config.amp == "bf16", "tf32": config.tf32, "compiled": config.compile}
    recipe = {"train": config.train, "batch_norm": config.batch_norm, "support_target": config.support_target}
    return Trainer(model, config.lr, config.momentum, **precision, **recipe)


class Scoring:
    """Scores categories after an epoch. Their images are decoded once and kept.

    Raises:
        UserError: an image or mask cannot be read.
    """

    def __init__(
        self, config: TrainingConfig, targets: Sequence[Target], device: torch.device, digests: FileDigests
    ) -> None:
        self.data: dict[str, tuple] = {}  # category -> dataset, labels, rounds
        for target in targets:
            print(f"support: {target.support.source}")
            size = target.support.images[0].shape[-1]
            dataset = LabelledDataset(target.items, size, config.keep_aspect, target.bits, config.mask_orientation)
            dataset.load(reader_threads(config.num_workers, device))
            report_content(dataset, normal_images(target.folder), config.strict, digests)
            self.data[target.category] = dataset, [item.label for item in target.items], target.support.images
        self.scorers: list[Scorer] = make_scorers(config.scorer)

    def score(self, trainer: Trainer) -> dict:
        """The metrics of the current weights with the first scorer; with several, "scorers" has those of each.

        With several categories, the metrics are means over the categories, round by round, and "categories" has those
        of each.

        Raises:
            UserError: a score is not finite; after training, the message names the loss.
        """
        clock, by_scorer = StageClock(trainer.device), {}
        scored = {category: self._score_category(trainer, data, clock) for category, data in self.data.items()}
        for scorer in self.scorers:
            categories = {category: [by_name[scorer.name] for by_name in rounds] for category, rounds in scored.items()}
            mean = mean_rounds(list(categories.values()))
            by_scorer[scorer.name] = {**summaries(mean), "rounds": mean}
            if len(categories) > 1:
                by_scorer[scorer.name]["categories"] = {name: summaries(rounds) for name, rounds in categories.items()}
        entry = {**next(iter(by_scorer.values())), "scoring_seconds": clock.seconds}
        return entry if len(by_scorer) == 1 else entry | {"scorers": by_scorer}

    def _score_category(self, trainer: Trainer, data: tuple, clock: StageClock) -> list[dict]:
        """The metrics of each round, by the name of the scorer."""
        try:
            rounds = score_category(trainer.model.stn, self.scorers, *data, clock)
            return [{name: result.numbers for name, result in by_name.items()} for by_name in rounds]
        except NotFinite as error:
            if not trainer.progress.epoch:  # the initial weights cause it, not the training
                raise
            raise trainer.diverged(f"scores are not finite; {trainer.last_loss()}") from error


def mean_rounds(categories: Sequence[Sequence[dict[str, float | None]]]) -> list[dict[str, float | None]]:
    """The metrics of each round, averaged over the categories that have the metric; one dict per round."""
    means = []
    for metrics in zip(*categories, strict=True):  # of a round, one dict per category
        values = {name: [each[name] for each in metrics if each[name] is not None] for name in metrics[0]}
        means.append({name: sum(defined) / len(defined) if defined else None for name, defined in values.items()})
    return means


def _format_entry(entry: dict, epochs: int, is_selected: bool) -> str:
    loss, seconds = entry["loss"], sum(entry["seconds"].values())
    text = f"epoch {entry['epoch']}/{epochs}: {'untrained' if loss is None else f'loss {loss:.4f}, {seconds:.0f} s'}"
    if entry.get("image_auroc"):
        text += f"; image AUROC {format_summary(entry['image_auroc'])}, pixel {format_summary(entry['pixel_auroc'])}"
        text += f" ({sum(entry['scoring_seconds'].values()):.0f} s)"
    return text + (" *" if is_selected else "")


def _time_left(history: Sequence[dict], epochs: int) -> str:
    """A phrase on the time until the last epoch, from the mean time of the trained epochs; empty without any."""
    trained = [entry["elapsed_seconds"] for entry in history if entry["epoch"]]
    left = epochs - history[-1]["epoch"]
    return f", about {format_elapsed(sum(trained) / len(trained) * left)} left" if trained and left else ""


def _format_outcomes(history: Sequence[dict], selected: int) -> str:
    """Formats the metrics of the untrained, selected and last weights as a table."""
    lines = [f"{'weights':22}{'image AUROC':20}pixel AUROC"]
    for name, entry in outcomes(history, selected).items():
        image, pixel = format_summary(entry["image_auroc"]), format_summary(entry["pixel_auroc"])
        lines.append(f"{name:22}{image:20}{pixel}")
    return "\n".join(lines) if len(lines) > 1 else "no epoch was scored (--eval_every 0)"
