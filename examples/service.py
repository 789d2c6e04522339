"""A small HTTP service around saved detectors; examples/app.py lists what it answers.

python -m examples.service --detector bottle.regad screw.regad --log decisions.jsonl
curl --data-binary @photo.png http://127.0.0.1:8000/score/bottle

It has no access control and no encryption: leave it on the loopback, or put a web server with both in front of it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from datasets.images import limit_pixels
from evaluation.config import MaxPixelsConfig
from examples.judge import DeviceConfig, load_judge
from utils.config import Parser, flag
from utils.devices import command_device
from utils.errors import UserError, require_packages, run_command
from utils.files import require_writable
from utils.interrupts import Interrupts

REQUIREMENTS = "requirements-examples.txt"
LAST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(MaxPixelsConfig, DeviceConfig):
    """The flags of the service."""

    detector: tuple[Path, ...] = flag(
        "from predict.py --save, one for each part; its name without the suffix is the part's", group="detector"
    )
    host: str = flag("address to listen at; 127.0.0.1: requests of this machine only", default="127.0.0.1")
    port: int = flag("0: any free port, which is printed", default=8000, least=0)
    workers: int = flag("processes, each with all detectors in memory", default=1, least=1)
    log: Path | None = flag("append each decision as a line of JSON (default: no log)", default=None, metavar="FILE")
    max_mb: float = flag("larger requests are refused (413), in MiB", default=20.0, least=0)
    max_tiles: int = flag("images that are cut into more tiles are refused (413)", default=400, least=1)
    max_waiting: int = flag("further requests are refused (503), in each process", default=32, least=1)
    max_seconds: float = flag("seconds for a request to arrive, else it ends (408)", default=30.0, least=0)
    answer_seconds: float = flag(
        "seconds from the arrival of an image to its result, else it ends (503)", default=120.0, least=0
    )

    def check(self) -> None:
        """Raises UserError where a limit allows nothing, the port does not exist or two parts have one name."""
        if not (self.max_mb > 0 and self.max_seconds > 0 and self.answer_seconds > 0):
            raise UserError("--max_mb, --max_seconds and --answer_seconds must be above 0")
        if self.port > LAST_PORT:
            raise UserError(f"--port must be between 0 and {LAST_PORT}, got {self.port}")
        if len({file.stem for file in self.detector}) < len(self.detector):
            raise UserError("--detector: files of different parts need different names")


def get_args_parser() -> Parser[ServiceConfig]:
    """The command line of the service."""
    return Parser(ServiceConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the detectors and answers requests until Ctrl-C or SIGTERM."""
    config = get_args_parser().parse_config(argv)
    require_packages("fastapi", "uvicorn", "python_multipart", requirements=REQUIREMENTS)
    if config.log:
        require_writable(config.log, "--log")
    with _listen(config.host, config.port) as listener, Interrupts(), suppress(KeyboardInterrupt):
        if config.workers == 1:
            serve(config, listener)
        else:
            _serve_in_processes(config, listener)
    print("ended")


def serve(config: ServiceConfig, listener: socket.socket) -> None:
    """Answers the requests that arrive at `listener`, until Ctrl-C or SIGTERM."""
    import uvicorn

    from examples.app import MB, Limits, make_app, timed_protocol

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    limit_pixels(config.max_pixels)
    command_device(config.device)
    judges = {file.stem: load_judge(file, config) for file in config.detector}
    waiting = config.max_waiting, config.max_seconds, config.max_tiles, config.answer_seconds
    app = make_app(judges, Limits(int(config.max_mb * MB), *waiting), config.log)
    host, port = listener.getsockname()[:2]
    print(f"{', '.join(judges)}: answers at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    http = timed_protocol(config.max_seconds)
    uvicorn.Server(uvicorn.Config(app, log_config=None, http=http)).run([listener])


def _serve_in_processes(config: ServiceConfig, listener: socket.socket) -> None:
    """The same in several processes that share the address. If one ends, all end, so that a supervisor starts anew."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.workers)))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=(config, listener)) for _ in range(config.workers)]
    try:
        for process in processes:
            process.start()
        wait([process.sentinel for process in processes])
        raise UserError("a process of the service has ended; see its message above")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _worker(config: ServiceConfig, listener: socket.socket) -> None:
    """One of the processes."""

    def serve_until_ended(_: object) -> None:
        with Interrupts(), suppress(KeyboardInterrupt):
            serve(config, listener)

    run_command(serve_until_ended)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address.

    Raises:
        UserError: the address is no address of this machine, or the port is taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen at {host}, port {port}: {reason}; give another --host or --port") from error


if __name__ == "__main__":
    run_command(main, get_args_parser)
