"""The records of test.py: their files, what their numbers depend on, and how an existing one differs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.mvtec import LabelledImage
from datasets.support import SupportRounds
from evaluation.per_image import ROUND, image_name
from utils.files import digest, sha256, whole_file
from utils.stages import in_threads

DIGEST_LETTERS = 64  # of a SHA-256 in hexadecimal
DECISIVE = ("img_size", "keep_aspect", "bits", "stn_mode", "backbone", "metrics")  # arguments that change the numbers


class RecordFiles(NamedTuple):
    """The files of one record. maps, images: folders, made by --save_maps and --save_images."""

    record: Path
    scores: Path
    maps: Path
    images: Path

    @classmethod
    def of(cls, output: Path, name: str) -> RecordFiles:
        """The paths of the record `name` in the folder `output`."""
        return cls(output / f"{name}.json", output / f"{name}.csv", output / f"{name}_maps", output / name)

    def round_maps(self, number: int) -> Path:
        """The file with the score maps of a round."""
        return round_maps(self.maps, number)

    def remove_extras(self) -> None:
        """Removes the maps and the report of an earlier record, so that they do not stand beside other numbers."""
        report = [self.images / name for name in ("report.html", "contact_sheet.jpg")]
        for file in (*self.maps.glob(f"{ROUND}*.npz"), *report, *self.images.glob("curves.*")):
            file.unlink(missing_ok=True)


def round_maps(folder: Path, number: int) -> Path:
    """The file with the score maps of a round in a folder of them."""
    return folder / f"{ROUND}{number}.npz"


def file_record(path: Path | None) -> dict | None:
    """What a record says of a file; None for None."""
    return None if path is None else {"path": str(path), "sha256": sha256(path)}


def support_record(support: SupportRounds) -> dict:
    """What a record says of its support set."""
    return {"source": support.source, "names": support.names} | (file_record(support.file) or {})


def save_maps(path: Path, items: Sequence[LabelledImage], maps: np.ndarray) -> None:
    """Writes the score maps of a round as .npz: `names` (B,), as in the CSV file, and `maps` (B, S, S).

    The maps are float32, because float16 would merge neighbouring scores: metrics computed from the file are those of
    the record. They are not compressed, which would save a tenth of the space and take seconds.
    """
    with whole_file(path) as aside, open(aside, "wb") as stream:
        np.savez(stream, names=np.array([image_name(item) for item in items]), maps=maps)


def decisive(
    args: argparse.Namespace,
    checkpoint: str | None,
    scorer: str,
    test: str,
    support: Iterable[torch.Tensor],
) -> dict:
    """What the numbers of a record depend on, by content and not by path, as far as it can be known beforehand.

    args: those of test.py. checkpoint: SHA-256, or None for an untrained network. scorer: as given with --scorer.
    test: from `test_digest`. support: the support images of every round.
    """
    content = {name: getattr(args, name) for name in DECISIVE}
    weights = checkpoint
    if checkpoint is None:
        weights = sha256(Path(args.weights)) if Path(args.weights).is_file() else args.weights
    content |= {"weights": f"none, seed {args.seed}" if weights == "none" else weights}
    file, _, name = scorer.rpartition(":")
    content["scorer"] = f"{name} {sha256(Path(file))}" if file else name
    images = hashlib.sha256()
    for of_round in support:
        images.update(str(tuple(of_round.shape)).encode() + of_round.contiguous().numpy().tobytes())
    return content | {"support images": images.hexdigest(), "test images": test}


def test_digest(items: Sequence[LabelledImage]) -> str:
    """SHA-256 of the names, images and masks of a test set, in hexadecimal."""
    files = list(dict.fromkeys(path for item in items for path in (item.image, *item.masks)))
    hashes = dict(zip(files, in_threads(sha256, files, os.cpu_count() or 1), strict=True))
    return digest([[image_name(item), hashes[item.image], [hashes[mask] for mask in item.masks]] for item in items])


def difference(record: Path, settings: dict) -> str | None:
    """A sentence on how an existing record differs from one with these settings (see `decisive`); None if it does not.

    None also where there is no record.
    """
    if not record.is_file():
        return None
    try:
        earlier = json.loads(record.read_text(encoding="utf-8")).get("decisive")
    except (OSError, ValueError, AttributeError) as error:
        return f"{record} is in the place of the record and is none ({error})"
    if earlier is None:
        return f"{record} does not say what it was made of, it is of an earlier version"
    changes = [
        _change(name, earlier.get(name), value) for name, value in settings.items() if earlier.get(name) != value
    ]
    return f"{record} was made with other settings: {', '.join(changes)}" if changes else None


def _change(name: str, before: object, now: object) -> str:
    shown = [value for value in (before, now) if isinstance(value, (int, str)) and len(str(value)) < DIGEST_LETTERS]
    return f"{name} {before}, now {now}" if len(shown) == 2 else f"other {name}"
