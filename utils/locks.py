"""Locks of output files: two processes never write the same files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.naming import lock_file


@contextmanager
def locked(files: Sequence[Path], waiting: str | None = None) -> Iterator[None]:
    """Holds the locks of `files`, acquired in the same order by all processes. The lock files remain.

    waiting: if another process holds a lock, print this and wait; None: raise an error.

    Raises:
        UserError: another process holds a lock, or the file system has no locks.
    """
    with ExitStack() as stack:
        for file in sorted(files):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(lock_file(file), mode=0o666)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                if waiting is None:
                    raise UserError(f"another process writes {file}") from error
                print(waiting, flush=True)
                lock.acquire()
            except (OSError, NotImplementedError) as error:
                raise UserError(f"files in {file.parent} cannot be locked ({error}); give another folder") from error
            stack.callback(lock.release)
        yield
