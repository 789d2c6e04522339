"""Draws what few-shot detection does, in one figure: support images, test images, ground truth, heat maps.

python -m examples.demo_figure --obj ring --data_type folder --data_path demo/data --inferences 2
    --backbone efficientnet_lite2 --scorer combined --output demo/figure.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from datasets.check import list_test_items_with_notes
from datasets.mvtec import LabelledDataset, category_folder
from datasets.support import find_support_rounds
from evaluation.config import SCORER_HELP, DataConfig, NetworkConfig, SupportConfig
from evaluation.scoring import score_category
from models.networks import resolve_img_size, scoring_network
from reports.drawing import colour_limits, overlay
from reports.figures import save_raster
from scorers.registry import make_scorer
from utils.choices import RELEASE_SCORER, category_name
from utils.config import Parser, flag
from utils.errors import run_command
from utils.files import require_writable
from utils.stages import StageClock

MAX_COLUMNS = 4  # test images: a normal one and up to three defects
CELL_INCHES, DPI = 1.5, 110
TITLES = ("test image", "ground truth", "heat map")


class Example(NamedTuple):
    """A test image (S, S, 3) uint8, its mask (S, S) bool and score map (S, S), its score and its defect type."""

    image: np.ndarray
    mask: np.ndarray
    scores: np.ndarray
    score: float
    defect_type: str


@dataclass(frozen=True, kw_only=True)
class FigureConfig(NetworkConfig, SupportConfig, DataConfig):
    """The flags of the command; they mean what they mean in test.py."""

    obj: str = flag("the category to show", group="data", convert=category_name, metavar="CATEGORY")
    shot: int = flag("support images", default=2, group="data", least=1, metavar="K")
    checkpoint: Path | None = flag("from train.py (default: no registration training)", default=None, group="network")
    scorer: str = flag(SCORER_HELP, default=RELEASE_SCORER, metavar="NAME")
    output: Path = flag("a .png or .jpg file", default=Path("figure.png"))


def get_args_parser() -> Parser[FigureConfig]:
    """The command line of examples.demo_figure."""
    return Parser(FigureConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Scores the category by the first support set and draws one test image of each kind."""
    config = get_args_parser().parse_config(argv)
    require_writable(config.output, "--output")
    size = resolve_img_size(config.backbone, config.img_size)
    folder = category_folder(config.data_path, config.data_type, config.obj)
    items = list_test_items_with_notes(folder, strict=False)
    support = find_support_rounds(config.support_path, folder, config.shot, config.inferences, size)
    network = scoring_network(config.backbone, config.stn_mode, size, config.checkpoint, config.weights)
    dataset, labels = LabelledDataset(items, size), [item.label for item in items]
    clock = StageClock(torch.device("cpu"))
    scorer = make_scorer(config.scorer)
    results = score_category(network, [scorer], dataset, labels, support.images[:1], clock)
    maps = next(results)[scorer.name].maps.numpy()
    save_figure(config.output, support.images[0], choose_examples(dataset, maps), _limits(maps, labels))
    print(
        f"figure: {config.output}. Left: the {config.shot} support images; right: test images, the defect as labelled, "
        "and the heat map, bright where an image differs from the support images"
    )


def save_figure(target: Path, support: torch.Tensor, examples: Sequence[Example], limits: tuple[float, float]) -> None:
    """Support images (K, 3, S, S) on the left; on the right a column of image, ground truth and heat map per example.

    limits: the scores of the first and the last colour, the same for all heat maps.
    """
    columns = len(examples)
    figure = Figure(figsize=((columns + 1.3) * CELL_INCHES, (len(TITLES) + 0.35) * CELL_INCHES), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, columns + 0.2))
    left.suptitle(f"{len(support)} support images", fontsize=9)
    shown = support[: len(TITLES)]
    for axis, image in zip(left.subplots(len(TITLES), 1), shown, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
    for axis in left.axes:
        axis.set_axis_off()
    grid = right.subplots(len(TITLES), columns, squeeze=False)
    for axis, title in zip(grid[:, 0], TITLES, strict=True):
        axis.set_ylabel(title, fontsize=9)
    for axes, example in zip(grid.T, examples, strict=True):
        _draw_column(axes, example, limits)
    save_raster(target, figure, DPI)


def _draw_column(axes: Sequence[Axes], example: Example, limits: tuple[float, float]) -> None:
    heat = overlay(Image.fromarray(example.image), example.scores, limits)
    truth = np.where(example.mask, np.uint8(255), np.uint8(0))
    for axis, image in zip(axes, (example.image, truth, np.asarray(heat)), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
    axes[0].set_title(example.defect_type, fontsize=9)
    axes[-1].set_xlabel(f"score {example.score:.1f}", fontsize=9)


def choose_examples(dataset: LabelledDataset, maps: np.ndarray) -> list[Example]:
    """The first test image of each kind, the normal one first."""
    first: dict[str, int] = {}
    for index, item in enumerate(dataset.items):
        first.setdefault("normal" if not item.label else item.defect, index)
    chosen = sorted(first, key=lambda kind: (kind != "normal", kind))[:MAX_COLUMNS]
    examples = []
    for kind in chosen:
        item, scores = dataset[first[kind]], maps[first[kind]]
        image, mask = item["image"].permute(1, 2, 0).numpy(), item["mask"].numpy()
        examples.append(Example(image, mask, scores, float(scores.max()), kind))
    return examples


def _limits(maps: np.ndarray, labels: Sequence[int]) -> tuple[float, float]:
    """One scale of colours for all heat maps; the highest score of a normal test image is in the middle."""
    return colour_limits(float(maps.max(axis=(1, 2))[np.array(labels) == 0].max()))


if __name__ == "__main__":
    run_command(main, get_args_parser)
