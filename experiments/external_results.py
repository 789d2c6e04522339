"""Records of another method, from its image scores and optionally its score maps.

The scores are a CSV file in the format of test.py, see evaluation/per_image.py. The maps are a folder with a file
round_<number>.npz per round, as `test.py --save_maps` writes them: `names` (B,) as in the CSV file, `maps` (B, S, S).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from datasets.layouts import LabelledImage
from datasets.mvtec import category_folder, list_test_items, read_masks
from datasets.support import SupportRounds, find_support_rounds
from evaluation.metrics import METRIC_NAMES
from evaluation.per_image import read_scores, write_scores
from evaluation.round_metrics import IMAGE_METRICS, GroundTruth, RoundMetrics
from evaluation.run import difference, digest_items, support_record
from evaluation.saved_maps import read_maps
from evaluation.statistics import format_summaries, metric_entries
from experiments.config import ExperimentConfig
from models.networks import resolve_img_size
from scorers.registry import SAFE_NAME, TAKEN_NAMES
from utils.errors import UserError
from utils.files import write_json
from utils.fingerprint import FileDigests, digest, fingerprint
from utils.naming import round_maps

KEPT_SETTINGS = ("obj", "shot", "data_type", "data_path", "inferences", "support_path", "import_scores", "maps", "name")


def import_record(config: ExperimentConfig) -> None:
    """Writes the record of the scores in `config` and prints its metrics.

    Raises:
        UserError: the name, the scores or the maps are invalid, data or a support set cannot be read, or without
            --overwrite there is a record of other inputs.
    """
    if not SAFE_NAME.fullmatch(config.name or "") or config.name in TAKEN_NAMES:
        raise UserError(
            f"--import needs --name, of letters, digits, - and _, other than {', '.join(sorted(TAKEN_NAMES))}"
        )
    if not config.obj or not config.shot:
        raise UserError("--import needs the category and the number of support images: --obj and --shot")
    folder = category_folder(config.data_path, config.data_type, config.obj)
    items = list_test_items(folder, need_both=False)
    scores = read_scores(config.import_scores, items, config.inferences)
    size = resolve_img_size(config.backbone, config.img_size)
    support = find_support_rounds(config.support_path, folder, config.shot, config.inferences, size)
    path = config.output / f"{config.obj}_{config.shot}_{config.kind}_{config.name}.json"
    current = _fingerprint(config, items, support)
    if not config.overwrite and (replaced := difference(path, current)):
        raise UserError(f"{replaced}; give another --name or --output to keep it, or --overwrite to replace it")
    plain = config.plain()
    record = {
        "command": "reproduce.py",
        "config": {name: plain[name] for name in KEPT_SETTINGS} | {"scorer": config.name},
        "fingerprint": current,
        **{"commit": None, "device": "not given", "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        **{"weights": config.kind, "epoch": None, "checkpoint": None, "scorer": config.name},
        "external": {"path": str(config.import_scores), "sha256": current["inputs"]["scores"]},
        "support_set": support_record(support),
        "test_images": len(items),
        **_metrics(config, items, scores),
    }
    write_scores(path.with_suffix(".csv"), items, scores)
    write_json(path, record)
    print(*format_summaries(record), sep="\n")
    print(f"support: {record['support_set']['source']}; the method must have used these images")
    if lacking := [title for name, title in METRIC_NAMES.items() if name not in record["rounds"][0]]:
        print(f"not in the record, as there is no --maps: {', '.join(lacking)}")
    print(f"record: {path}")


def _fingerprint(config: ExperimentConfig, items: Sequence[LabelledImage], support: SupportRounds) -> dict:
    """The fingerprint of the record's inputs."""
    digests = FileDigests()
    maps = [round_maps(config.maps, number) for number in range(config.inferences if config.maps else 0)]
    inputs = {
        "scores": digests.of([config.import_scores])[0],
        "maps": digest(digests.of(path for path in maps if path.is_file())),
        "support_images": digest([support.names, support.file and digests.of([support.file])]),
        "test_images": digest_items(items, digests),
    }
    return fingerprint({}, inputs)


def _metrics(config: ExperimentConfig, items: Sequence[LabelledImage], scores: np.ndarray) -> dict:
    """The entries of the record with the metrics of the scores (rounds, B), as in records of test.py."""
    labels, defect_types = np.array([item.label for item in items], dtype=bool), [item.defect for item in items]
    truth, names = GroundTruth(labels, None, None, defect_types), IMAGE_METRICS
    if config.maps:
        size = read_maps(round_maps(config.maps, 0), items).shape[-1]
        truth, names = GroundTruth(labels, *read_masks(items, size), defect_types), tuple(METRIC_NAMES)
    metrics, rounds = RoundMetrics(truth, torch.device("cpu"), names), []
    for number, round_scores in enumerate(scores):
        maps = read_maps(round_maps(config.maps, number), items) if config.maps else None
        if maps is not None and maps.shape[-1] != size:
            raise UserError(f"{config.maps} has maps of {size} and of {maps.shape[-1]} pixels a side")
        rounds.append(metrics.of_round(round_scores, None if maps is None else torch.from_numpy(maps)))
    return metric_entries(truth, rounds)
