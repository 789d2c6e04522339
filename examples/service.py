"""A small HTTP service around a saved detector; examples/app.py lists what it answers.

python -m examples.service --detector part.regad
curl --data-binary @photo.png http://127.0.0.1:8000/score

It has no access control and no encryption: leave it on the loopback, or put a web server with both in front of it.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from contextlib import suppress

from datasets.images import limit_pixels
from examples.judge import add_judge_flags, load_judge
from inspection.exported import require_packages
from utils.errors import UserError, require_positive, run_command
from utils.flags import add_max_pixels_flag
from utils.interrupts import Interrupts

REQUIREMENTS = "requirements-examples.txt"
LAST_PORT = 65535


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the service."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_judge_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port, which is printed")
    parser.add_argument("--max_mb", type=float, default=20, help="larger requests are refused (413), in MB of 2**20")
    add_max_pixels_flag(parser)
    parser.add_argument("--max_waiting", type=int, default=32, help="further requests are refused (503)")
    parser.add_argument("--max_seconds", type=float, default=30, help="for a request to arrive, else 408")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the detector and answers requests until Ctrl-C or SIGTERM."""
    args = get_args_parser().parse_args(argv)
    require_positive(args, "max_pixels", "max_waiting")
    if not (args.max_mb > 0 and args.max_seconds > 0):
        raise UserError("--max_mb and --max_seconds must be above 0")
    if not 0 <= args.port <= LAST_PORT:
        raise UserError(f"--port must be between 0 and {LAST_PORT}, got {args.port}")
    require_packages("fastapi", "uvicorn", "python_multipart", requirements=REQUIREMENTS)
    import uvicorn

    from examples.app import MB, Limits, make_app

    limit_pixels(args.max_pixels)
    app = make_app(load_judge(args), Limits(int(args.max_mb * MB), args.max_waiting, args.max_seconds))
    with Interrupts(), suppress(KeyboardInterrupt), _listen(args.host, args.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"{args.detector} answers at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])
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
    run_command(main)
