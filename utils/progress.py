"""Shows the progress of long work on stderr: a bar on a terminal, otherwise a line per minute with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tqdm import tqdm

from utils.errors import format_elapsed

Item = TypeVar("Item")
LINE_SECONDS = 60.0
BAR_SECONDS = 1.0  # shorter work has no bar


class ProgressBar(Generic[Item]):
    """Iterates over items, or counts the units of `advance`.

    what: the title. total: number of units, by default of items. unit: the name of a unit, in the plural.
    """

    def __init__(self, what: str, items: Iterable[Item] = (), total: int | None = None, unit: str = "images") -> None:
        self.what, self.items, self.unit = what, items, unit
        self.total = len(items) if total is None else total
        self.done, self.note = 0, ""
        self.started = self.printed = time.monotonic()
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = (
            tqdm(total=self.total, desc=what, unit=f" {unit}", leave=False, delay=BAR_SECONDS) if is_terminal else None
        )

    def __enter__(self) -> ProgressBar[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self.items:
                yield item
                self.advance(1)

    def advance(self, count: int, note: str = "") -> None:
        """Counts further units as done. note: a phrase to show; empty: keep the previous one."""
        self.done, self.note = self.done + count, note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif (now := time.monotonic()) - self.printed >= LINE_SECONDS and self.done < self.total:
            self.printed = now
            left = (now - self.started) / self.done * (self.total - self.done)
            share = f"{self.done} of {self.total} {self.unit}, {100 * self.done / self.total:.0f} %"
            note = f", {self.note}" if self.note else ""
            print(f"{self.what}: {share}, about {format_elapsed(left)} left{note}", file=sys.stderr, flush=True)
