"""Stages of work: the seconds of each stage, and threads that prepare items ahead."""

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
    """Seconds per stage: `with clock("network"): ...`. Waits for the device, so that work on CUDA is counted.

    Threads may share a clock; their seconds add up.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {}

    def on_host(self) -> StageClock:
        """This clock for stages that do not use the device, such as decoding in threads: it does not wait for it."""
        clock = StageClock()
        clock._lock, clock.seconds = self._lock, self.seconds
        return clock

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def in_threads(
    function: Callable[[In], Out], items: Iterable[In], workers: int, ahead: int | None = None
) -> Iterator[Out]:
    """Yields `function(item)` for each of `items` in order, computed in `workers` threads.

    At most `ahead` items (default: two per worker) are submitted ahead of the one that is yielded.
    """
    ahead = ahead or 2 * workers
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[Out]] = deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
