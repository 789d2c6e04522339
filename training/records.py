"""The files of a training run: weights, state, one JSON line per epoch, curve and record.

The state is the commit. It is written first, holds all that the other files are made of, and is removed last. When a
run that was killed between two files is resumed, they are made from the state again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.regad import RECIPE, checkpoint_file, last_file
from models.stn import RELEASE_BACKBONE
from utils.errors import UserError
from utils.files import NAME_LETTERS, load_tensors, whole_file

STATE = "state.pt"  # how the name of the state ends


class RunFiles(NamedTuple):
    """The files of one run, in one folder. The run is unfinished while `state` exists, and finished when only `record`
    does.
    """

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
        others = (selected.with_name(f"{stem}_{end}") for end in (STATE, "epochs.jsonl", "curve.png", "record.json"))
        return cls(selected, last_file(save_dir, stn_mode, shot, category, backbone), *others)


class Earlier(NamedTuple):
    """A run that this call continues: its state, or its record if it is finished, and in `decisive` its identity."""

    file: Path
    decisive: dict
    content: dict
    finished: bool


def earlier_run(files: RunFiles, resume: bool, overwrite: bool) -> Earlier | None:
    """The run that a call continues or finds finished; None where it starts a new one.

    Raises:
        UserError: the state or the record is damaged, or as `refuse_to_overwrite`.
    """
    if resume and files.state.is_file():
        content = load_state(files)
        return Earlier(files.state, content["arguments"], content, False)
    if resume and files.record.is_file():
        try:
            record = json.loads(files.record.read_text(encoding="utf-8"))
            return Earlier(files.record, record["decisive"], record, True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{files.record} is not the record of a training; start again with --overwrite") from error
    refuse_to_overwrite(files, overwrite)
    return None


def load_state(files: RunFiles) -> dict:
    """The state of an unfinished run, see `Trainer.save`.

    Earlier versions did not store the selected weights in it; they are read from their file.

    Raises:
        UserError: the state is damaged or no training state, or the selected weights beside it are of another epoch.
    """
    content = load_tensors(files.state, "training state")
    if not isinstance(content, dict) or set(content) - {"selected"} != {"arguments", "model", "optimizer", "progress"}:
        raise UserError(f"{files.state} is not a training state; start again with --overwrite")
    if "selected" not in content:
        beside = load_tensors(files.selected, "checkpoint")
        recipe = beside.get(RECIPE) if isinstance(beside, dict) else None
        if not isinstance(recipe, dict) or recipe.get("epoch") != content["progress"]["selected"]:
            raise UserError(
                f"{files.selected} does not hold the weights of epoch {content['progress']['selected']}, which "
                f"{files.state} of an earlier version selected; start again with --overwrite"
            )
        content["selected"] = beside
    return content


def refuse_to_overwrite(files: RunFiles, overwrite: bool) -> None:
    """Raises UserError where a new run would replace weights that train.py did not write, or without `overwrite` a run.

    `overwrite`: --overwrite was given.
    """
    if files.selected.is_file():
        content = load_tensors(files.selected, "checkpoint")
        if not isinstance(content, dict) or RECIPE not in content:
            raise UserError(
                f"{files.selected} was not written by train.py (the release's weights?) and would be overwritten; "
                "move it, or give another folder with --save_dir"
            )
    if overwrite:
        return
    if files.state.is_file():
        raise UserError(
            f"{files.state} belongs to an unfinished run; resume it with --resume, or start again with --overwrite"
        )
    if found := [file for file in (files.record, files.selected, files.last) if file.is_file()]:
        raise UserError(
            f"{found[0]} belongs to an earlier run; give --overwrite to replace that run, or another folder with "
            "--save_dir to keep it"
        )


def remove_leftovers(files: RunFiles) -> None:
    """Removes the temporary files of this run that killed processes left behind."""
    begin = f".{files.state.name.removesuffix(STATE)[:NAME_LETTERS]}"  # of their names, see utils.files.temporary_name
    for entry in files.state.parent.iterdir():
        if entry.suffix == ".tmp" and entry.name.startswith(begin):
            entry.unlink(missing_ok=True)


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
