"""Names of the files that runs write: checkpoints and their records, records of scores, maps, images, locks.

Names omit the release's selection `best` and its scorer `gaussian`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from utils.choices import SAFETENSORS

DEFAULT_SAVE_DIR = Path("./save_checkpoints")
RELEASE_PARTS = ("best", "gaussian")  # selection of the epoch and scorer that names omit
ROUND = "round_"  # followed by the number of the round: columns of scores, files of maps
STATE = "state.pt"  # end of the name of a training state


class CheckpointFiles(NamedTuple):
    """The files of one training, in one folder. While the run is unfinished, `state` exists; afterwards `record`."""

    selected: Path
    source: Path  # with --held_out and --select best
    last: Path
    state: Path
    epochs: Path
    curve: Path
    record: Path

    @classmethod
    def of(cls, save_dir: Path, network: str, shot: int, category: str) -> CheckpointFiles:
        """The paths below `save_dir`, as in the release. network: from models.networks.network_name."""
        folder, stem = save_dir / network / str(shot) / category, f"{category}_{shot}_{network}"
        endings = ("model.pt", "source.pt", "last.pt", STATE, "epochs.jsonl", "curve.png", "record.json")
        return cls(*(folder / f"{stem}_{ending}" for ending in endings))

    @property
    def portable(self) -> list[Path]:
        """The safetensors files of the weights `selected`, `source` and `last`."""
        return [file.with_suffix(SAFETENSORS) for file in (self.selected, self.source, self.last)]

    @property
    def card(self) -> Path:
        """The model card."""
        return self.record.with_name(self.record.name.replace("record.json", "card.md"))

    @property
    def events(self) -> Path:
        """The folder of the event files of --tensorboard."""
        return self.record.with_name(self.record.name.replace("record.json", "tensorboard"))


class RecordFiles(NamedTuple):
    """The files of one record of test.py. maps, images: folders, made by --save_maps and --save_images."""

    record: Path
    scores: Path
    maps: Path
    images: Path

    @classmethod
    def of(cls, output: Path, name: str) -> RecordFiles:
        """The paths of the record `name`, see `record_name`, in the folder `output`."""
        return cls(output / f"{name}.json", output / f"{name}.csv", output / f"{name}_maps", output / name)

    def remove_extras(self) -> None:
        """Removes the maps and the report of an earlier record, which would contradict the new numbers."""
        report = [self.images / name for name in ("report.html", "contact_sheet.jpg")]
        maps = (*self.maps.glob(f"{ROUND}*.npz"), *self.maps.glob(f"{ROUND}*/*/*.tiff"))
        for file in (*maps, *report, *self.images.glob("curves.*")):
            file.unlink(missing_ok=True)


def record_name(category: str, shot: int, network: str, weights: str, scorer: str) -> str:
    """The name of a record. weights: how they were selected (best, last, source), or untrained."""
    return "_".join([category, str(shot), network, *(part for part in (weights, scorer) if part not in RELEASE_PARTS)])


def round_maps(folder: Path, number: int) -> Path:
    """The file with the score maps of a round."""
    return folder / f"{ROUND}{number}.npz"


def stored(weights: Path) -> Path:
    """The file of weights, or its safetensors file if only that exists."""
    portable = weights.with_suffix(SAFETENSORS)
    return portable if portable.is_file() and not weights.is_file() else weights


def lock_file(file: Path) -> Path:
    """The file that is locked while a process writes `file` and the files that belong to it."""
    return file.with_name(f".{file.name}.lock")
