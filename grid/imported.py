"""Records of another method, made from its scores of every test image and, where there are any, its score maps.

The scores are a CSV file as test.py writes it, see evaluation/per_image.py. The maps are a folder with a file
round_<number>.npz per round, as `test.py --save_maps` writes them: `names` (B,) as in the CSV file, `maps` (B, S, S).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.images import read_batches
from datasets.mvtec import LabelledDataset, LabelledImage, category_folder, list_test_items
from datasets.support import find_support_rounds
from evaluation.metrics import auroc, average_precision, f1_max, pro, rank, region_weights
from evaluation.per_image import ROUND, image_name, read_scores
from evaluation.statistics import format_interval, format_summary, summaries
from scorers.registry import SAFE_NAME, TAKEN_NAMES
from utils.errors import UserError
from utils.files import sha256, write_json
from utils.records import plain_arguments

LACKING_WITHOUT_MAPS = "pixel AUROC, pixel AP, pixel F1-max and PRO"
KEPT_ARGUMENTS = ("obj", "shot", "data_type", "data_path", "inferences", "support_path", "import_scores", "maps")


def import_record(args: argparse.Namespace) -> Path:
    """Makes the record that the arguments of reproduce.py ask for, prints its metrics and returns its file.

    Raises:
        UserError: a name that cannot be one, wrong scores or maps, or data or a support set that cannot be read.
    """
    if not SAFE_NAME.fullmatch(args.name or "") or args.name in TAKEN_NAMES:
        raise UserError(
            f"--import needs --name, of letters, digits, - and _, other than {', '.join(sorted(TAKEN_NAMES))}"
        )
    if not args.obj or not args.shot:
        raise UserError("--import needs the category and the number of support images: --obj and --shot")
    folder = category_folder(args.data_path, args.data_type, args.obj)
    items = list_test_items(folder)
    scores = read_scores(args.import_scores, items, args.inferences)
    support = find_support_rounds(args.support_path, folder, args.shot, args.inferences, args.img_size)
    rounds = _image_metrics(scores, items)
    if args.maps:
        for numbers, more in zip(rounds, _pixel_metrics(args, items), strict=True):
            numbers.update(more)
    record = {
        "arguments": {name: plain_arguments(args)[name] for name in KEPT_ARGUMENTS} | {"scorer": args.name},
        **{"commit": None, "device": "not given", "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        **{"weights": args.kind, "epoch": None, "checkpoint": None, "scorer": args.name},
        "imported": {"path": str(args.import_scores), "sha256": sha256(args.import_scores)},
        "support_set": {
            "source": support.source,
            "names": support.names,
            **({"path": str(support.file), "sha256": sha256(support.file)} if support.file else {}),
        },
        "test_pictures": len(items),
        "rounds": rounds,
        **summaries(rounds),
    }
    path = args.output / f"{args.obj}_{args.shot}_{args.kind}_{args.name}.json"
    write_json(path, record)
    _print(record, path)
    return path


def _print(record: dict, path: Path) -> None:
    for name in record["rounds"][0]:
        print(f"{name:14}{format_summary(record[name]):20}{format_interval(record[name])}".rstrip())
    print(f"support: {record['support_set']['source']}; the method must have used these images")
    if "pixel_auroc" not in record["rounds"][0]:
        print(f"not in the record, as there is no --maps: {LACKING_WITHOUT_MAPS}")
    print(f"record: {path}")


def _image_metrics(scores: np.ndarray, items: Sequence[LabelledImage]) -> list[dict[str, float | None]]:
    labels = np.array([item.label for item in items], dtype=bool)
    rankings = [rank(of_round, labels) for of_round in scores]
    return [
        {"image_auroc": auroc(one), "image_ap": average_precision(one), "image_f1_max": f1_max(one)} for one in rankings
    ]


def _pixel_metrics(args: argparse.Namespace, items: Sequence[LabelledImage]) -> list[dict[str, float | None]]:
    """The pixel metrics of every round; None where no pixel is known to be defective."""
    masks = counted = regions = None
    numbers = []
    for number in range(args.inferences):
        maps = _read_maps(args.maps / f"{ROUND}{number}.npz", items)
        if masks is None:
            masks, counted = _truth(items, maps.shape[-1], args.num_workers)
            regions = region_weights(masks) if masks.any() else None
        if maps.shape[-1] != masks.shape[-1]:
            raise UserError(f"{args.maps} has maps of {masks.shape[-1]} and of {maps.shape[-1]} pixels a side")
        if regions is None:
            numbers.append(dict.fromkeys(("pixel_auroc", "pixel_ap", "pixel_f1_max", "pro")))
            continue
        pixels = rank(maps[counted], masks[counted])
        more = {"pixel_auroc": auroc(pixels), "pixel_ap": average_precision(pixels), "pixel_f1_max": f1_max(pixels)}
        numbers.append(more | {"pro": pro(pixels, regions)})
    return numbers


def _truth(items: Sequence[LabelledImage], size: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and counted pixels (B, S, S) at the size of the maps, as test.py scales them."""
    read = list(read_batches(LabelledDataset(list(items), size), None, workers))
    return tuple(np.stack([one[name].numpy() for one in read]) for name in ("mask", "counted"))


def _read_maps(path: Path, items: Sequence[LabelledImage]) -> np.ndarray:
    """The maps (B, S, S) of a round in the order of `items`.

    Raises:
        UserError: the file cannot be read, lacks an image or has it twice, or its maps are not square or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names, maps = stored["names"].tolist(), stored["maps"]
    except Exception as error:  # damage leads to errors of many types: zip, value, key, OS
        raise UserError(
            f"cannot read the maps {path} ({type(error).__name__}: {error}); --maps is a folder with {ROUND}0.npz, "
            f"{ROUND}1.npz, ... each with the arrays names (B,) and maps (B, S, S)"
        ) from error
    if maps.ndim != 3 or maps.shape[0] != len(names) or maps.shape[1] != maps.shape[2] or maps.dtype.kind not in "fiu":
        raise UserError(f"{path} has maps of shape {maps.shape} for {len(names)} names; they must be numbers (B, S, S)")
    place = {name: number for number, name in enumerate(names)}
    lacking = [image_name(item) for item in items if image_name(item) not in place]
    if lacking or len(names) != len(items):
        first = lacking[0] if lacking else "one twice, or one that is no test image"
        raise UserError(
            f"{path} has {len(names)} maps for {len(items)} test images; {'missing: ' if lacking else ''}{first}"
        )
    maps = maps[[place[image_name(item)] for item in items]].astype(np.float32)
    if not np.isfinite(maps).all():
        raise UserError(f"{path} has values that are not finite numbers")
    return maps
