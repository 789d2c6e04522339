"""The model card of a training: data and their licence, recipe, numbers with their record, how to use the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.statistics import format_summary
from training.config import TrainingConfig
from training.state import outcomes
from utils.choices import DATA_LICENCES
from utils.naming import CheckpointFiles

SELECTED_BY = {
    "best": "the test labels of the target, as in the published protocol: its numbers are optimistic",
    "source": "held-out source categories, without the target",
    "last": "no criterion: it is the last one",
}


def model_card(
    config: TrainingConfig, files: CheckpointFiles, sources: Mapping[str, Sequence[Path]], record: dict
) -> str:
    """The card as Markdown, with the front matter of the Hugging Face hub. record: of train.py."""
    root = config.source_path or config.data_path
    images = ", ".join(f"{name} ({len(paths)})" for name, paths in sources.items())
    selected = record["selected_epoch"]
    settings = {**config.results_part(), "weights": config.weights, "seed": config.seed}
    settings |= {
        "METHOD_VERSION": record["fingerprint"]["method_version"],
        "commit": record["commit"],
        "device": record["device"],
        **record["versions"],
    }
    rows = [
        (name, *(format_summary(entry[metric]) for metric in ("image_auroc", "pixel_auroc")))
        for name, entry in outcomes(record["epochs"], selected).items()
    ]
    command = f"python test.py --config {files.record.name} --checkpoint {files.portable[0].name}"
    return f"""---
library_name: regad
tags: [anomaly-detection, few-shot-learning]
license: other
license_name: see-licence-of-the-training-data
---

# RegAD for {config.obj}, K = {config.shot}, {config.backbone}, {config.stn_mode}

Networks of [Registration based Few-Shot Anomaly Detection](https://arxiv.org/abs/2207.07361), trained to register
normal images of other categories than `{config.obj}`. Given a few normal images of a category, they compute heat maps
and scores of anomalies.

## Data

- Trained on the normal training images of: {images}; data set `{config.data_type}`.
- Licence of the data: {data_licence(root, config)}.
- The epoch ({selected} of {config.epochs}) was selected by {SELECTED_BY[config.select]}.

## Recipe

{_table(("setting", "value"), settings.items())}

## Numbers

Mean +- standard deviation over {config.inferences} support sets, on the test images of `{config.obj}`.
Record: `{files.record.name}`.

{_table(("weights", "image AUROC", "pixel AUROC"), rows) if rows else "No epoch was scored."}

## Use

```bash
{command}
```
"""


def data_licence(root: Path, config: TrainingConfig) -> str:
    """The licence of the training data, as far as it is known: of the data set, and licence files in its folder."""
    licence = None if config.source_path else DATA_LICENCES.get(config.data_type)
    names = sorted(path.name for path in root.iterdir() if path.is_file() and path.name.lower().startswith("licen"))
    files = f"see {', '.join(names)} in the data folder" if names else None
    return "; ".join(filter(None, [licence, files])) or "unknown to this program; state it before you share the weights"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
