"""Measures examples/service.py with several clients at a time, with a large image among theirs, and after a kill.

python -m benchmarks.service    prints the times, writes benchmarks/results/service_cpu.json
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.reference import DATA, TRUNK
from benchmarks.scoring import RESULTS, command_line
from datasets.images import is_image_file
from inspection.detector import FewShotDetector
from inspection.fitting import DEFAULT_RATE
from models.regad import untrained
from utils.choices import AUTO, DEFAULT_SCORER
from utils.config import script_parser
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT, require_writable, write_json
from utils.records import provenance

ANSWER_SECONDS = 120  # a request that takes longer has failed
LARGE_SIDE = 2500  # pixels of the large image, which is cut into tiles as large as the support images
OK = 200


class Reply(NamedTuple):
    """An answer of the service. status: 0 if the connection broke. seconds: from connecting to the last byte."""

    status: int
    content: bytes
    headers: dict[str, str]
    seconds: float

    @property
    def result(self) -> dict:
        return json.loads(self.content)


class Server:
    """examples/service.py as a process of its own, on the loopback; `with` starts and kills it.

    flags: further detectors, then flags.
    """

    def __init__(self, detector: Path, *flags: str, port: int = 0) -> None:
        self.command = [sys.executable, "-m", "examples.service", "--detector", str(detector), *flags]
        self.port = port

    def __enter__(self) -> Server:
        command = [*self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
        line = next((line for line in self.process.stdout if " answers at http://" in line), "")  # after the device
        if " answers at http://" not in line:
            self.kill()
            raise UserError(f"the service did not start: {line.strip() or 'no output'}")
        self.port = int(line.rsplit(":", 1)[1])
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends the process with SIGKILL: it can do nothing more."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def send(
        self, body: bytes | Iterator[bytes] = b"", path: str = "/score", method: str = "POST", kind: str = "image/png"
    ) -> Reply:
        """The reply to one request; kind: its content type."""
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            reply = connection.getresponse()
            content, status, headers = reply.read(), reply.status, dict(reply.getheaders())
        except (OSError, http.client.HTTPException) as error:
            content, status, headers = str(error).encode(), 0, {}
        finally:
            connection.close()
        return Reply(status, content, headers, time.perf_counter() - begin)

    def send_all(self, bodies: Sequence[bytes], clients: int) -> list[Reply]:
        """The replies to many requests, `clients` at a time."""
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(self.send, bodies))


def killed_in_the_middle(server: Server, bodies: Sequence[bytes], clients: int) -> list[Reply]:
    """The replies to requests during which the service is killed, once a quarter of them is answered."""
    with ThreadPoolExecutor(clients) as pool:
        pending = [pool.submit(server.send, body) for body in bodies]
        pending[len(bodies) // 4].result()
        server.kill()
        return [one.result() for one in pending]


def enlarged(body: bytes) -> bytes:
    """An image file, as PNG of LARGE_SIDE x LARGE_SIDE pixels."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(body)).resize((LARGE_SIDE, LARGE_SIDE)).save(stream, "PNG")
    return stream.getvalue()


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--requests", type=int, default=200, help="requests that are measured")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--obj", default="screw", help="category; its first four normal images are the support")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--img_size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--scorer", default=DEFAULT_SCORER, help="of the detectors")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the times and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    category = args.data_path / args.obj
    paths = sorted(filter(is_image_file, category.glob("test/*/*")))
    bodies = [path.read_bytes() for path in itertools.islice(itertools.cycle(paths), args.requests)]
    support = sorted(filter(is_image_file, (category / "train/good").iterdir()))[:4]
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.regad"
        network = untrained(args.weights, img_size=args.img_size).stn
        detector = FewShotDetector(network, "cpu", scorer=args.scorer, tile=AUTO).fit(support)
        detector.calibrate(DEFAULT_RATE)
        detector.save(part)
        found = measure(part, bodies, args.clients)
    chosen = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "output"})
    write_json(args.output / "service_cpu.json", {"command": command_line("benchmarks.service", chosen)} | found)
    print(
        f"{args.requests} requests from {args.clients} clients: {found['errors']} errors, "
        f"p50 {found['p50_ms']:.0f} ms, p95 {found['p95_ms']:.0f} ms, {found['images_per_second']:.1f} images/s; "
        f"one client: p50 {found['alone_p50_ms']:.0f} ms (load of the machine {found['load_average'][0]:.1f})"
    )
    print(
        f"with an image of {LARGE_SIDE} x {LARGE_SIDE} pixels among them, which took {found['large_seconds']:.1f} s: "
        f"{found['errors_with_large']} errors, p50 of the others {found['p50_ms_with_large']:.0f} ms, "
        f"p95 {found['p95_ms_with_large']:.0f} ms"
    )
    print(
        f"killed after {found['answered_before_kill']} answers, started again in {found['restart_seconds']:.1f} s: "
        f"{found['changed_answers']} answers are others than before"
    )


def measure(part: Path, bodies: Sequence[bytes], clients: int) -> dict:
    """Times of the requests, and how many answers a kill changed."""
    with Server(part, "--device", "cpu") as server:
        alone = [server.send(body) for body in bodies[: len(bodies) // 10]]
        begin = time.perf_counter()
        replies = server.send_all(bodies, clients)
        took, port = time.perf_counter() - begin, server.port
        mixed = server.send_all([*bodies[:clients], enlarged(bodies[0]), *bodies[clients + 1 :]], clients)
        cut = killed_in_the_middle(server, bodies, clients)
    begin = time.perf_counter()
    with Server(part, "--device", "cpu", port=port) as server:
        restart = time.perf_counter() - begin
        again = server.send_all(bodies, clients)
    milliseconds = [1000 * reply.seconds for reply in replies]
    beside = [1000 * reply.seconds for number, reply in enumerate(mixed) if number != clients]
    pairs = zip(replies, again, strict=True)
    return {
        **provenance(torch.device("cpu")),
        "load_average": os.getloadavg(),  # above the number of cores: the machine was busy with other work, too
        "errors": sum(reply.status != OK for reply in replies),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p95_ms": float(np.percentile(milliseconds, 95)),
        "alone_p50_ms": float(np.median([1000 * reply.seconds for reply in alone])),
        "errors_with_large": sum(reply.status != OK for reply in mixed),
        "p50_ms_with_large": float(np.percentile(beside, 50)),
        "p95_ms_with_large": float(np.percentile(beside, 95)),
        "large_seconds": mixed[clients].seconds,
        "images_per_second": len(replies) / took,
        "answered_before_kill": sum(reply.status == OK for reply in cut),
        "restart_seconds": restart,
        "changed_answers": sum(one.content != other.content for one, other in pairs),
    }


if __name__ == "__main__":
    run_command(main)
