"""The state of a training between two calls: what was started or finished before, and which epoch is selected.

The state file is the commit. It is written first, holds all that the other files are made of, and is removed last. When
a run that was killed between two files is resumed, they are made from the state again.
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
    """A run that this call continues: its state, or its record if it is finished."""

    content: dict
    finished: bool


def earlier_run(files: CheckpointFiles, resume: bool, overwrite: bool, known: dict) -> Earlier | None:
    """The run that a call continues or finds finished; None where it starts a new one.

    known: the fingerprint of this call.

    Raises:
        UserError: the run has another fingerprint, its state or record is damaged, or as `refuse_to_overwrite`.
    """
    if resume and files.state.is_file():
        content = load_tensors(files.state, "training state")
        if not isinstance(content, dict) or "progress" not in content or "fingerprint" not in content:
            raise UserError(f"{files.state} is not a training state of this version; {REPLACE}", REPLACING)
        _require_same(files.state, content, known)
        return Earlier(content, False)
    if resume and files.record.is_file():
        try:
            record = json.loads(files.record.read_text(encoding="utf-8"))
            record["epochs"], record["selected_epoch"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{files.record} is not the record of a training; {REPLACE}", REPLACING) from error
        _require_same(files.record, record, known)
        return Earlier(record, True)
    refuse_to_overwrite(files, overwrite)
    return None


def _require_same(file: Path, content: dict, known: dict) -> None:
    if found := changes(content.get("fingerprint"), known):
        raise UserError(
            f"cannot resume {file}, settings or inputs have changed: {', '.join(found)}; restore them, or {REPLACE}",
            REPLACING,
        )


def refuse_to_overwrite(files: CheckpointFiles, overwrite: bool) -> None:
    """Raises UserError where a new run would replace weights of others, or without `overwrite` a run of train.py."""
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
    if found := [file for file in (files.record, files.selected, files.source, files.last) if file.is_file()]:
        raise UserError(
            f"{found[0]} belongs to an earlier run; {REPLACE}, or give another folder to keep it",
            (*REPLACING, "save_dir"),
        )


def remove_leftovers(files: CheckpointFiles) -> None:
    """Removes the temporary files of this run that killed processes left behind."""
    begin = f".{files.state.name.removesuffix(STATE)[:NAME_LETTERS]}"  # of their names, see utils.files.temporary_name
    for entry in files.state.parent.iterdir():
        if entry.suffix == ".tmp" and entry.name.startswith(begin):
            entry.unlink(missing_ok=True)


def save_history(files: CheckpointFiles, history: Sequence[dict]) -> None:
    """Writes one JSON line per finished epoch."""
    with whole_file(files.epochs) as aside:
        aside.write_text("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history), encoding="utf-8")


def selection_metric(entry: dict) -> float:
    """The value that the selection maximises: image AUROC plus pixel AUROC, if there is one, as means over rounds."""
    return sum(entry[key]["mean"] for key in ("image_auroc", "pixel_auroc") if entry[key])


def is_selected(entry: dict, history: Sequence[dict], selected: int, rule: str) -> bool:
    """Whether an epoch's weights replace those of epoch `selected` as the selected ones. rule: best, last, source.

    The entries hold the metrics of what selects: the target's, or with `source` the means of the held-out categories.
    """
    if rule == "last":
        return True
    return bool(entry.get("image_auroc")) and (
        not history or selection_metric(entry) > selection_metric(history[selected])
    )


def outcomes(history: Sequence[dict], selected: int) -> dict[str, dict]:
    """The entries of the untrained, selected and last epoch, by name, without those that were not scored."""
    chosen = {"untrained": history[0], f"selected (epoch {selected})": history[selected], "last": history[-1]}
    return {name: entry for name, entry in chosen.items() if entry.get("image_auroc")}
