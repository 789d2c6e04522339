"""Runs a script of the project that ends when its driver does, also where the driver is killed.

python experiments/leash.py SCRIPT ARGUMENTS     standard input: a pipe whose other end only the driver holds

Used where a cell cannot be locked. A command that outlived its driver would write the same files as the next one.
"""

import os
import runpy
import sys
import threading

KILLED = 137  # the exit code of a process that was killed with SIGKILL


def _end_with(pipe: int) -> None:
    """Ends the process at the end of the pipe, which the system closes when the driver dies. Never returns."""
    while os.read(pipe, 1):
        pass
    os._exit(KILLED)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.dup(0),), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # for the script and its processes
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
