"""What a training run leaves in its folder: weights, state, one JSON line per epoch, a curve, a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.statistics import format_summary
from models.regad import RECIPE, checkpoint_file, last_file
from utils.utils import UserError, load_tensors, whole_file


class RunFiles(NamedTuple):
    """The files of one run, beside each other. `state` exists while the run is unfinished, `record` once it is done."""

    selected: Path
    last: Path
    state: Path
    epochs: Path
    curve: Path
    record: Path

    @classmethod
    def of(cls, save_dir: Path, stn_mode: str, shot: int, category: str) -> RunFiles:
        """Their places under `save_dir`."""
        selected = checkpoint_file(save_dir, stn_mode, shot, category)
        stem = selected.name.removesuffix("_model.pt")
        others = (
            selected.with_name(f"{stem}_{end}") for end in ("state.pt", "epochs.jsonl", "curve.png", "record.json")
        )
        return cls(selected, last_file(save_dir, stn_mode, shot, category), *others)


def refuse_to_overwrite(files: RunFiles) -> None:
    """Raises UserError where a new run would destroy an unfinished one, or weights that were not trained here."""
    if files.state.is_file():
        raise UserError(
            f"{files.state} belongs to an unfinished run; continue it with --resume, or delete the file to start anew"
        )
    if files.selected.is_file():
        content = load_tensors(files.selected, "checkpoint")
        if not isinstance(content, dict) or RECIPE not in content:
            raise UserError(
                f"{files.selected} was not written by train.py (the release's weights?) and would be overwritten; "
                "move it, or give another folder with --save_dir"
            )


def save_history(files: RunFiles, history: Sequence[dict], scored: str) -> None:
    """One JSON line per finished epoch, and the curve of them; `scored`: the category that was scored."""
    with whole_file(files.epochs) as aside:
        aside.write_text("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history), encoding="utf-8")
    _save_curve(files.curve, history, scored)


def _save_curve(target: Path, history: Sequence[dict], scored: str) -> None:
    """Loss, and image and pixel AUROC (mean, and a band of one standard deviation over rounds), against the epoch."""
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    trained = [entry for entry in history if entry["loss"] is not None]
    above.plot([entry["epoch"] for entry in trained], [entry["loss"] for entry in trained], ".-", color="#333333")
    above.set_ylabel("registration loss")
    for metric, colour in (("image_auroc", "#c05010"), ("pixel_auroc", "#1060a0")):
        _plot_metric(below, [entry for entry in history if entry.get(metric)], metric, colour)
    below.set_ylabel(f"AUROC on {scored}")
    below.set_xlabel("epoch (0: untrained)")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    if below.lines:
        below.legend()
    with whole_file(target) as aside:
        figure.savefig(aside, format="png", dpi=100)


def _plot_metric(axis: Axes, scored: Sequence[dict], metric: str, colour: str) -> None:
    if not scored:
        return
    epochs, means = [e["epoch"] for e in scored], [e[metric]["mean"] for e in scored]
    spread = [e[metric]["sd"] or 0.0 for e in scored]
    axis.plot(epochs, means, ".-", color=colour, label=metric.replace("_auroc", " AUROC"))
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)


def outcomes(history: Sequence[dict], selected: int) -> dict[str, dict]:
    """The scored entries that a reader compares: untrained, selected and last."""
    chosen = {"untrained": history[0], f"selected (epoch {selected})": history[selected], "last": history[-1]}
    return {name: entry for name, entry in chosen.items() if entry.get("image_auroc")}


def format_outcomes(history: Sequence[dict], selected: int) -> str:
    """`outcomes` as lines of text."""
    lines = [f"{'weights':22}{'image AUROC':20}pixel AUROC"]
    for name, entry in outcomes(history, selected).items():
        image, pixel = format_summary(entry["image_auroc"]), format_summary(entry["pixel_auroc"])
        lines.append(f"{name:22}{image:20}{pixel}")
    return "\n".join(lines) if len(lines) > 1 else "no epoch was scored (--eval_every 0)"
