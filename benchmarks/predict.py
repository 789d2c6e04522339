"""Measures the memory of predict.py and the time of its stages over many real images. Linux only.

python -m benchmarks.predict    prints both, writes benchmarks/results/predict_<device>.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.reference import DATA, TRUNK
from benchmarks.scoring import RESULTS, command_line, print_seconds
from datasets.images import is_image_file
from inspection.detector import FewShotDetector
from inspection.inputs import read_inputs
from models.regad import untrained
from utils.config import script_parser
from utils.devices import reader_threads, resolve_device
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT, require_writable, write_json
from utils.records import provenance

SETTLED_AFTER = 50  # images, after which every buffer has been used
LOOK_SECONDS = 0.2  # between two measurements of the memory


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--images", type=int, default=2000, help="number of images; those of --data_path repeat")
    parser.add_argument(
        "--support", default="screw/train/good", help="folder in --data_path; its first four images are the support"
    )
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--img_size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="all further arguments go to predict.py")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs predict.py once, measures its memory, prints the result and writes a JSON file."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    if args.images <= SETTLED_AFTER:
        raise UserError(f"--images must be more than {SETTLED_AFTER}")
    device, images = resolve_device(args.device), _images(args)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        first = pool.submit(_decode_and_network, images, args).result()
        memory = _run(Path(folder), images, args)
        record = json.loads((Path(folder) / "out/scores.json").read_text())
        bare = (first + pool.submit(_decode_and_network, images, args).result()) / 2
    later = [megabytes for scored, megabytes in memory if scored >= SETTLED_AFTER]
    settled, highest = later[0], max(later)
    total, seconds = record["total_seconds"], record["seconds"]
    print_seconds(f"{args.images} images, {total:.1f} s; below: all threads, including waiting", seconds, seconds)
    print(f"decode and network alone, before and after: {bare:.1f} s, {bare / total:.0%} of predict.py's time")
    print(f"memory: {settled:.0f} MB after {SETTLED_AFTER} images, at most {highest:.0f} MB later")
    content = {"command": command_line("benchmarks.predict", args), **provenance(device)}
    content |= {"seconds": seconds, "total_seconds": total, "decode_and_network_alone": bare}
    content |= {"settled_mb": settled, "highest_mb": highest, "memory": memory[::25]}
    write_json(args.output / f"predict_{device.type}.json", content)


def _images(args: argparse.Namespace) -> list[Path]:
    """--images normal and defective images of all categories; they repeat if there are fewer."""
    images = sorted(filter(is_image_file, args.data_path.glob("*/t*/*/*")))
    return list(itertools.islice(itertools.cycle(images), args.images))


def _decode_and_network(paths: Sequence[Path], args: argparse.Namespace) -> float:
    """Seconds of the unavoidable work of predict.py: decoding in threads, and the network in its groups."""
    detector = FewShotDetector(untrained(args.weights, img_size=args.img_size).stn, args.device)
    workers = reader_threads(None, detector.clock.device)
    read = (item.square for item in read_inputs(paths, detector.size, False, workers, detector.clock))
    begin = time.perf_counter()
    while group := list(itertools.islice(read, detector.group_images)):
        detector.features(detector.on_device(group))
    if detector.clock.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _run(folder: Path, images: Sequence[Path], args: argparse.Namespace) -> list[tuple[int, float]]:
    """Runs predict.py over links to the images; returns (images scored, resident MB) at regular times."""
    (folder / "in").mkdir()
    for number, path in enumerate(images):
        (folder / "in" / f"{number:06d}{path.suffix}").symlink_to(path.resolve())
    support = sorted(filter(is_image_file, (args.data_path / args.support).iterdir()))[:4]
    command = [sys.executable, "predict.py", "--support", *map(str, support), "--input", str(folder / "in")]
    command += ["--output", str(folder / "out"), "--weights", args.weights, "--device", args.device]
    command += ["--img_size", str(args.img_size), *args.flags]
    readings = []
    with subprocess.Popen(command, cwd=PROJECT_ROOT) as process:
        while process.poll() is None:
            readings.append((_rows(folder / "out/scores.csv"), _resident_mb(process.pid)))
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise UserError(f"predict.py ended with exit code {process.returncode}")
    return readings


def _rows(table: Path) -> int:
    return table.read_bytes().count(b"\n") - 1 if table.is_file() else 0


def _resident_mb(process_id: int) -> float:
    """Resident memory of another process, in MB of 2**20 bytes; 0 once it has ended."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


if __name__ == "__main__":
    run_command(main)
