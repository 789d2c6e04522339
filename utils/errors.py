"""How every command runs: errors of the user are one line and exit code 2; at the end, the elapsed time is printed."""

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

from utils.text import Stream

DID_WORK = (1, 3, 4, 5, 6)  # exit codes: some items failed; those of predict.py, see docs/inspection.md
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # met while writing, wherever that is


class UserError(Exception):
    """An error that the user can correct. The message says what was expected and where.

    options: names of the settings that correct it. A command that has flags of these names adds them to the message, so
    that code which serves several commands, or none, names no flags.
    """

    def __init__(self, message: str, options: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.options = tuple(options)


class WriteError(OSError):
    """A file could not be written: the disk is full, the permission is lost. Has errno, strerror and filename."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


def run_command(
    main: Callable[[Sequence[str] | None], None], get_parser: Callable[[], argparse.ArgumentParser] | None = None
) -> None:
    """Runs a command's `main`. Ctrl-C ends it with one line and exit code 130.

    A UserError, or a file that cannot be written, ends it with one line and exit code 2. get_parser: makes the parser
    of the command, whose flags are added to the message of a UserError that names them in its `options`.

    A command that did its work, in whole or in part (DID_WORK), ends with the time it took. The line goes to
    stderr, so that redirected output holds the results only. The start of Python is not included.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on odd files that Pillow reads all the same
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may hold characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    output = Stream(sys.stdout)
    with redirect_stderr(Stream(sys.stderr)), redirect_stdout(output):
        _run(main, get_parser)
        output.flush()
        if output.fault and not isinstance(output.fault, BrokenPipeError):
            sys.exit(_complain(f"cannot write the standard output: {output.fault.strerror}", 2))


def _run(main: Callable[[Sequence[str] | None], None], get_parser: Callable | None) -> None:
    started = time.perf_counter()
    try:
        main(None)
    except Exception as error:
        message = _sentence(error, get_parser)
        if message is None:
            raise
        sys.exit(_complain(message, 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))
    except SystemExit as end:
        if end.code in DID_WORK:
            _print_elapsed(started)
        raise
    _print_elapsed(started)


def _sentence(error: Exception, get_parser: Callable[[], argparse.ArgumentParser] | None) -> str | None:
    """What went wrong, for people; None for an error of the program."""
    if isinstance(error, UserError):
        return f"{error}{_advice(error, get_parser)}"
    if isinstance(error, WriteError):
        return str(error)
    if isinstance(error, PermissionError):
        return f"cannot use {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    if reason := lack_of_memory(error):
        options = UserError("", ("batch_size", "img_size", "num_workers", "device"))
        return f"the memory does not suffice: {reason}; take smaller batches or images{_advice(options, get_parser)}"
    return None


def lack_of_memory(error: BaseException) -> str:
    """What could not be allocated, on a device of PyTorch or on the host; "" for another error.

    PyTorch is not imported for it.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in str(error):
        return ""
    return (str(error).splitlines() or ["no more can be allocated"])[0]


def _print_elapsed(started: float) -> None:
    sys.stdout.flush()  # where both go to one file, this line comes last
    print(f"finished in {format_elapsed(time.perf_counter() - started)}", file=sys.stderr)


def format_elapsed(seconds: float) -> str:
    """A measured time as text: `4.2 s`, `45 s`, `3 min 12 s` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def _advice(error: UserError, get_parser: Callable[[], argparse.ArgumentParser] | None) -> str:
    """The flags of the command that correct an error, as ` (see --bits)`; empty if there are none."""
    known = {action.dest for action in get_parser()._actions} if get_parser and error.options else set()
    flags = [f"--{name}" for name in error.options if name in known]
    return f" (see {', '.join(flags)})" if flags else ""


def _complain(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def require_packages(*names: str, requirements: str | None = "requirements-export.txt") -> None:
    """Checks that the optional packages `names` are installed; `requirements`: the file that lists them, if one does.

    Raises:
        UserError: a package is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        what = f"-r {requirements}" if requirements else " ".join(missing)
        raise UserError(f"no package {' and '.join(missing)}: run pip install {what}")
