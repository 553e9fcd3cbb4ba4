"""Seconds by phase, on the host or on a GPU's own timeline."""
import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """`with clock("forward"): ...` adds to that phase; `read()` gives the seconds of all. On a GPU events are recorded, and nothing
    waits before `read`."""

    def __init__(self, device: torch.device):
        self._device, self._gpu = device, device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record(torch.cuda.current_stream(self._device))
            yield
            ended.record(torch.cuda.current_stream(self._device))
            self._events.append((phase, began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds of every phase so far."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for phase, began, ended in self._events:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + began.elapsed_time(ended) / 1e3
        self._events.clear()
        return dict(self._seconds)
