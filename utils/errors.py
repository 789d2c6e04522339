"""Errors that the user can correct: one sentence and exit code 2, in every command."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """An error that the user can correct. The message says what was expected, where, and what to do."""


def run_command(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs a command's `main`. A UserError ends it with one line and exit code 2, Ctrl-C with exit code 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may hold characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(None)
    except UserError as error:
        sys.exit(_complain(error, 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _complain(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError where an argument, or a number in a list, is below 1. None (a default) is accepted."""
    for name in names:
        values = getattr(arguments, name)
        smallest = min(values) if isinstance(values, list) else values
        if smallest is not None and smallest < 1:
            raise UserError(f"--{name} must be at least 1, got {smallest}")
