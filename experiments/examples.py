"""Example images for a figure: support images, test images, ground truth and the saved maps of each column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.layouts import LabelledImage
from datasets.mvtec import LabelledDataset, list_train_images
from datasets.support import find_support_rounds, read_support_images
from evaluation.gallery import choose_examples
from evaluation.per_image import image_name
from evaluation.run import choose_round
from evaluation.saved_maps import read_maps
from experiments.results import Results, rounds_of
from experiments.saved_scores import decoding, folder_of, maps_file, test_items
from utils.errors import UserError

SHOWN, MOST = 8, 15  # test images of all categories: by default; that fit a page


class CategoryExamples(NamedTuple):
    """N test images of a category, at the size S of the first column's maps.

    names: <defect>/<file name>. support: (K, S, S, 3) uint8. images: (N, S, S, 3) uint8. masks: (N, S, S) bool.
    columns: by the kind of the record the score maps (N, S', S'), relative to the median image score of the normal test
    images.
    """

    category: str
    names: list[str]
    support: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    columns: dict[str, np.ndarray]


def read_examples(
    results: Results, which: int | str = 0, names: Sequence[str] | None = None, data_path: Path | None = None
) -> list[CategoryExamples]:
    """Examples of every category of `results`, which has one number of shots.

    which: the round, see evaluation.run.choose_round; best, median and worst are those of the first column. names: of
    the test images, <defect>/<file name>; None: one of each defect type, SHOWN in all. data_path: where the data are
    now; None: where they were.

    Raises:
        UserError: several numbers of shots, columns of different support sets, more than MOST images, or data or maps
            are not there.
    """
    if len(results.shots) > 1:
        shots = ", ".join(map(str, results.shots))
        raise UserError(f"example images are of one number of shots, not of K = {shots}; choose one", ("shots",))
    found = [_of_category(results, category, which, names, data_path) for category in results.categories]
    if lacking := set(names or ()) - {name for of in found if of for name in of.names}:
        raise UserError(f"no test image {min(lacking)} in {', '.join(results.categories)}", ("images",))
    if (count := sum(len(of.names) for of in found if of)) > MOST:
        raise UserError(f"{count} test images do not fit a page, at most {MOST} do; choose some", ("objs", "images"))
    return [of for of in found if of]


def _of_category(
    results: Results, category: str, which: int | str, names: Sequence[str] | None, data_path: Path | None
) -> CategoryExamples | None:
    keys = [(category, results.shots[0], kind) for kind in results.kinds]
    records = {key: results.records[key] for key in keys if key in results.records}
    if not records:
        return None
    if len({rounds_of(record) for record in records.values()}) > 1:
        raise UserError(f"the columns of {category} were scored on different support sets", ("columns",))
    first = next(iter(records.values()))
    number, items = choose_round(which, first["rounds"]), test_items(first, data_path)
    if not 0 <= number < len(first["rounds"]):
        raise UserError(f"{category} has {len(first['rounds'])} rounds, counted from 0", ("images_round",))
    chosen = [index for index, item in enumerate(items) if image_name(item) in (names or ())]
    if names is None:
        chosen = _of_each_type(items, max(1, SHOWN // len(results.categories)))
    if not chosen:
        return None
    columns = {}
    for key, record in records.items():
        file = maps_file(results.files[key][0], record, number)
        if not file.is_file():
            raise UserError(f"no saved maps {file} of {key[2]}; score again with: python test.py --save_maps")
        columns[key[2]] = _relative(read_maps(file, items), items)[chosen]
    size = next(iter(columns.values())).shape[-1]
    shown = [items[index] for index in chosen]
    read = list(LabelledDataset(shown, size, **decoding(first, "keep_aspect", "bits", "mask_orientation")))
    images = np.stack([one["image"].permute(1, 2, 0).numpy() for one in read])
    masks = np.stack([one["mask"].numpy() for one in read])
    return CategoryExamples(
        category, [*map(image_name, shown)], _support(first, number, size, data_path), images, masks, columns
    )


def _of_each_type(items: Sequence[LabelledImage], most: int) -> list[int]:
    """Indices of one image of each defect type, and of a normal one, at most `most`; defective ones come first."""
    defective_first = sorted(range(len(items)), key=lambda index: not items[index].label)
    types = len({item.defect for item in items})
    return sorted(
        defective_first[at] for at in choose_examples([items[index] for index in defective_first], min(most, types))
    )


def _relative(maps: np.ndarray, items: Sequence[LabelledImage]) -> np.ndarray:
    """Maps (B, S, S) divided by the median image score of the normal images, or of all if none is normal."""
    scores = maps.max(axis=(1, 2))
    normal = scores[[not item.label for item in items]]
    return maps / max(np.median(normal if len(normal) else scores), np.finfo(np.float32).tiny)


def _support(record: dict, number: int, size: int, data_path: Path | None) -> np.ndarray:
    """The support images of a round: those that the record names, or those of its file."""
    config, names, folder = record["config"], record["support_set"]["names"], folder_of(record, data_path)
    if names is None:
        path = config.get("support_path")
        rounds = find_support_rounds(path and Path(path), folder, config["shot"], len(record["rounds"]), size)
        images = rounds.images[number]
    else:
        files = {path.name: path for path in list_train_images(folder)}
        if lacking := [name for name in names[number] if name not in files]:
            raise UserError(f"{folder} lacks the support image {lacking[0]} of the record", ("data_path",))
        images = read_support_images(
            [files[name] for name in names[number]], size, **decoding(record, "keep_aspect", "bits")
        )
    return (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
