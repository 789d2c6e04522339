"""A small HTTP service around a saved detector; examples/app.py lists what it answers.

python -m examples.service --detector part.regad
curl --data-binary @photo.png http://127.0.0.1:8000/score

It has no access control and no encryption: leave it on the loopback, or put a web server with both in front of it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from datasets.images import limit_pixels
from evaluation.config import MaxPixelsConfig
from examples.judge import JudgeConfig, load_judge
from utils.config import Parser, flag
from utils.errors import UserError, require_packages, run_command
from utils.interrupts import Interrupts

REQUIREMENTS = "requirements-examples.txt"
LAST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(MaxPixelsConfig, JudgeConfig):
    """The flags of the service."""

    host: str = flag("address to listen at; the default is this machine only", default="127.0.0.1")
    port: int = flag("0: any free port, which is printed", default=8000, least=0)
    max_mb: float = flag("larger requests are refused (413), in MB of 2**20", default=20.0, least=0)
    max_waiting: int = flag("further requests are refused (503)", default=32, least=1)
    max_seconds: float = flag("for a request to arrive, else 408", default=30.0, least=0)

    def check(self) -> None:
        """Raises UserError where a limit allows nothing or the port does not exist."""
        if not (self.max_mb > 0 and self.max_seconds > 0):
            raise UserError("--max_mb and --max_seconds must be above 0")
        if self.port > LAST_PORT:
            raise UserError(f"--port must be between 0 and {LAST_PORT}, got {self.port}")


def get_args_parser() -> Parser[ServiceConfig]:
    """The command line of the service."""
    return Parser(ServiceConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the detector and answers requests until Ctrl-C or SIGTERM."""
    config = get_args_parser().parse_config(argv)
    require_packages("fastapi", "uvicorn", "python_multipart", requirements=REQUIREMENTS)
    import uvicorn

    from examples.app import MB, Limits, make_app, timed_protocol

    limit_pixels(config.max_pixels)
    app = make_app(load_judge(config), Limits(int(config.max_mb * MB), config.max_waiting, config.max_seconds))
    with Interrupts(), suppress(KeyboardInterrupt), _listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"{config.detector} answers at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        http = timed_protocol(config.max_seconds)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", http=http)).run([listener])
    print("ended")


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
