"""Plots a training run, and writes it as event files of TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.metrics import METRIC_NAMES
from reports.figures import save_figure


def save_curve(target: Path, history: Sequence[dict], scored: str) -> None:
    """Plots the loss, and image and pixel AUROC, against the epoch.

    AUROCs are means over rounds, with a band of one standard deviation.

    Args:
        target: the PNG file; PDF and SVG are written next to it.
        history: one entry per epoch: "epoch", "loss" (None before training) and, if the epoch was scored, "image_auroc"
            and "pixel_auroc" as given by evaluation.statistics.summary.
        scored: the names of the scored categories, for the label of the axis.
    """
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
    save_figure(target, figure)


class Events:
    """Writes losses of steps and metrics of epochs as event files in `folder`, by the number of training steps so far.

    history: the entries of the finished epochs; later events in the folder are purged.
    """

    def __init__(self, folder: Path, history: Sequence[dict]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # of an optional package

        self.step = sum(entry["steps"] for entry in history)
        if not history:
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=self.step + 1 if history else None)

    def add(self, entry: dict, losses: Sequence[float]) -> None:
        """Writes an epoch: its entry of the history, and the losses of its steps."""
        for number, loss in enumerate(losses, start=self.step + 1):
            self.writer.add_scalar("loss", loss, number)
        self.step += entry["steps"]
        scalars = {"epoch": entry["epoch"], "learning rate": entry["lr"]}
        for prefix, scores in (("", entry), ("held out/", entry.get("held_out", {}))):
            scalars |= {f"{prefix}{name}": scores[name]["mean"] for name in METRIC_NAMES if scores.get(name)}
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, self.step)
        self.writer.flush()


def _plot_metric(axis: Axes, scored: Sequence[dict], metric: str, colour: str) -> None:
    if not scored:
        return
    epochs, means = [e["epoch"] for e in scored], [e[metric]["mean"] for e in scored]
    spread = [e[metric]["sd"] or 0.0 for e in scored]
    axis.plot(epochs, means, ".-", color=colour, label=metric.replace("_auroc", " AUROC"))
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
