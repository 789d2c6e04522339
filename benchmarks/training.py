"""Times two epochs of train.py by stages, and compares them with the release's training loop and evaluation.

python -m benchmarks.training    takes minutes; writes benchmarks/results/training_<category>_<shot>_<device>.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train
from benchmarks import plain
from benchmarks.reference import DATA, TRUNK, draw_support_images
from benchmarks.scoring import RESULTS, command_line, print_seconds, time_plain
from datasets.cache import SourceImages
from datasets.episodes import Episode, draw_episodes
from datasets.images import read_image
from datasets.mvtec import category_folder, list_source_images, list_test_items
from models.regad import untrained
from training.loop import Trainer
from utils.config import script_parser
from utils.devices import command_device, resolve_device, seed_everything
from utils.errors import run_command
from utils.files import require_writable, write_json
from utils.naming import CheckpointFiles
from utils.records import provenance
from utils.stages import StageClock

OWN_WORK = ("forward", "backward", "optimizer", "network")  # the unavoidable stages; the rest is overhead
STN_MODE, LR, MOMENTUM = "rotation_scale", 1e-4, 0.9  # the release's
plain_loop: dict = {}  # the state of the plain loop, in its process only


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--obj", default="screw", help="the target category")
    parser.add_argument("--shot", type=int, default=2, help="support images")
    parser.add_argument("--rounds", type=int, default=2, help="support sets")
    parser.add_argument(
        "--steps", type=int, default=5, help="training steps of each loop, alternating; the median is reported"
    )
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--img_size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="queries of a training step")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the measurements one after the other, prints them and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    device = command_device(args.device)
    seed_everything(0)
    with tempfile.TemporaryDirectory() as scratch:
        content = {"command": command_line("benchmarks.training", args), **provenance(device)}
        content |= {"steps": time_steps(args, device, Path(scratch))}
        content |= {"epochs": _time_epochs(args, Path(scratch)), "evaluation": _time_evaluation(args)}
    ours = sum(content["epochs"][-1]["scoring_seconds"].values())
    content["evaluation"]["times_faster"] = content["evaluation"]["plain"] / ours
    print(
        f"evaluation of {args.rounds} rounds: plain {content['evaluation']['plain']:.1f}, ours {ours:.1f} s: ", end=""
    )
    print(f"{content['evaluation']['times_faster']:.1f} times faster")
    target = args.output / f"training_{args.obj}_{args.shot}_{device.type}.json"
    write_json(target, content)
    print(f"written: {target}")


def time_steps(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict:
    """Seconds per training step up to the update: from image files (plain) and from the cache (ours), alternating."""
    sources = list_source_images(args.data_path, "folder", args.obj)
    names = {category: [path.name for path in paths] for category, paths in sources.items()}
    episodes = draw_episodes(names, args.shot, args.batch_size, seed=0, epoch=1)
    full = [episode for episode in episodes if len(episode.query) == args.batch_size][: args.steps + 1]
    images = SourceImages(sources, args.img_size, scratch / "cache", 2, device)
    ours = Trainer(untrained(args.weights, STN_MODE, args.img_size).to(device), LR, MOMENTUM)
    ours.model.train()
    clock, seconds = StageClock(device), {"plain": [], "ours": []}
    # The plain loop has its own process, with the default memory settings of PyTorch.
    with ProcessPoolExecutor(1, get_context("spawn"), _prepare_plain, (args, sources)) as pool:
        for episode in full:
            clock.seconds.clear()
            seconds["plain"].append(pool.submit(_time_plain_step, episode).result())
            with clock("ours"):
                ours.step(*images.episode(episode), StageClock())
            seconds["ours"].append(clock.seconds["ours"])
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}  # the first step warms up
    ratio = medians["plain"] / medians["ours"]
    print(f"training step: plain {medians['plain']:.2f}, ours {medians['ours']:.2f} s: {ratio:.2f} times faster")
    return {"seconds": seconds, "times_faster": ratio}


def _prepare_plain(args: argparse.Namespace, sources: dict[str, list[Path]]) -> None:
    """Creates the state of the plain loop in its process."""
    device = resolve_device(args.device)
    if device.type == "cuda":  # the memory of the CPU keeps torch's default
        device = command_device(args.device)
    model = untrained(args.weights, STN_MODE, args.img_size).to(device).train()
    paths = {category: {path.name: path for path in of_category} for category, of_category in sources.items()}
    three = plain.optimizers(model, LR, MOMENTUM)
    plain_loop.update(model=model, optimizers=three, paths=paths, size=args.img_size, device=device)


def _time_plain_step(episode: Episode) -> float:
    clock = StageClock(plain_loop["device"])
    with clock("step"):
        read = _read_episode(episode, plain_loop["paths"], plain_loop["size"])
        query, support = (images.to(plain_loop["device"]) for images in read)
        plain.training_step(plain_loop["model"], plain_loop["optimizers"], query, support)
    return clock.seconds["step"]


def _read_episode(episode: Episode, paths: dict[str, dict[str, Path]], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of an episode, decoded on all cores. The release decodes them in every step."""
    wanted = [*episode.query, *(name for of_query in episode.support for name in of_query)]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter lock
        read = list(pool.map(lambda name: read_image(paths[episode.category][name], size), wanted))
    tensors = torch.stack([torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255 for image in read])
    count = len(episode.query)
    return tensors[:count], tensors[count:].unflatten(0, (count, -1))


def _time_epochs(args: argparse.Namespace, scratch: Path) -> list[dict]:
    """The entries of a run of train.py with two epochs; prints the seconds of the stages of the second epoch."""
    given = f"--obj {args.obj} --shot {args.shot} --data_type folder --epochs 2 --inferences {args.rounds}".split()
    given += f"--img_size {args.img_size} --batch_size {args.batch_size} --device {args.device}".split()
    given += ["--data_path", str(args.data_path), "--weights", args.weights, "--save_dir", str(scratch / "save")]
    train.main([*given, "--cache_dir", str(scratch / "cache")])
    record = CheckpointFiles.of(scratch / "save", STN_MODE, args.shot, args.obj).record
    epochs = json.loads(record.read_text())["epochs"]
    entry = epochs[2]
    spent = {**entry["seconds"], **entry["scoring_seconds"]}
    spent["everything else"] = entry["elapsed_seconds"] - sum(spent.values())
    print_seconds("the second epoch and its evaluation", spent, spent)
    overhead = sum(seconds for stage, seconds in spent.items() if stage not in OWN_WORK)
    print(f"outside {', '.join(OWN_WORK)}: {overhead / entry['elapsed_seconds']:.1%}")
    return epochs


def _time_evaluation(args: argparse.Namespace) -> dict:
    """Seconds of all rounds in the release's order of work, extrapolated from one round."""
    folder = category_folder(args.data_path, "folder", args.obj)
    draws = draw_support_images(folder, args.shot, 1, seed=0)
    network = untrained(args.weights, STN_MODE, args.img_size).stn.eval()
    one = time_plain(network, list_test_items(folder), draws[0], args.img_size, resolve_device(args.device))
    return {"plain_round": one, "plain": args.rounds * sum(one["seconds"].values())}


if __name__ == "__main__":
    run_command(main)
