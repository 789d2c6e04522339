"""Does registration training help? Prints the table of results/registration, from its records.

python -m benchmarks.registration results/registration

The folder holds a results folder of reproduce.py for each recipe. Differences from the untrained network are paired by
support set; [low, high] is their 95 % interval. A recipe helps in a category when it changes the image AUROC by +1 or
more with an interval above 0, and it helps when it does so in three of four categories.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.metrics import METRIC_NAMES
from evaluation.statistics import summary
from experiments.results import Results, kind_name, read_results
from experiments.tables import column_of, known
from utils.choices import WEIGHTS
from utils.config import script_parser
from utils.errors import UserError, run_command

METRICS = ("image_auroc", "pixel_auroc", "pro")
LEAST, OF_FOUR = 1.0, 3  # points of image AUROC, and in how many of four categories
LABELS = {"best": "best on test"}


def differences(results: Results, metric: str, weights: str, scorer: str) -> dict[str, np.ndarray]:
    """Category -> trained minus untrained, (trainings, rounds) in percent, where both were scored."""
    (shot,) = results.shots
    before, after = (
        known(column_of(results, metric, shot, kind_name(name, scorer))) for name in ("untrained", weights)
    )
    return {name: np.array(entry.trainings) - before[name].rounds for name, entry in after.items() if name in before}


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of (trainings, rounds)."""
    found = summary(values if len(values) > 1 else values[0])
    return found["mean"], *(found["interval95"] or (np.nan, np.nan))


def helped(image: dict[str, np.ndarray]) -> list[str]:
    """The categories whose image AUROC rises by LEAST or more, with an interval above 0."""
    found = {name: interval(values) for name, values in image.items()}
    return [name for name, (mean, low, _) in found.items() if mean >= LEAST and low > 0]


def verdict(image: dict[str, np.ndarray]) -> str:
    """Whether a recipe helps, in words."""
    good = helped(image)
    text = f"+{LEAST:g} or more, interval above 0, in {len(good)} of {len(image)} categories"
    if len(image) < 4:
        return f"{text}; four are needed"
    return f"{text}: training {'helps' if 4 * len(good) >= OF_FOUR * len(image) else 'was not found to help'}"


def _cell(values: np.ndarray | None) -> str:
    if values is None:
        return "not run"
    mean, low, high = interval(values)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _mean(of: dict[str, np.ndarray]) -> str:
    shapes = {values.shape for values in of.values()}
    return _cell(np.mean(list(of.values()), axis=0)) + f" ({len(of)})" if len(shapes) == 1 else "not run"


def table(recipes: dict[str, Results], metric: str, categories: Sequence[str]) -> list[str]:
    """Lines of Markdown: the untrained network, then the differences of each recipe, scorer and selection."""
    lines = [
        "",
        f"### {METRIC_NAMES[metric]}",
        "",
        f"| recipe | scorer | weights | {' | '.join(categories)} | mean (of) |",
    ]
    lines.append("|---" * (len(categories) + 4) + "|")
    first = next(iter(recipes.values()))
    for scorer in first.scorers:
        column = known(column_of(first, metric, first.shots[0], kind_name("untrained", scorer)))
        texts = [f"{column[name].mean:.1f}" if name in column else "not run" for name in categories]
        lines.append(f"| untrained | {scorer} | | {' | '.join(texts)} | |")
    for recipe, results in recipes.items():
        for scorer in results.scorers:
            for weights in (name for name in WEIGHTS if name != "untrained"):
                if of := differences(results, metric, weights, scorer):
                    texts = [_cell(of.get(name)) for name in categories]
                    start = f"| {recipe} | {scorer} | {LABELS.get(weights, weights)} |"
                    lines.append(f"{start} {' | '.join(texts)} | {_mean(of)} |")
    return lines


def provenance(recipe: str, results: Results, folder: Path) -> str:
    """A line on how a recipe was run. The records of train.py are in `folder`/training."""
    commits = sorted(
        {(record["commit"] or "none")[:7] for key, (record, *_) in results.records.items() if key.kind != "untrained"}
    )
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("training/*.json"))]
    seconds = [sum(entry["elapsed_seconds"] for entry in record["epochs"]) for record in records]
    took = f"; {len(seconds)} trainings of {min(seconds):.0f} to {max(seconds):.0f} s" if seconds else ""
    return f"- {recipe}: commit {', '.join(commits)}{took}"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="holds a results folder of reproduce.py for each recipe")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, the verdicts, and how each recipe was run."""
    args = get_args_parser().parse_args(argv)
    folders = [path for path in sorted(args.folder.glob("*/")) if any(path.glob("*_last.json"))]
    if not folders:
        raise UserError(f"{args.folder} has no folder with the records of a recipe")
    order = sorted(folders, key=lambda path: (path.name != "released", path.name))
    recipes = {path.name: read_results(path) for path in order}
    print("Trained minus untrained, in points, paired by support set, with 95 % intervals.")
    for shot in sorted({results.shots[0] for results in recipes.values()}):
        print(f"\n## K = {shot}")
        of_shot = {name: results for name, results in recipes.items() if results.shots[0] == shot}
        categories = sorted({category for results in of_shot.values() for category, _, _ in results.records})
        for metric in METRICS:
            print("\n".join(table(of_shot, metric, categories)))
    print()
    for recipe, results in recipes.items():
        for scorer in results.scorers:
            print(f"- {recipe}, {scorer}, last epoch: {verdict(differences(results, METRICS[0], 'last', scorer))}")
    print("\n" + "\n".join(provenance(name, results, args.folder / name) for name, results in recipes.items()))


if __name__ == "__main__":
    run_command(main)
