"""Finds, resumes or replaces the earlier run of a training, and selects the epoch.

The state file is written first, holds the content of the other files, and is removed last. If a run was killed between
two files, the resumed run writes them again from the state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.regad import RECIPE
from utils.errors import UserError
from utils.files import NAME_LETTERS, load_tensors, whole_file
from utils.fingerprint import changes
from utils.naming import STATE, CheckpointFiles

REPLACE, REPLACING = "start a new run in its place", ("overwrite",)


class Earlier(NamedTuple):
    """A run that this call continues. content: its state, or its record if it is finished."""

    content: dict
    finished: bool


def earlier_run(files: CheckpointFiles, resume: bool, overwrite: bool, fingerprint: dict) -> Earlier | None:
    """The unfinished or finished run that a call continues; None if it starts a new one.

    fingerprint: of this call.

    Raises:
        UserError: the run has another fingerprint, its state or record is damaged, or as `refuse_to_overwrite`.
    """
    if resume and files.state.is_file():
        content = load_tensors(files.state, "training state")
        if not isinstance(content, dict) or "progress" not in content or "fingerprint" not in content:
            raise UserError(f"{files.state} is not a training state of this version; {REPLACE}", REPLACING)
        _require_same(files.state, content, fingerprint)
        return Earlier(content, False)
    if resume and files.record.is_file():
        try:
            record = json.loads(files.record.read_text(encoding="utf-8"))
            record["epochs"], record["selected_epoch"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{files.record} is not the record of a training; {REPLACE}", REPLACING) from error
        _require_same(files.record, record, fingerprint)
        return Earlier(record, True)
    refuse_to_overwrite(files, overwrite)
    return None


def _require_same(file: Path, content: dict, fingerprint: dict) -> None:
    if changed := changes(content.get("fingerprint"), fingerprint):
        raise UserError(
            f"cannot resume {file}, settings or inputs have changed: {', '.join(changed)}; restore them, or {REPLACE}",
            REPLACING,
        )


def refuse_to_overwrite(files: CheckpointFiles, overwrite: bool) -> None:
    """Raises UserError if a new run would replace another program's weights or, without `overwrite`, an earlier run."""
    if files.selected.is_file():
        content = load_tensors(files.selected, "checkpoint")
        if not isinstance(content, dict) or RECIPE not in content:
            raise UserError(
                f"{files.selected} was not written by train.py (the release's weights?) and would be overwritten; "
                "move it, or give another folder",
                ("save_dir",),
            )
    if overwrite:
        return
    if files.state.is_file():
        raise UserError(f"{files.state} belongs to an unfinished run; resume it, or {REPLACE}", ("resume", *REPLACING))
    if existing := [file for file in (files.record, files.selected, files.source, files.last) if file.is_file()]:
        raise UserError(
            f"{existing[0]} belongs to an earlier run; {REPLACE}, or give another folder to keep it",
            (*REPLACING, "save_dir"),
        )


def remove_leftovers(files: CheckpointFiles) -> None:
    """Removes the temporary files of this run that killed processes left behind."""
    prefix = f".{files.state.name.removesuffix(STATE)[:NAME_LETTERS]}"  # see utils.files.temporary_name
    for entry in files.state.parent.iterdir():
        if entry.suffix == ".tmp" and entry.name.startswith(prefix):
            entry.unlink(missing_ok=True)


def save_history(files: CheckpointFiles, history: Sequence[dict]) -> None:
    """Writes one JSON line per finished epoch."""
    with whole_file(files.epochs) as aside:
        aside.write_text("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history), encoding="utf-8")


def selection_metric(entry: dict) -> float:
    """The value that the selection maximises: image AUROC plus pixel AUROC if it is defined, as means over rounds."""
    return sum(entry[key]["mean"] for key in ("image_auroc", "pixel_auroc") if entry[key])


def is_selected(entry: dict, history: Sequence[dict], selected: int, rule: str) -> bool:
    """Whether an epoch's weights replace those of epoch `selected` as the selected ones. rule: best, last, source.

    entry, history: with the metrics of the target, or for `source` with the means over the held-out categories.
    """
    if rule == "last":
        return True
    return bool(entry.get("image_auroc")) and (
        not history or selection_metric(entry) > selection_metric(history[selected])
    )


def outcomes(history: Sequence[dict], selected: int) -> dict[str, dict]:
    """The entries of the untrained, selected and last epoch, by name, without those that were not scored."""
    entries = {"untrained": history[0], f"selected (epoch {selected})": history[selected], "last": history[-1]}
    return {name: entry for name, entry in entries.items() if entry.get("image_auroc")}
