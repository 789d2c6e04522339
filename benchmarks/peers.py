"""Compares with PatchCore and PaDiM of anomalib (optional): the same weights, support images and test images.

The peers use ResNet-18 with ImageNet weights and their own defaults: normalised input at 224 pixels, layers 2 and 3
(PatchCore) or 1 to 3 (PaDiM). Each is fitted to the support images alone, and to the 22 views that this project makes
of them. Metrics are computed by this project for all methods.

pip install -r requirements-peers.txt
python -m benchmarks.peers             the table, and benchmarks/results/peers_<K>.json
python -m benchmarks.peers --report    the table of that file
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.reference import DATA, TRUNK
from benchmarks.scoring import RESULTS, command_line
from datasets.mvtec import LabelledDataset, category_folder, list_test_items
from datasets.support import find_support_rounds
from evaluation.round_metrics import GroundTruth, RoundMetrics
from models.networks import IMAGENET_MEAN, IMAGENET_STD, resolve_img_size, scoring_network
from models.stn import fuse_conv_bn, without_identity_heads
from scorers.base import Scorer
from scorers.features import FeatureStore, write_support_images
from scorers.maps import score_maps_at
from scorers.registry import make_scorer
from scorers.views import VIEWS_PER_IMAGE, support_views
from utils.choices import LITE_BACKBONE, RELEASE_BACKBONE
from utils.config import script_parser
from utils.errors import UserError, run_command
from utils.files import load_state_dict, require_writable, write_json
from utils.records import provenance

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
OURS = ((RELEASE_BACKBONE, "gaussian"), (RELEASE_BACKBONE, "neighbours"), (LITE_BACKBONE, "combined"))
CORESETS = (0.1, 1.0)  # share of patch embeddings that PatchCore keeps: its default, and all
TIMED = 20  # test images that are scored one at a time for the CPU time

Score = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images (B, 3, S, S) -> scores (B,), maps


class Method(NamedTuple):
    """A method: the size of its input in pixels, and from support images (K, 3, S, S) to its scoring and its bytes."""

    size: int
    fit: Callable[[torch.Tensor], tuple[Score, int]]


def ours(backbone: str, name: str, weights: str) -> Method:
    """A scorer of this project without registration training."""
    size = resolve_img_size(backbone, None)
    weights = "imagenet" if backbone == LITE_BACKBONE else weights
    network = without_identity_heads(scoring_network(backbone, "rotation_scale", size, None, weights))
    fast, scorer = fuse_conv_bn(network), make_scorer(name)

    def fit(support: torch.Tensor) -> tuple[Score, int]:
        store = FeatureStore([scorer], len(support), with_views=True)
        write_support_images(store, range(len(support)), fast, support, VIEWS_PER_IMAGE)
        fitted = scorer.fit(store.prepared[name])
        return (lambda images: _score(scorer, fitted, fast, images)), _bytes({"a": network.state_dict(), "b": fitted})

    return Method(size, fit)


def _score(scorer: Scorer, fitted: dict, network: torch.nn.Module, images: torch.Tensor) -> tuple:
    distances = scorer.distance_maps(fitted, scorer.prepare(network.features(images)))
    return score_maps_at(distances, images.shape[-1], border_weight=scorer.border_weight)


def peer(model_name: str, weights: str, with_views: bool, coreset: float | None) -> Method:
    """A model of anomalib; coreset: of PatchCore."""

    def fit(support: torch.Tensor) -> tuple[Score, int]:
        torch.manual_seed(0)  # PaDiM draws its channels, PatchCore the start of its coreset
        module = importlib.import_module(f"anomalib.models.image.{model_name.lower()}.torch_model")
        layers = ["layer2", "layer3"] if coreset else ["layer1", "layer2", "layer3"]
        kind = getattr(module, f"{model_name}Model")
        model = kind(backbone="resnet18", layers=layers, pre_trained=False)
        state = load_state_dict(Path(weights))
        extractor = model.feature_extractor.feature_extractor
        own = {name: state[name] for name in extractor.state_dict() if name in state}
        if len(own) < len(extractor.state_dict()):
            raise UserError(f"{weights} lacks tensors of ResNet-18", ("weights",))
        extractor.load_state_dict(own)
        views = support_views(support) if with_views else support
        model.train()
        model.feature_extractor.eval()
        for image in views.split(1):
            model(_normalised(image))
        if coreset is None:
            model.fit()
        elif coreset < 1:
            model.subsample_embedding(coreset)
        else:  # all of them: their order does not matter
            model.memory_bank = torch.vstack(model.embedding_store)
        model.eval()
        return (lambda images: _predict(model, images)), _bytes(model.state_dict())

    return Method(resolve_img_size(RELEASE_BACKBONE, None), fit)


def _predict(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        found = model(_normalised(images))
    return found.pred_score.flatten(), found.anomaly_map.flatten(0, -3)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _bytes(state: dict) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def methods(weights: str) -> dict[str, Method]:
    """All methods by name. Raises UserError where anomalib is not installed."""
    if importlib.util.find_spec("anomalib") is None:
        raise UserError(
            "the peers are those of anomalib, which is not installed: pip install -r requirements-peers.txt"
        )
    found = {f"{backbone} {name}": ours(backbone, name, weights) for backbone, name in OURS}
    for with_views, views in ((False, ""), (True, ", 22 views")):
        for coreset in CORESETS[with_views:]:  # the greedy choice among the embeddings of all views takes minutes
            found[f"PatchCore, coreset {coreset}{views}"] = peer("Patchcore", weights, with_views, coreset)
        found[f"PaDiM{views}"] = peer("Padim", weights, with_views, None)
    return found


def measure(category: str, method: Method, shot: int, rounds: int, data: Path) -> dict[str, list]:
    """The metrics of each round, seconds of CPU time per image, and MB of everything that is fitted and the network."""
    folder = category_folder(data, "folder", category)
    items = list_test_items(folder)
    dataset = LabelledDataset(items, method.size)
    read = [dataset[number] for number in range(len(items))]
    images = torch.stack([one["image"] for one in read])
    masks = np.stack([one["mask"] for one in read])
    valid = np.stack([one["valid_mask"] for one in read])
    labels = np.array([item.label for item in items], dtype=bool)
    truth = GroundTruth(labels, masks if masks.any() else None, None if valid.all() else valid, None)
    metrics = RoundMetrics(truth, torch.device("cpu"), tuple(METRICS))
    found: dict[str, list] = {name: [] for name in (*METRICS, "seconds", "megabytes")}
    for support in find_support_rounds(None, folder, shot, rounds, method.size).images:
        score, size = method.fit(support)
        results = [score(batch.float() / 255) for batch in images.split(1)]
        begin = time.process_time()
        for image in images[:TIMED].split(1):
            score(image.float() / 255)
        found["seconds"].append((time.process_time() - begin) / min(TIMED, len(images)))
        found["megabytes"].append(size / 1e6)
        scores, maps = (torch.cat(parts) for parts in zip(*results, strict=True))
        numbers, _ = metrics.of_round(scores.numpy(), maps)
        for name in METRICS:
            found[name].append(numbers[name])
    return found


def report(content: dict) -> str:
    """A Markdown table: image AUROC / pixel AUROC / PRO by category, their means, CPU time and size."""
    measured = content["rounds"]
    categories = list(measured)
    lines = [f"{content['command']} (commit {content['commit']}, anomalib {content['anomalib']}, percent)", ""]
    lines.append(f"| method | {' | '.join(categories)} | mean | ms per image | MB |")
    lines.append("|---" + "|---:" * (len(categories) + 3) + "|")
    return "\n".join(lines + list(_rows(measured, categories)))


def _rows(measured: dict, categories: Sequence[str]) -> Iterator[str]:
    for method in measured[categories[0]]:
        of_method = [measured[category][method] for category in categories]
        cells = [[100 * np.mean(one[name]) for name in METRICS] for one in of_method]
        texts = [" / ".join(f"{value:.1f}" for value in row) for row in [*cells, np.mean(cells, axis=0)]]
        seconds, size = (np.mean([one[name] for one in of_method]) for name in ("seconds", "megabytes"))
        yield f"| {method} | {' | '.join(texts)} | {1000 * seconds:.0f} | {size:.0f} |"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--obj", nargs="+", default=["bottle", "transistor", "screw"], help="categories with masks")
    parser.add_argument("--shot", type=int, default=2, help="support images")
    parser.add_argument("--rounds", type=int, default=3, help="support sets")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--report", action="store_true", help="print the table of the JSON file without measuring")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all methods, prints the table and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    target = args.output / f"peers_{args.shot}.json"
    if args.report:
        print(report(json.loads(target.read_text())))
        return
    require_writable(args.output, "--output", folder=True)
    everything = methods(args.weights)
    content = {"command": command_line("benchmarks.peers", args), **provenance(torch.device("cpu"))}
    content |= {"anomalib": importlib.metadata.version("anomalib"), "rounds": {}}
    for category in args.obj:
        content["rounds"][category] = {}
        for name, method in everything.items():
            found = measure(category, method, args.shot, args.rounds, args.data_path)
            content["rounds"][category][name] = found
            print(f"{category}, {name}: image AUROC {100 * np.mean(found['image_auroc']):.1f}", flush=True)
    write_json(target, content)
    print(f"\n{report(content)}\n\nwritten: {target}")


if __name__ == "__main__":
    run_command(main)
