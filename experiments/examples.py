"""Example images for a figure: support images, test images, ground truth and the saved maps of each column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.layouts import LabelledImage
from datasets.mvtec import LabelledDataset, category_folder, list_train_images
from datasets.support import find_support_rounds, read_support_images
from evaluation.gallery import choose_examples
from evaluation.per_image import image_name
from evaluation.run import choose_round
from evaluation.saved_maps import read_maps
from experiments.results import Results, rounds_of
from experiments.saved_scores import maps_folder, test_items
from reports.drawing import colour_limits
from utils.choices import MASK_ORIENTATIONS
from utils.errors import UserError
from utils.naming import round_maps


class ColumnMaps(NamedTuple):
    """The maps of one column for N test images.

    images: (N, S, S, 3) uint8 at the size of the maps. maps: (N, S, S). limits: the scores of the first and the last
    colour.
    """

    images: np.ndarray
    maps: np.ndarray
    limits: tuple[float, float]


class CategoryExamples(NamedTuple):
    """N test images of a category.

    names: <defect>/<file name>. support: (K, S, S, 3) uint8. images: (N, S, S, 3) uint8. masks: (N, S, S) bool.
    columns: by the kind of the record.
    """

    category: str
    names: list[str]
    support: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    columns: dict[str, ColumnMaps]


def read_examples(
    results: Results, which: int | str = 0, names: Sequence[str] | None = None, data_path: Path | None = None
) -> list[CategoryExamples]:
    """Examples of every category of `results`, which has one number of shots.

    which: the round, see evaluation.run.choose_round; best, median and worst are those of the first column. names: of
    the test images, <defect>/<file name>; None: one of each defect type. data_path: where the data are now; None: where
    they were.

    Raises:
        UserError: several numbers of shots, columns of different support sets, or data or maps are not there.
    """
    if len(results.shots) > 1:
        shots = ", ".join(map(str, results.shots))
        raise UserError(f"example images are of one number of shots, not of K = {shots}; choose one", ("shots",))
    found = [_of_category(results, category, which, names, data_path) for category in results.categories]
    if lacking := set(names or ()) - {name for of in found if of for name in of.names}:
        raise UserError(f"no test image {min(lacking)} in {', '.join(results.categories)}", ("images",))
    return [of for of in found if of]


def _of_category(
    results: Results, category: str, which: int | str, names: Sequence[str] | None, data_path: Path | None
) -> CategoryExamples | None:
    keys = [(category, results.shots[0], kind) for kind in results.kinds]
    keys = [key for key in keys if key in results.records]
    if not keys:
        return None
    records = [results.records[key] for key in keys]
    if len({rounds_of(record) for record in records}) > 1:
        raise UserError(f"the columns of {category} were scored on different support sets", ("columns",))
    number, items = choose_round(which, records[0]["rounds"]), test_items(records[0], data_path)
    if not 0 <= number < len(records[0]["rounds"]):
        raise UserError(f"{category} has {len(records[0]['rounds'])} rounds, counted from 0", ("images_round",))
    chosen = [index for index, item in enumerate(items) if image_name(item) in (names or ())]
    if names is None:
        chosen = choose_examples(items, len({item.defect for item in items}))
    if not chosen:
        return None
    columns = {}
    for key, record in zip(keys, records, strict=True):
        file = round_maps(maps_folder(results.files[key][0], record), number)
        if not file.is_file():
            raise UserError(f"no saved maps {file} of {key[2]}; score again with: python test.py --save_maps")
        columns[key[2]] = _maps(items, chosen, read_maps(file, items), record["config"])
    first = next(iter(columns.values()))
    size, config = first.images.shape[1], records[0]["config"]
    orientation = config.get("mask_orientation", MASK_ORIENTATIONS[0])
    dataset = LabelledDataset([items[index] for index in chosen], size, **_how(config), mask_orientation=orientation)
    masks = np.stack([dataset[index]["mask"].numpy() for index in range(len(chosen))])
    support = _support(records[0], number, size, data_path)
    return CategoryExamples(category, [image_name(items[n]) for n in chosen], support, first.images, masks, columns)


def _how(config: dict) -> dict:
    """How the images of a record were decoded."""
    bits = config.get("bits")
    return {"keep_aspect": bool(config.get("keep_aspect")), **({"bits": bits} if isinstance(bits, int) else {})}


def _maps(items: Sequence[LabelledImage], chosen: Sequence[int], maps: np.ndarray, config: dict) -> ColumnMaps:
    scores = maps.max(axis=(1, 2))
    normal = scores[[not item.label for item in items]]
    limits = colour_limits(float(np.median(normal if len(normal) else scores)))
    dataset = LabelledDataset([items[index] for index in chosen], maps.shape[-1], **_how(config))
    images = np.stack([dataset[index]["image"].permute(1, 2, 0).numpy() for index in range(len(chosen))])
    return ColumnMaps(images, maps[list(chosen)], limits)


def _support(record: dict, number: int, size: int, data_path: Path | None) -> np.ndarray:
    """The support images of a round: those that the record names, or those of its file."""
    config, names = record["config"], record["support_set"]["names"]
    folder = category_folder(data_path or Path(config["data_path"]), config["data_type"], config["obj"])
    if names is None:
        path = config.get("support_path")
        rounds = find_support_rounds(path and Path(path), folder, config["shot"], len(record["rounds"]), size)
        images = rounds.images[number]
    else:
        files = {path.name: path for path in list_train_images(folder)}
        if lacking := [name for name in names[number] if name not in files]:
            raise UserError(f"{folder} lacks the support image {lacking[0]} of the record", ("data_path",))
        images = read_support_images([files[name] for name in names[number]], size, **_how(config))
    return (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
