"""Runs a command: user errors give one line and exit code 2; at the end, the elapsed time is printed."""

from __future__ import annotations

import argparse
import errno
import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import NoReturn

from utils.text import Stream, one_line

DID_WORK = (1, 3, 4, 5, 6)  # exit codes after some work: 1, some items failed; the others see docs/inspection.md
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # of any write


class UserError(Exception):
    """An error that the user can correct. The message says what was expected and where.

    options: names of the settings that correct it. A command adds its flags of these names to the message, so that
    library code does not name flags.
    """

    def __init__(self, message: str, options: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.options = tuple(options)


class WriteError(OSError):
    """A file cannot be written, for example because the disk is full. Has errno, strerror and filename."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


def run_command(
    main: Callable[[Sequence[str] | None], None], get_parser: Callable[[], argparse.ArgumentParser] | None = None
) -> None:
    """Runs a command's `main`. Ctrl-C ends it with one line and exit code 130.

    A UserError, or a file that cannot be written, ends it with one line and exit code 2. get_parser: creates the parser
    of the command, for the flags in the message of a UserError with `options`.

    After a command that did its work, at least in part (DID_WORK), the elapsed time is printed, without the start of
    Python. It goes to stderr, so that redirected output has the results only.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about unusual files that Pillow can read
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may contain characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    output = Stream(sys.stdout)
    with redirect_stderr(Stream(sys.stderr)), redirect_stdout(output):
        _run(main, get_parser)
        output.flush()
        if output.fault and not isinstance(output.fault, BrokenPipeError):
            _end(f"cannot write the standard output: {output.fault.strerror}", 2)


def _run(main: Callable[[Sequence[str] | None], None], get_parser: Callable | None) -> None:
    started = time.perf_counter()
    try:
        main(None)
    except Exception as error:
        message = _message(error, get_parser)
        if message is None:
            raise
        _end(message, 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except SystemExit as end:
        if end.code in DID_WORK:
            _print_elapsed(started)
        raise
    _print_elapsed(started)


def _message(error: Exception, get_parser: Callable[[], argparse.ArgumentParser] | None) -> str | None:
    """The message of an error that the user can correct; None for other errors."""
    if isinstance(error, UserError):
        return f"{error}{_advice(error.options, get_parser)}"
    if isinstance(error, WriteError):
        return str(error)
    if isinstance(error, PermissionError):
        return f"cannot use {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    if reason := lack_of_memory(error):
        advice = _advice(("batch_size", "img_size", "num_workers", "device"), get_parser)
        return f"not enough memory: {reason}; take smaller batches or images{advice}"
    return None


def lack_of_memory(error: BaseException) -> str:
    """The reason of an out-of-memory error of PyTorch or of the host; "" for another error. Does not import PyTorch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in str(error):
        return ""
    return (str(error).splitlines() or ["no more can be allocated"])[0]


def _print_elapsed(started: float) -> None:
    sys.stdout.flush()  # so that this line is the last if both streams go to one file
    print(f"finished in {format_elapsed(time.perf_counter() - started)}", file=sys.stderr)


def format_elapsed(seconds: float) -> str:
    """A measured time as text: `4.2 s`, `45 s`, `3 min 12 s` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def _advice(options: Sequence[str], get_parser: Callable[[], argparse.ArgumentParser] | None) -> str:
    """Those of the options that the command has as flags, as ` (see --bits)`; empty if there are none."""
    names = {action.dest for action in get_parser()._actions} if get_parser and options else set()
    flags = [f"--{name}" for name in options if name in names]
    return f" (see {', '.join(flags)})" if flags else ""


def _end(message: str, code: int) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def require_packages(*names: str, requirements: str | None = "requirements-export.txt") -> None:
    """Checks that the optional packages `names` are installed. requirements: the file that lists them, or None.

    Raises:
        UserError: a package is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        arguments = f"-r {requirements}" if requirements else " ".join(missing)
        raise UserError(f"no package {' and '.join(missing)}: run pip install {arguments}")
