"""Times the scoring of one category by stage, and one round of the plain definition for comparison.

python -m benchmarks.scoring --shot 2                        measure the scorer of the release
python -m benchmarks.scoring --shot 2 --scorer neighbours    measure another scorer too
python -m benchmarks.scoring --report                        print the table of all measurements

The measurements are in benchmarks/results/scoring_<category>_<shot>_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks import plain
from benchmarks.reference import DATA, GOLDEN_CHECKPOINT, draw_support_images
from datasets.images import read_image
from datasets.mvtec import LabelledDataset, LabelledImage, category_folder, list_test_items
from datasets.support import read_support_images
from evaluation.scoring import SCORING_BATCH, compute_test_features, score_rounds
from inspection.detector import FewShotDetector
from models.regad import load_checkpoint
from models.stn import STNResNet, fuse_conv_bn
from scorers.features import images_per_pass
from scorers.registry import SCORERS, make_scorer
from scorers.views import support_views
from utils.choices import RELEASE_SCORER
from utils.config import script_parser
from utils.devices import command_device, resolve_device, seed_everything
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT, require_writable, write_json
from utils.records import peak_memory_mb, provenance
from utils.stages import StageClock

STAGES = ("decode", "network", "gaussian", "distance", "smoothing", "metrics")
RESULTS = PROJECT_ROOT / "benchmarks" / "results"
ONE_IMAGE_REPEATS = 31
NETWORK_REPEATS = 5  # timings of one batch; the median is reported


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--obj", default="screw", help="the category to score")
    parser.add_argument("--shot", type=int, default=2, help="support images")
    parser.add_argument("--rounds", type=int, default=10, help="support sets")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--checkpoint", type=Path, default=GOLDEN_CHECKPOINT, help="with stn_mode rotation_scale")
    parser.add_argument("--img_size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--batch_size", type=int, help="images per network pass (default: that of test.py)")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--scorer", choices=list(SCORERS), help="also time this scorer, before that of the release")
    parser.add_argument("--no_plain", action="store_true", help="skip the plain definition, which takes minutes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--report", action="store_true", help="print the table of the JSON files without measuring")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the measurements, prints them as tables and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    if args.report:
        print(report(args.output))
        return
    require_writable(args.output, "--output", folder=True)
    device = command_device(args.device)
    seed_everything(0)
    folder = category_folder(args.data_path, "folder", args.obj)
    items = list_test_items(folder)
    draws = draw_support_images(folder, args.shot, args.rounds, seed=0)
    network = load_checkpoint(args.checkpoint, "rotation_scale", args.img_size).stn.eval().to(device)
    args.batch_size = args.batch_size or images_per_pass(network, device, SCORING_BATCH)

    other = _time_fast(network, items, draws, device, args, args.scorer) if args.scorer else None
    fast = _time_fast(network, items, draws, device, args, RELEASE_SCORER)
    print_seconds(f"{args.rounds} rounds, {len(items)} test images, K = {args.shot}", fast["seconds"], STAGES)
    rest = fast["total"] - fast["seconds"]["decode"] - fast["seconds"]["network"]
    print(f"outside decode and network: {rest / fast['total']:.1%} of {fast['total']:.1f} s")
    print(f"peak resident memory: {fast['peak_memory_mb']:.0f} MB")
    content = {"command": command_line("benchmarks.scoring", args), **provenance(device), "fast": fast}
    if other:
        content[args.scorer] = other
        print_seconds(f"the same with the scorer {args.scorer}", other["seconds"], other["seconds"])
        print(f"{args.scorer}: {other['total'] / fast['total']:.2f} times the time of {RELEASE_SCORER}, ", end="")
        print(f"peak resident memory {other['peak_memory_mb']:.0f} MB")
        content["one_image"] = _time_one_image(network, draws[0], args.scorer, args.device)
    content["network"] = _time_network(network, device, args)
    if not args.no_plain:
        # in a separate process, which uses torch's default memory handling
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            content["plain_round"] = pool.submit(_time_plain_anew, args.checkpoint, items, draws[0], args).result()
        seconds = content["plain_round"]["seconds"]
        print_seconds("one round of the plain definition", seconds, seconds)
        content["times_faster"] = args.rounds * sum(seconds.values()) / fast["total"]
        print(f"{args.rounds} rounds are {content['times_faster']:.1f} times faster than {args.rounds} plain rounds")
        offset = abs(np.subtract(content["plain_round"]["aurocs"], fast["aurocs"][0])).max()
        print(f"largest difference of an AUROC of round 0: {offset:.1e}")
    target = args.output / f"scoring_{args.obj}_{args.shot}_{device.type}.json"
    write_json(target, content)
    print(f"written: {target}")


def report(results: Path) -> str:
    """Markdown table of the JSON files in `results`.

    Raises:
        UserError: a file contains no measurement of the plain definition.
    """
    lines = ["| device | K | s per round | plain definition | times faster | outside decode and network | memory |"]
    lines.append("|---" * 7 + "|")
    contents = {path: json.loads(path.read_text()) for path in sorted(results.glob("scoring_*.json"))}
    for path, content in contents.items():
        if "plain_round" not in content:
            raise UserError(f"{path} was measured with --no_plain, so it has no reference; measure it again")
        fast, plain_seconds = content["fast"], sum(content["plain_round"]["seconds"].values())
        seconds = fast["total"] / len(fast["aurocs"])
        rest = 1 - (fast["seconds"]["decode"] + fast["seconds"]["network"]) / fast["total"]
        cells = (content["device"], path.stem.split("_")[-2], f"{seconds:.2f}", f"{plain_seconds:.0f}")
        cells += (f"{content['times_faster']:.0f}", f"{rest:.0%}", f"{fast['peak_memory_mb'] / 1024:.1f} GB")
        lines.append(f"| {' | '.join(cells)} |")
        for name in SCORERS:
            if name in content:
                other = content[name]
                cells = (content["device"], f"{cells[1]}, {name}", f"{other['total'] / len(other['aurocs']):.2f}")
                share = 1 - (other["seconds"]["decode"] + other["seconds"]["network"]) / other["total"]
                cells += ("", "", f"{share:.0%}", f"{other['peak_memory_mb'] / 1024:.1f} GB")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time_fast(
    network: STNResNet,
    items: list[LabelledImage],
    draws: list[list[Path]],
    device: torch.device,
    args: argparse.Namespace,
    scorer: str,
) -> dict:
    """Times the project's implementation, from image files to AUROCs."""
    clock = StageClock(device)
    begin = time.perf_counter()
    fast = fuse_conv_bn(network.to(device))
    with clock("decode"):
        rounds = [read_support_images(paths, args.img_size) for paths in draws]
    dataset, labels = LabelledDataset(items, args.img_size), [item.label for item in items]
    test = compute_test_features(fast, [make_scorer(scorer)], dataset, labels, clock, args.batch_size, args.num_workers)
    scored = [results[scorer] for results in score_rounds(fast, test, rounds, clock, args.batch_size)]
    results = [(result.numbers["image_auroc"], result.numbers["pixel_auroc"]) for result in scored]
    total = time.perf_counter() - begin
    return {"total": total, "seconds": clock.seconds, "peak_memory_mb": peak_memory_mb(), "aurocs": results}


def _time_one_image(network: STNResNet, support: list[Path], scorer: str, device: str) -> dict:
    """Milliseconds of one image alone through FewShotDetector.score and through its network, medians in turn."""
    detector = FewShotDetector(network, device, scorer=scorer).fit(support, for_threshold=False)
    image = read_image(support[0], detector.size)
    inputs = detector.on_device([detector.decode(image).square])
    fast, times = fuse_conv_bn(network), {"score": [], "network": []}
    for _ in range(ONE_IMAGE_REPEATS):
        for name, run in (("score", lambda: detector.score([image])), ("network", lambda: fast.features(inputs))):
            begin = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - begin))
    score, alone = (float(np.median(times[name][1:])) for name in times)  # the first call warms up
    print(f"one image alone, {len(support)} support images: {score:.1f} ms, {score / alone:.2f} times the network's")
    return {"score_ms": score, "network_ms": alone, "ratio": score / alone}


def _time_network(network: STNResNet, device: torch.device, args: argparse.Namespace) -> dict:
    """Milliseconds per image of the forward pass with un-warping: eager NCHW and the fused copy.

    Measured on colour images. Grey images take less time.
    """
    images = torch.rand(args.batch_size, 3, args.img_size, args.img_size, device=device)
    fast, clock = fuse_conv_bn(network), StageClock(device)
    versions = {"eager": network.features, "fused": fast.features}
    times = {name: [] for name in versions}
    for _ in range(NETWORK_REPEATS + 1):  # alternating, so that other load affects both
        for name, features in versions.items():
            clock.seconds.clear()
            with clock(name):
                features(images)
            times[name].append(1000 * clock.seconds[name] / len(images))
    eager, quick = (float(np.median(times[name][1:])) for name in versions)  # the first call is a warm-up
    errors = [
        float((a - b).norm() / b.norm()) for a, b in zip(fast.features(images), network.features(images), strict=True)
    ]
    print(f"network: eager {eager:.1f}, fused {quick:.1f} ms per image: {eager / quick:.2f} times faster, ", end="")
    print(f"largest relative difference of the features {max(errors):.1e}")
    return {"eager_ms": eager, "folded_ms": quick, "times_faster": eager / quick, "relative_error": max(errors)}


def time_plain(
    network: STNResNet, items: list[LabelledImage], support: list[Path], img_size: int, device: torch.device
) -> dict:
    """Times one round of the plain definition on `device`, in the processing order of the release.

    Nothing is reused. Test images go through the network one by one, all support views in one batch.
    """
    network, clock = network.to(device), StageClock(device)

    def embed(images: torch.Tensor, batch_size: int) -> torch.Tensor:
        with torch.no_grad():
            batches = [plain.forward(network, batch.to(device))[1] for batch in images.split(batch_size)]
        return plain.embedding([torch.cat(layer) for layer in zip(*batches, strict=True)])

    with clock("decode"):
        images = [LabelledDataset(items, img_size)[index] for index in range(len(items))]
        images = {key: torch.stack([image[key] for image in images]) for key in ("image", "mask")}
        images_of_round = read_support_images(support, img_size)
    with clock("network"):
        test = embed(images["image"].float() / 255, batch_size=1)
        views = embed(support_views(images_of_round), batch_size=22 * len(support))
    with clock("gaussian and distance"):
        distances = plain.distances(views, test).unflatten(1, (img_size // 4, -1))
    with clock("smoothing"):
        maps = plain.score_maps(distances, img_size)
    with clock("metrics"):
        labels = np.array([item.label for item in items])
        aurocs = plain.aurocs(maps, labels, images["mask"].numpy())
    return {"seconds": clock.seconds, "aurocs": aurocs}


def _time_plain_anew(
    checkpoint: Path, items: list[LabelledImage], support: list[Path], args: argparse.Namespace
) -> dict:
    network = load_checkpoint(checkpoint, "rotation_scale", args.img_size).stn.eval()
    device = resolve_device(args.device)
    if device.type == "cuda":  # the memory of the CPU keeps torch's default
        device = command_device(args.device)
    return time_plain(network, items, support, args.img_size, device)


def print_seconds(title: str, seconds: dict[str, float], stages: Sequence[str] | dict) -> None:
    """Prints seconds and share of each stage in `stages`, in order, and the sum of all `seconds`."""
    total = sum(seconds.values())
    print(f"\n{title}\n{'stage':24}{'seconds':>9}{'share':>8}")
    for stage in stages:
        print(f"{stage:24}{seconds[stage]:9.2f}{seconds[stage] / total:8.1%}")
    print(f"{'all':24}{total:9.2f}")


def command_line(module: str, args: argparse.Namespace) -> str:
    """The command for the record: the module and all arguments that have a value, including defaults."""
    words = ["python", "-m", module]
    for key, value in vars(args).items():
        if value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [] if value is True else [value]
            words += [f"--{key}", *map(str, values)]
    return shlex.join(words)


if __name__ == "__main__":
    run_command(main)
