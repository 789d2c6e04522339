"""Implements test.py: reads a category and its support sets, scores every round, and writes the records."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.check import list_test_items_with_notes, report_content
from datasets.images import limit_pixels, read_header, resolve_bits, restore_map
from datasets.mvtec import LabelledDataset, LabelledImage, category_folder, normal_images
from datasets.support import SupportRounds, find_support_rounds
from evaluation.config import ScoringConfig
from evaluation.per_image import image_name, write_scores
from evaluation.saved_maps import save_maps, save_tiff
from evaluation.scoring import RoundResult, Shared, TestFeatures, compute_test_features, score_rounds
from evaluation.statistics import format_aurocs, format_summaries, metric_entries
from models.networks import network_name, resolve_img_size, scoring_network
from models.regad import local_file, selection
from models.stn import fuse_conv_bn
from scorers.features import FeatureNetwork
from scorers.registry import make_scorers
from utils.choices import RELEASE_SCORER, ROUND_RANKS
from utils.devices import command_device, reader_threads, seed_everything
from utils.errors import UserError
from utils.files import locked, require_writable, sha256, write_json
from utils.fingerprint import FileDigests, changes, digest, fingerprint
from utils.naming import CheckpointFiles, RecordFiles, record_name, round_maps, stored
from utils.records import peak_memory_mb, provenance
from utils.stages import StageClock


class Resolved(NamedTuple):
    """Values that follow from data and backbone: bit depth of 16-bit images, side of the network's input in pixels."""

    bits: int
    img_size: int


class Weights(NamedTuple):
    """The weights to score. kind: a key of utils.choices.WEIGHTS. file, sha256: None for an untrained network."""

    file: Path | None
    sha256: str | None
    kind: str
    epoch: int | None


class Job(NamedTuple):
    """The scoring of one K with one scorer, which gives one record. config: with this K and this scorer alone."""

    config: ScoringConfig
    scorer: str
    weights: Weights
    support: SupportRounds
    files: RecordFiles
    fingerprint: dict

    @property
    def shot(self) -> int:
        """The number of support images per round."""
        return self.config.shot[0]


class Plan(NamedTuple):
    """A category to score: its test images and all jobs."""

    config: ScoringConfig
    resolved: Resolved
    items: list[LabelledImage]
    jobs: list[Job]


def run(config: ScoringConfig, digests: FileDigests | None = None) -> None:
    """Checks all inputs, scores every round, prints the metrics and writes the records. digests: known ones of files.

    Raises:
        UserError: data, a support set or a checkpoint cannot be used, a record of other settings would be replaced, or
            another process writes one of the records.
    """
    require_writable(config.output, "--output", folder=True)
    limit_pixels(config.max_pixels)
    device = command_device(config.device)
    seed_everything(config.seed)
    folder, digests = category_folder(config.data_path, config.data_type, config.obj), digests or FileDigests()
    plan = make_plan(config, list_test_items_with_notes(folder, config.strict, need_both=False), digests)
    bits, img_size = plan.resolved
    networks = {}
    for weights in dict.fromkeys(job.weights for job in plan.jobs):
        network = scoring_network(config.backbone, config.stn_mode, img_size, weights.file, config.weights)
        network.registered_frame = config.frame == "registered"
        networks[weights] = network
    with locked([job.files.record for job in plan.jobs]):
        replaced = {job.files.record for job in plan.jobs if _replaces(job)}
        dataset = LabelledDataset(plan.items, img_size, config.keep_aspect, bits, config.mask_orientation)
        report = functools.cache(partial(report_content, dataset, normal_images(folder), config.strict, digests))
        for weights, network in networks.items():
            jobs = [job for job in plan.jobs if job.weights == weights]
            _score_weights(plan, jobs, network.to(device), dataset, StageClock(device), replaced, report)


def make_plan(config: ScoringConfig, items: list[LabelledImage], digests: FileDigests | None = None) -> Plan:
    """The jobs of a configuration with their fingerprints, in the order of weights, K and scorers. Scores nothing.

    items: the test images of the category. digests: known digests of files.

    Raises:
        UserError: a support set or a checkpoint cannot be used.
    """
    folder, digests = category_folder(config.data_path, config.data_type, config.obj), digests or FileDigests()
    resolved = Resolved(
        resolve_bits(config.bits, normal_images(folder), f"{config.obj}/train"),
        resolve_img_size(config.backbone, config.img_size),
    )
    settings = config.results_part() | resolved._asdict()
    test, scorers = digest_items(items, digests), [scorer.name for scorer in make_scorers(config.scorer)]
    network, jobs = network_name(config.backbone, config.stn_mode), []
    decoding = resolved.img_size, config.keep_aspect, resolved.bits
    supports = {
        shot: find_support_rounds(config.support_path, folder, shot, config.inferences, *decoding)
        for shot in config.shot
    }
    for weights, shots in _find_weights(config, network).items():
        for shot in shots:
            for spec, scorer in zip(config.scorer, scorers, strict=True):
                inputs = {
                    "scorer": digest_scorer(spec, digests),
                    "weights": weights.sha256 or digest_weights(config.weights, config.seed, digests),
                    "support_images": digest_support(supports[shot]),
                    "test_images": test,
                }
                files = RecordFiles.of(config.output, record_name(config.obj, shot, network, weights.kind, scorer))
                job_config = replace(config, shot=(shot,), scorer=(spec,))
                job_fingerprint = fingerprint({**settings, "shot": shot}, inputs)
                jobs.append(Job(job_config, scorer, weights, supports[shot], files, job_fingerprint))
    return Plan(config, resolved, items, jobs)


def digest_items(items: Sequence[LabelledImage], digests: FileDigests) -> str:
    """SHA-256 of the names, images and masks of a test set, in hexadecimal."""
    digests.of(file for item in items for file in (item.image, *item.masks))  # several at a time
    return digest([[image_name(item), digests.of([item.image, *item.masks])] for item in items])


def digest_support(support: SupportRounds) -> str:
    """SHA-256 of the support images of every round, in hexadecimal."""
    values = [hashlib.sha256(images.contiguous().numpy()).hexdigest() for images in support.images]
    return digest([digest([list(images.shape), sha]) for images, sha in zip(support.images, values, strict=True)])


def digest_weights(weights: str, seed: int, digests: FileDigests) -> str:
    """Identifies initial weights: the SHA-256 of a file, `imagenet`, or `none` with the seed of random weights."""
    if Path(weights).is_file():
        return digests.of([Path(weights)])[0]
    return f"none, seed {seed}" if weights == "none" else weights


def digest_scorer(spec: str, digests: FileDigests) -> str:
    """Identifies a value of --scorer: its name, followed by the SHA-256 of the file of a custom scorer."""
    file, _, name = spec.rpartition(":")
    return f"{name} {digests.of([Path(file)])[0]}" if file else name


def difference(record: Path, current: dict) -> str | None:
    """A sentence on how an existing record's fingerprint differs from `current`; None if it does not, or no record."""
    if not record.is_file():
        return None
    try:
        earlier = json.loads(record.read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError, AttributeError) as error:
        return f"{record} is not a record ({error})"
    changed = changes(earlier, current)
    return f"{record} was made with other settings: {', '.join(changed)}" if changed else None


def _replaces(job: Job) -> bool:
    """Whether maps and images beside the record of the job are of other settings: its record is, or is missing.

    Raises:
        UserError: it does, and --overwrite was not given; or a file of the record cannot be written.
    """
    for file in (job.files.record, job.files.scores):
        require_writable(file, "--output")
    for wanted, folder in (
        (job.config.save_maps or job.config.save_tiff, job.files.maps),
        (job.config.save_images, job.files.images),
    ):
        if wanted:
            require_writable(folder, "--output", folder=True)
    replaced = difference(job.files.record, job.fingerprint)
    if replaced and not job.config.overwrite:
        raise UserError(f"{replaced}; give another --output to keep it, or --overwrite to replace it")
    return replaced is not None or not job.files.record.is_file()


def _find_weights(config: ScoringConfig, network: str) -> dict[Weights, list[int]]:
    """The weights to score, each with its list of K. Equal files are scored once.

    Raises:
        UserError: a checkpoint is missing.
    """
    if config.untrained:
        return {Weights(None, None, "untrained", 0): list(config.shot)}
    by_digest: dict[str, tuple[Weights, list[int]]] = {}
    for shot in config.shot:
        files = CheckpointFiles.of(config.save_dir, network, shot, config.obj)
        file = local_file(config.checkpoint or stored(files.last if config.last else files.selected))
        if not file.is_file():
            raise UserError(
                f"no checkpoint {file}; create it with: python train.py --obj {config.obj} --shot {shot} "
                f"--stn_mode {config.stn_mode} --data_path <data folder>. Or put the release's file there, give "
                "another with --checkpoint FILE, or score the network before training with --untrained"
            )
        digest_of_file = sha256(file)
        if digest_of_file not in by_digest:
            by_digest[digest_of_file] = Weights(file, digest_of_file, *selection(file)), []
        by_digest[digest_of_file][1].append(shot)
    return dict(by_digest.values())


def _score_weights(
    plan: Plan,
    jobs: Sequence[Job],
    network: FeatureNetwork,
    dataset: LabelledDataset,
    clock: StageClock,
    replaced: set[Path],
    report: Callable[[], None],
) -> None:
    """Scores all jobs with the same weights; the features of the test images are computed once.

    The K are scored in turns, round by round: drawn support sets and manifests are nested, so that the support images
    of a small K are among those of the next one, and their features are computed once.

    replaced: records whose maps and images are of other settings. report: called after the test images were read.
    """
    config, weights, network = plan.config, jobs[0].weights, fuse_conv_bn(network)
    source = weights.file or f"untrained, weights {config.weights}"
    print(f"scoring {config.obj}: {len(plan.items)} test images, {source}")
    labels, defect_types = [item.label for item in plan.items], [item.defect for item in plan.items]
    scorers, readers = make_scorers(config.scorer), reader_threads(config.num_workers, clock.device)
    test = compute_test_features(network, scorers, dataset, labels, clock, config.batch_size, readers, defect_types)
    report()
    rounds = [images for support in {job.shot: job.support for job in jobs}.values() for images in support.images]
    shared = Shared(test, rounds, clock.device, config.metrics == "all")
    scored = []
    for shot in dict.fromkeys(job.shot for job in jobs):
        shot_jobs, shot_clock = [job for job in jobs if job.shot == shot], StageClock(clock.device)
        shot_clock.seconds.update(clock.seconds)
        for job in shot_jobs:
            if job.files.record in replaced:
                job.files.remove_extras()
        scored.append(_score_shot(plan, shot_jobs, network, test, dataset, shot_clock, shared))
    for _ in itertools.zip_longest(*scored):
        pass


def _score_shot(
    plan: Plan,
    jobs: Sequence[Job],
    network: FeatureNetwork,
    test: TestFeatures,
    dataset: LabelledDataset,
    clock: StageClock,
    shared: Shared,
) -> Iterator[None]:
    """Scores all rounds of one K with every scorer; yields after each round.

    Prints the metrics, at the end writes the files of each job.
    """
    config, support = plan.config, jobs[0].support
    print(f"support: {support.source}")
    results: dict[str, list[RoundResult]] = {job.scorer: [] for job in jobs}
    rounds = score_rounds(network, test, support.images, clock, config.batch_size, shared=shared)
    for number in range(len(support.images)):
        _collect(plan, jobs, number, next(rounds), results)  # other K follow: the maps are not kept
        yield
    records = [_write(plan, job, results[job.scorer], test, clock) for job in jobs]
    if config.save_images:
        workers = reader_threads(config.num_workers, clock.device)
        drawn_rounds = [choose_round(config.images_round, record["rounds"]) for record in records]
        for number in dict.fromkeys(drawn_rounds):  # scored again: to keep the maps of all rounds would take the memory
            by_scorer = next(score_rounds(network, test, [support.images[number]], clock, config.batch_size))
            for job, record, drawn_round in zip(jobs, records, drawn_rounds, strict=True):
                if drawn_round == number:
                    maps = by_scorer[job.scorer].maps.cpu().numpy()
                    _save_images(plan, job, number, dataset, maps, record, workers)


def _collect(
    plan: Plan, jobs: Sequence[Job], number: int, by_scorer: dict[str, RoundResult], results: dict[str, list]
) -> None:
    """Prints the metrics of a round and adds its results, without maps, to `results`; writes its maps if configured."""
    for job in jobs:
        result = by_scorer[job.scorer]
        label = f"round {number}" + (f", K = {job.shot}" if len(plan.config.shot) > 1 else "")
        label += f", {job.scorer}" if len(jobs) > 1 else ""
        print(f"{label}: {format_aurocs(result.numbers)}", flush=True)
        results[job.scorer].append(result._replace(maps=None, distances=None))
        if plan.config.save_maps or plan.config.save_tiff:
            _save_maps(plan, job, number, result.maps.cpu().numpy())


def choose_round(rank: int | str, rounds: Sequence[dict]) -> int:
    """The number of a round: `rank` itself, or the best, median or worst of `rounds` by image AUROC.

    Of an even number of rounds, the median is the worse of the two in the middle. Rounds without an image AUROC are
    equal.
    """
    if rank not in ROUND_RANKS:
        return int(rank)
    order = sorted(range(len(rounds)), key=lambda number: rounds[number]["image_auroc"] or 0)
    return order[{"worst": 0, "median": (len(order) - 1) // 2, "best": -1}[rank]]


def _save_maps(plan: Plan, job: Job, number: int, maps: np.ndarray) -> None:
    """Writes the score maps (B, S, S) of a round as .npz and TIFF files, as configured."""
    if plan.config.save_maps:
        save_maps(round_maps(job.files.maps, number), plan.items, maps)
    if plan.config.save_tiff:
        folder = round_maps(job.files.maps, number).with_suffix("")
        for item, scores in zip(plan.items, maps, strict=True):
            restored = restore_map(scores, *read_header(item.image)[0], plan.config.keep_aspect)
            save_tiff(folder / Path(image_name(item)).with_suffix(".tiff"), restored)


def _write(plan: Plan, job: Job, results: Sequence[RoundResult], test: TestFeatures, clock: StageClock) -> dict:
    """Prints the summaries of a job; writes its scores and its record, which is returned."""
    entries = metric_entries(test.truth, [(result.numbers, result.by_defect_type) for result in results])
    label = "" if job.scorer == RELEASE_SCORER else f"{job.scorer}: "
    print(f"{label}mean +- SD of {len(results)} rounds, and Student's 95 % interval of the mean:")
    print(*format_summaries(entries), sep="\n")
    file, sha256_of_file, kind, epoch = job.weights
    record = {
        "command": "test.py",
        "config": job.config.plain() | {"shot": job.shot, "scorer": job.config.scorer[0]},
        "resolved": plan.resolved._asdict(),
        "fingerprint": job.fingerprint,
        **provenance(clock.device),
        **{"weights": kind, "epoch": epoch},
        "checkpoint": None if file is None else {"path": str(file), "sha256": sha256_of_file},
        "scorer": job.scorer,
        "support_set": support_record(job.support),
        "test_images": len(plan.items),
        **entries,
        "seconds": clock.seconds,
        "peak_memory_mb": peak_memory_mb(),
    }
    write_scores(job.files.scores, plan.items, [result.image_scores for result in results])
    write_json(job.files.record, record)
    maps = f", maps: {job.files.maps}" if job.config.save_maps or job.config.save_tiff else ""
    print(f"record: {job.files.record}, scores: {job.files.scores}{maps}")
    return record


def support_record(support: SupportRounds) -> dict:
    """The entry `support_set` of a record."""
    file = {} if support.file is None else {"path": str(support.file), "sha256": sha256(support.file)}
    return {"source": support.source, "names": support.names, **file}


def _save_images(
    plan: Plan, job: Job, number: int, dataset: LabelledDataset, maps: np.ndarray, record: dict, workers: int
) -> None:
    """Draws images of a round and the report. workers: threads that draw."""
    from evaluation import gallery  # slow: imports matplotlib

    folder, config = job.files.images, plan.config
    try:
        scored, tables = gallery.with_own_threshold(dataset, maps), gallery.metric_tables(record)
        rank = f", the {config.images_round} by image AUROC" if config.images_round in ROUND_RANKS else ""
        title = f"{folder.name}, round {number}{rank}"
        gallery.save_gallery(folder, title, scored, config.save_images, workers, tables)
    except OSError as error:
        raise UserError(f"the record is written, but the images in {folder} cannot be: {error}") from error
    print(f"images: {folder}, with contact_sheet.jpg, curves.png and report.html")
