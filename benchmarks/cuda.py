"""Measures on CUDA what cannot be known without it: agreement with the CPU, times, memory, a profile.

bash benchmarks/cuda.sh --packed packed            the main parts within 10 minutes; see benchmarks.pack
bash benchmarks/cuda.sh --parts equality steps     some parts, in one process and without a limit
bash benchmarks/cuda.sh --device cpu --small       a trial: shows that the parts run, measures nothing

Main parts: device (versions, memory, rate of matrix products), equality (features, distance maps, AUROCs, scores of
predict.py and float64 losses against the CPU), network (images per second, by memory format), distances (images per
second of each scorer), steps (training steps by K, memory format and precision) and cell (epochs of train.py at the
smallest K, and from them the hours of MVTec AD's 45 cells). On request: compiled (training steps by torch.compile),
scoring (ten rounds at each K, by stage, and of the plain definition), plain (training steps of the plain definition),
profile (torch.profiler of training steps) and predict (images per second with images drawn).

Each part is printed and written to <output>/cuda_<device>_<part>.json when it ends; one that fails does not stop the
others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity

import train
from benchmarks import predict as predict_benchmark
from benchmarks import scoring as scoring_benchmark
from benchmarks import training as training_benchmark
from benchmarks.pack import CHECKPOINT_FILE, DATA_FOLDER, WEIGHTS_FILE
from benchmarks.reference import DATA, GOLDEN_CHECKPOINT, TRUNK, draw_support_images
from benchmarks.scoring import RESULTS, command_line
from benchmarks.training import LR, MOMENTUM, STN_MODE
from datasets.cache import SourceImages
from datasets.episodes import Episode, draw_episodes
from datasets.mvtec import LabelledDataset, category_folder, list_source_images, list_test_items
from datasets.support import read_support_images
from evaluation.scoring import SCORING_BATCH, RoundResult, compute_test_features, score_rounds
from examples.demo_data import write_dataset
from inspection.detector import FewShotDetector
from models.regad import RegAD, checkpoint, load_checkpoint, untrained
from models.stn import STNResNet, fuse_conv_bn
from scorers.features import CUDA_IMAGES, images_per_pass
from scorers.registry import SCORERS, make_scorer
from scorers.views import VIEWS_PER_IMAGE
from training.loop import Trainer, count_images
from utils.config import script_parser
from utils.devices import command_device, seed_everything
from utils.errors import run_command
from utils.files import require_writable, save_tensors, whole_file, write_json
from utils.naming import CheckpointFiles
from utils.records import peak_memory_mb, provenance
from utils.stages import StageClock

MVTEC_SOURCES = 3629 * 14 / 15  # normal training images of MVTec AD without one of its categories, on average
MVTEC_CATEGORIES, PAPER_EPOCHS, PAPER_SHOTS = 15, 50, (2, 4, 8)
VARIANTS = {  # of a training step: arguments of Trainer
    "float32, channels first": {},
    "float32, channels last": {},
    "tf32": {"tf32": True},
    "bf16": {"bf16": True},
}
COMPILED = {"compiled": {"compiled": True}, "bf16, compiled": {"bf16": True, "compiled": True}}
LAYOUTS = {  # variants whose memory format is given; the others have that of models.stn.layout
    "float32, channels first": torch.contiguous_format,
    "float32, channels last": torch.channels_last,
}
TOLERANCES = {"features": 1e-4, "distances": 1e-4, "aurocs": 1e-3, "predict": 1e-4, "losses": 1e-8}
PROFILED_STEPS = 3
SMALL = {"shots": [2], "rounds": 2, "img_size": 64, "batch_size": 2, "steps": 1, "images": 51}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(MAIN_PARTS), help="what is measured")
    parser.add_argument("--device", default="cuda", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--small", action="store_true", help="drawn data and few steps, to try the parts")
    parser.add_argument(
        "--packed", type=Path, help="folder of benchmarks.pack, in place of --data_path, --checkpoint and --weights"
    )
    parser.add_argument("--obj", default="screw", help="the target category")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--checkpoint", type=Path, default=GOLDEN_CHECKPOINT, help="with stn_mode rotation_scale")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--shots", type=int, nargs="+", default=[2, 4, 8], help="numbers of support images")
    parser.add_argument("--rounds", type=int, default=10, help="support sets")
    parser.add_argument("--img_size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="queries of a training step")
    parser.add_argument("--steps", type=int, default=30, help="measured training steps of each kind")
    parser.add_argument("--images", type=int, default=2000, help="images for predict.py")
    parser.add_argument("--num_workers", type=int, default=8, help="threads that decode images")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the files")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts one after the other; exit code 1 if one failed or differs from the CPU beyond its tolerance."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    device, begin, failed = command_device(args.device), time.perf_counter(), []
    name = re.sub(r"[^A-Za-z0-9]+", "-", provenance(device)["device"]).strip("-").lower()
    if args.packed:
        vars(args).update(data_path=args.packed / DATA_FOLDER, weights=str(args.packed / WEIGHTS_FILE))
        args.checkpoint = args.packed / CHECKPOINT_FILE
    with tempfile.TemporaryDirectory() as scratch:
        if args.small:
            _draw_small(args, Path(scratch))
        for part in args.parts:
            print(f"\n== {part}", flush=True)
            seed_everything(0)
            started = time.perf_counter()
            try:
                found = PARTS[part](args, device, Path(scratch))
                failed += [part] if found.get("beyond_tolerance") else []
            except Exception:  # a lent device is too precious to lose the other parts
                traceback.print_exc()
                failed.append(part)
                continue
            about = {"command": command_line("benchmarks.cuda", args), **provenance(device)}
            target = args.output / f"cuda_{name}_{part}.json"
            write_json(target, {**about, "part_seconds": time.perf_counter() - started, **found})
            print(f"{part}: {time.perf_counter() - begin:.0f} s; written: {target}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _draw_small(args: argparse.Namespace, scratch: Path) -> None:
    """Changes the arguments to a trial with random heads, without --packed on drawn data with random weights."""
    vars(args).update(SMALL, num_workers=0)
    if not args.packed:
        vars(args).update(obj="ring", data_path=scratch / "data", weights="none")
        write_dataset(args.data_path, categories=("ring", "weave"), train=6, good=4, defective=1, size=args.img_size)
    args.checkpoint = scratch / "small.pt"
    save_tensors(args.checkpoint, checkpoint(RegAD(STN_MODE, args.img_size), {}))


def _network(args: argparse.Namespace) -> STNResNet:
    return load_checkpoint(args.checkpoint, STN_MODE, args.img_size).stn.eval()


def _relative(one: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return float((one.cpu() - reference).norm() / reference.norm())


def measure_device(_args: argparse.Namespace, device: torch.device, _scratch: Path) -> dict:
    """Versions, memory, and the rate of matrix products by type: what the other figures are to be compared with."""
    side, found = (4096 if device.type == "cuda" else 512), {}
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.rand(side, side, device=device, dtype=dtype)
        found[str(dtype)] = 2e-12 * side**3 / _seconds(lambda one=one: one @ one, 10, device)
    memory = [value / 2**30 for value in torch.cuda.mem_get_info(device)] if device.type == "cuda" else None
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    print(f"free and total GB: {memory}; TFLOP/s of matrix products: {found}")
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gb": memory, "tflops": found}


def measure_distances(args: argparse.Namespace, device: torch.device, _scratch: Path) -> dict:
    """Images per second of each scorer's distances, for the largest K."""
    network, found = fuse_conv_bn(_network(args).to(device)), {}
    views, batch = VIEWS_PER_IMAGE * max(args.shots), images_per_pass(network, device, SCORING_BATCH)
    inputs = [torch.rand(count, 3, args.img_size, args.img_size, device=device) for count in (views, batch)]
    for name in SCORERS:
        scorer = make_scorer(name)
        support, test = (scorer.prepare(network.features(images)) for images in inputs)
        fit = _seconds(lambda scorer=scorer, support=support: scorer.fit(support), 3, device)
        fitted = scorer.fit(support)
        seconds = _seconds(lambda scorer=scorer, test=test: scorer.distance_maps(fitted, test), args.steps, device)  # noqa: B023
        found[name] = {"fit_seconds": fit, "images_per_second": batch / seconds}
        print(f"{name:12}{fit:8.3f} s to fit{found[name]['images_per_second']:10.0f} images per second")
    return {"views": views, "distances": found}


def measure_equality(args: argparse.Namespace, device: torch.device, _scratch: Path) -> dict:
    """The largest differences from the CPU. AUROCs and losses: absolute; the others: relative, by norm."""
    folder = category_folder(args.data_path, "folder", args.obj)
    draws = draw_support_images(folder, min(args.shots), 2, seed=0)
    cpu = torch.device("cpu")
    images = read_support_images([item.image for item in list_test_items(folder)[:16]], args.img_size)
    ours, reference = (fuse_conv_bn(_network(args).to(on)).features(images.to(on)) for on in (device, cpu))
    found = {"features": max(_relative(one, other) for one, other in zip(ours, reference, strict=True))}
    for scorer in SCORERS:
        rounds = [_rounds(args, on, scorer, draws) for on in (device, cpu)]
        for one, other in zip(*rounds, strict=True):
            pairs = {"distances": _relative(one.distances, other.distances)}
            names = [name for name, value in other.numbers.items() if value is not None]
            pairs["aurocs"] = max(abs(one.numbers[name] - other.numbers[name]) for name in names)
            for name, difference in pairs.items():
                found[f"{name} {scorer}"] = max(difference, found.get(f"{name} {scorer}", 0.0))
        fitted = [FewShotDetector(_network(args), on.type, scorer=scorer).fit(draws[0]) for on in (device, cpu)]
        scores = [torch.from_numpy(one.score(list(images))[0]) for one in fitted]
        found[f"predict {scorer}"] = _relative(*scores)
    losses = [_losses(args, on) for on in (device, cpu)]
    found["losses"] = float(np.abs(np.subtract(*losses)).max())
    beyond = [name for name, value in found.items() if not value <= TOLERANCES[name.split()[0]]]
    for name, value in found.items():
        print(f"{name:24}{value:10.1e}{'  beyond tolerance' if name in beyond else ''}")
    return {"largest_difference": found, "tolerances": TOLERANCES, "beyond_tolerance": beyond}


def _rounds(
    args: argparse.Namespace, device: torch.device, scorer: str, draws: Sequence[Sequence[Path]]
) -> list[RoundResult]:
    """The results of rounds with the support images `draws`."""
    items = list_test_items(category_folder(args.data_path, "folder", args.obj))
    dataset, labels, clock = LabelledDataset(items, args.img_size), [item.label for item in items], StageClock(device)
    network = fuse_conv_bn(_network(args).to(device))
    test = compute_test_features(network, [make_scorer(scorer)], dataset, labels, clock, None, args.num_workers)
    rounds = [read_support_images(paths, args.img_size) for paths in draws]
    return [one[scorer] for one in score_rounds(network, test, rounds, clock, all_metrics=True)]


def _losses(args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of six training steps in float64, from the same weights and images on every device."""
    seed_everything(0)
    trainer = Trainer(untrained(args.weights, STN_MODE, args.img_size).double().to(device), LR, MOMENTUM)
    trainer.model.train()
    images = torch.rand(4, 3, args.img_size, args.img_size, dtype=torch.float64).to(device)
    return [trainer.step(images, images.roll(1, 0)[:, None], StageClock()).item() for _ in range(6)]


def measure_network(args: argparse.Namespace, device: torch.device, _scratch: Path) -> dict:
    """Images per second of the scoring network, by memory format and batch size."""
    network = fuse_conv_bn(_network(args).to(device))
    found = {}
    for batch in (SCORING_BATCH, CUDA_IMAGES):
        images = torch.rand(batch, 3, args.img_size, args.img_size, device=device)
        for name, layout in (("channels last", torch.channels_last), ("channels first", torch.contiguous_format)):
            network.to(memory_format=layout)
            inputs = images.to(memory_format=layout)
            seconds = _seconds(lambda inputs=inputs: network.features(inputs), args.steps, device)
            found[f"{name}, batch {batch}"] = batch / seconds
    for name, speed in found.items():
        print(f"{name:28}{speed:10.0f} images per second")
    return {"images_per_second": found}


def _seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of `work`, mean over `repeats` calls in a row after some to warm up."""
    for _ in range(min(3, repeats)):
        work()
    _synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronise(device)
    return (time.perf_counter() - begin) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_scoring(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """benchmarks.scoring at the smallest and the largest K; the plain definition at the smallest."""
    found = {}
    for shot in dict.fromkeys((min(args.shots), max(args.shots))):
        given = f"--obj {args.obj} --shot {shot} --rounds {args.rounds} --img_size {args.img_size}".split()
        given += ["--data_path", str(args.data_path), "--checkpoint", str(args.checkpoint), "--device", args.device]
        given += ["--num_workers", str(args.num_workers), "--scorer", "neighbours", "--output", str(scratch)]
        is_quick = shot > min(args.shots) or args.small  # the plain definition takes minutes
        _reset_memory(device)
        scoring_benchmark.main([*given, *(["--no_plain"] if is_quick else [])])
        file = scratch / f"scoring_{args.obj}_{shot}_{device.type}.json"
        found[str(shot)] = json.loads(file.read_text()) | {"device_memory_mb": _device_memory_mb(device)}
    return {"by_shot": found}


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _device_memory_mb(device: torch.device) -> float | None:
    """The highest memory of tensors on the device since `_reset_memory`, in MB of 2**20 bytes; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _training_data(
    args: argparse.Namespace, device: torch.device, scratch: Path, shot: int
) -> tuple[SourceImages, list[Episode]]:
    """The source images and the full episodes of an epoch."""
    sources = list_source_images(args.data_path, "folder", args.obj)
    names = {category: [path.name for path in paths] for category, paths in sources.items()}
    episodes = draw_episodes(names, shot, args.batch_size, seed=0, epoch=1)
    full = [episode for episode in episodes if len(episode.query) == args.batch_size]
    return SourceImages(sources, args.img_size, scratch / "cache", args.num_workers, device), full


def measure_steps(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """Training steps by K and variant."""
    return {"steps": _steps(args, device, scratch, VARIANTS)}


def measure_compiled(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """Training steps by torch.compile; compiling takes minutes."""
    return {"steps": _steps(args, device, scratch, COMPILED)}


def _steps(args: argparse.Namespace, device: torch.device, scratch: Path, variants: dict[str, dict]) -> dict:
    found = {}
    for shot in args.shots:
        images, episodes = _training_data(args, device, scratch, shot)
        for variant, options in variants.items():
            row = _time_steps(args, device, images, episodes, variant, options)
            found[f"K = {shot}, {variant}"] = row
            print(f"K = {shot}, {variant:26}", json.dumps(row), flush=True)
    return found


def measure_plain(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """Training steps of the plain definition, by benchmarks.training."""
    plain = argparse.Namespace(**vars(args), shot=min(args.shots))
    (scratch / "plain").mkdir(exist_ok=True)
    return {"with_the_plain_definition": training_benchmark.time_steps(plain, device, scratch / "plain")}


def _time_steps(
    args: argparse.Namespace,
    device: torch.device,
    images: SourceImages,
    episodes: Sequence[Episode],
    variant: str,
    options: dict,
) -> dict:
    """Seconds and images per second of a step with its batch, its share outside the network, and memory."""
    _reset_memory(device)
    trainer = Trainer(untrained(args.weights, STN_MODE, args.img_size).to(device), LR, MOMENTUM, **options)
    trainer.model.train()
    if variant in LAYOUTS:
        trainer.model.to(memory_format=LAYOUTS[variant])
    clock, turn = StageClock(device), itertools.cycle(episodes)

    def step(stages: StageClock) -> None:
        with stages("batch"):
            query, support = images.episode(next(turn))
        trainer.step(query, support, stages)

    seconds = _seconds(lambda: step(StageClock()), args.steps, device)
    for _ in range(args.steps):
        step(clock)
    stages = {name: taken / args.steps for name, taken in clock.seconds.items()}
    outside = 1 - (stages["forward"] + stages["backward"]) / sum(stages.values())
    found = {"seconds": seconds, "images_per_second": count_images(episodes[0]) / seconds, "stages": stages}
    return found | {"outside_network": outside, "device_memory_mb": _device_memory_mb(device)}


def measure_profile(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """torch.profiler over training steps: the table of the longest operations, also as a text file."""
    images, episodes = _training_data(args, device, scratch, min(args.shots))
    trainer = Trainer(untrained(args.weights, STN_MODE, args.img_size).to(device), LR, MOMENTUM)
    trainer.model.train()

    def steps() -> None:
        for number in range(PROFILED_STEPS):
            trainer.step(*images.episode(episodes[number % len(episodes)]), StageClock())
        _synchronise(device)

    steps()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        steps()
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
    print(table)
    with whole_file(args.output / f"cuda_profile_{device.type}.txt") as aside:
        aside.write_text(table)
    waits = {one.key: one.count for one in profile.key_averages() if re.search("Synchronize|_local_scalar", one.key)}
    return {"steps": PROFILED_STEPS, "waits": waits, "table": table.splitlines()}


def measure_predict(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """benchmarks.predict: predict.py with images drawn."""
    given = ["--images", str(args.images), "--support", f"{args.obj}/train/good", "--weights", args.weights]
    given += ["--data_path", str(args.data_path), "--device", args.device, "--img_size", str(args.img_size)]
    predict_benchmark.main([*given, "--output", str(scratch)])
    found = json.loads((scratch / f"predict_{device.type}.json").read_text())
    speed = args.images / found["total_seconds"]
    print(f"predict.py: {speed:.1f} images per second with images drawn")
    return {"images_per_second": speed, **found}


def measure_cell(args: argparse.Namespace, _device: torch.device, scratch: Path) -> dict:
    """Two epochs of train.py at the smallest K, scored with all rounds; from the second, the hours of 45 cells.

    The other K are taken to last as many times as long as they have images.
    """
    sources = sum(map(len, list_source_images(args.data_path, "folder", args.obj).values()))
    found = {}
    for shot in [min(args.shots)]:
        given = f"--obj {args.obj} --shot {shot} --data_type folder --epochs 2 --inferences {args.rounds}".split()
        given += f"--img_size {args.img_size} --batch_size {args.batch_size} --device {args.device}".split()
        given += ["--data_path", str(args.data_path), "--weights", args.weights, "--save_dir", str(scratch / "save")]
        given += ["--cache_dir", str(scratch / "cache"), "--num_workers", str(args.num_workers), "--overwrite"]
        train.main(given)
        entry = json.loads(CheckpointFiles.of(scratch / "save", STN_MODE, shot, args.obj).record.read_text())["epochs"][
            -1
        ]
        scoring = sum(entry["scoring_seconds"].values())
        training = entry["elapsed_seconds"] - scoring  # on CUDA, the times of its stages are those of the host
        cell = PAPER_EPOCHS * (training * MVTEC_SOURCES / sources + scoring)
        found[str(shot)] = {"training_and_files": training, "scoring": scoring, "mvtec_cell": cell}
    more = sum(1 + shot for shot in PAPER_SHOTS) / (1 + min(args.shots))
    hours = MVTEC_CATEGORIES * more * found[str(min(args.shots))]["mvtec_cell"] / 3600
    print(f"MVTec AD, {MVTEC_CATEGORIES * len(PAPER_SHOTS)} cells: {hours:.1f} hours, estimated from one cell")
    return {"source_images": sources, "seconds": found, "hours": hours, "peak_memory_mb": peak_memory_mb()}


MAIN_PARTS = {
    "device": measure_device,
    "equality": measure_equality,
    "network": measure_network,
    "distances": measure_distances,
    "steps": measure_steps,
    "cell": measure_cell,
}
PARTS = MAIN_PARTS | {
    "compiled": measure_compiled,
    "scoring": measure_scoring,
    "plain": measure_plain,
    "profile": measure_profile,
    "predict": measure_predict,
}

if __name__ == "__main__":
    run_command(main)
