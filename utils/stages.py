"""Measures the seconds of each stage of the work, and processes items in threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

In, Out = TypeVar("In"), TypeVar("Out")


class StageClock:
    """Seconds per stage: `with clock("network"): ...`.

    On CUDA, a stage lasts from the end of all earlier work of the device to the end of the stage's; the host does not
    wait. Work of the host is included while the device waits for it. Threads may share a clock; their seconds add up.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._under_way: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def on_host(self) -> StageClock:
        """This clock for stages that do not use the device, such as decoding in threads: host time."""
        clock = StageClock()
        clock._lock, clock._seconds = self._lock, self._seconds
        return clock

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage. On CUDA, waits for the device. The caller may clear the dict."""
        self._collect(wait=True)
        return self._seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.device is not None and self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            yield
            end.record(stream)
            self._under_way.append((stage, start, end))
            self._collect(wait=False)
            return
        begin = time.perf_counter()
        yield
        with self._lock:
            self._add(stage, time.perf_counter() - begin)

    def _collect(self, wait: bool) -> None:
        """Adds the stages that the device has finished; with `wait`, waits for all of them."""
        with self._lock:
            if wait and self._under_way:
                self._under_way[-1][2].synchronize()
            while self._under_way and (wait or self._under_way[0][2].query()):
                stage, start, end = self._under_way.popleft()
                self._add(stage, start.elapsed_time(end) / 1000)

    def _add(self, stage: str, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds


def in_threads(
    function: Callable[[In], Out], items: Iterable[In], workers: int, ahead: int | None = None
) -> Iterator[Out]:
    """Yields `function(item)` for each of `items` in order, computed in `workers` threads.

    At most `ahead` items (default: two per worker) are submitted ahead of the one that is yielded.
    """
    workers = max(1, workers)
    ahead = ahead or 2 * workers
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[Out]] = deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
