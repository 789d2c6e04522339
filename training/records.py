"""The files of a training run: weights, state, one JSON line per epoch, curve and record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.regad import RECIPE, checkpoint_file, last_file
from models.stn import RELEASE_BACKBONE
from utils.errors import UserError
from utils.files import load_tensors, whole_file


class RunFiles(NamedTuple):
    """The files of one run, in one folder. `state` exists while the run is unfinished, `record` when it is finished."""

    selected: Path
    last: Path
    state: Path
    epochs: Path
    curve: Path
    record: Path

    @classmethod
    def of(cls, save_dir: Path, stn_mode: str, shot: int, category: str, backbone: str = RELEASE_BACKBONE) -> RunFiles:
        """The paths under `save_dir`."""
        selected = checkpoint_file(save_dir, stn_mode, shot, category, backbone)
        stem = selected.name.removesuffix("_model.pt")
        others = (
            selected.with_name(f"{stem}_{end}") for end in ("state.pt", "epochs.jsonl", "curve.png", "record.json")
        )
        return cls(selected, last_file(save_dir, stn_mode, shot, category, backbone), *others)


def refuse_to_overwrite(files: RunFiles) -> None:
    """Raises UserError where a new run would overwrite an unfinished run, or weights that train.py did not write."""
    if files.state.is_file():
        raise UserError(
            f"{files.state} belongs to an unfinished run; resume it with --resume, or delete the file to start again"
        )
    if files.selected.is_file():
        content = load_tensors(files.selected, "checkpoint")
        if not isinstance(content, dict) or RECIPE not in content:
            raise UserError(
                f"{files.selected} was not written by train.py (the release's weights?) and would be overwritten; "
                "move it, or give another folder with --save_dir"
            )


def save_history(files: RunFiles, history: Sequence[dict]) -> None:
    """Writes one JSON line per finished epoch."""
    with whole_file(files.epochs) as aside:
        aside.write_text("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history), encoding="utf-8")


def merit(entry: dict) -> float:
    """The value that the selection maximises: image AUROC plus pixel AUROC, if there is one, as means over rounds."""
    return sum(entry[key]["mean"] for key in ("image_auroc", "pixel_auroc") if entry[key])


def is_selected(entry: dict, history: Sequence[dict], selected: int, rule: str) -> bool:
    """Whether an epoch's weights replace those of epoch `selected` as the selected ones; `rule`: --select."""
    if rule == "last":
        return True
    return bool(entry.get("image_auroc")) and (not history or merit(entry) > merit(history[selected]))


def outcomes(history: Sequence[dict], selected: int) -> dict[str, dict]:
    """The entries of the untrained, selected and last epoch, by name, without those that were not scored."""
    chosen = {"untrained": history[0], f"selected (epoch {selected})": history[selected], "last": history[-1]}
    return {name: entry for name, entry in chosen.items() if entry.get("image_auroc")}
