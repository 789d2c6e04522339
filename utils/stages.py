"""Stages of work: the seconds each takes, and threads that work ahead of it."""

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
    """Seconds spent per stage: `with clock("network"): ...`. Waits for the device's queue, so that CUDA counts too.

    Threads may share one; their seconds add up.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {}

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
    """`map(function, items)` in order, in `workers` threads; at most `ahead` items, or two per worker, wait or are done
    and not yet taken.
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
