"""Errors for people: one sentence and exit code 2, in every command."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something the user can mend. The message says what was looked for, where, and what to run."""


def run_command(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs a command's `main` on sys.argv; a UserError or Ctrl-C ends it in one line with exit code 2 or 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may hold what the terminal cannot show
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
    """Refuses counts and sizes below 1, single or in a list: UserError. None, for a default, passes."""
    for name in names:
        values = getattr(arguments, name)
        smallest = min(values) if isinstance(values, list) else values
        if smallest is not None and smallest < 1:
            raise UserError(f"--{name} must be at least 1, got {smallest}")
