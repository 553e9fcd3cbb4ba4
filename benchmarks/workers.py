"""Variants that take turns, each in a process of its own: one runs while the others sleep.

The C allocator's settings and peak memory belong to a process, so a variant can have its own. A worker builds its variant
(`build(case)`: the imports, the base), says that it is ready, and then answers calls one at a time; its peak is counted from what
it holds before the first. Where the machine's memory is short, what the allocator kept of a call goes back to the system after it,
outside the time: a loop over 16 sequences holds 7 GB, and seven variants share the machine.
"""
import ctypes
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients import Case, device
from benchmarks.measure import memory, reset_peak

Build = Callable[[Case], Callable[..., Any]]
PATIENCE = 3600                                                         # seconds that a worker may be silent


class WorkerError(Exception):
    """A variant that cannot run here, or that failed."""


class Worker:
    """A variant in a process of its own. raised: its C allocator keeps large blocks (flora._host.tune_allocator)."""

    def __init__(self, build: Build, case: Case, raised: bool):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, case, raised), daemon=True)
        self._process.start()
        theirs.close()
        self.answers: list[Any] = []
        self.seconds: list[float] = []

    def answer(self) -> Any:
        """What the worker has to say next. Raises WorkerError with its reason."""
        try:
            if not self._pipe.poll(PATIENCE):
                raise WorkerError(f"no answer within {PATIENCE} s")
            error, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise WorkerError(f"its process ended with code {self._process.exitcode}: out of memory?") from None
        if error:
            raise WorkerError(error)
        return value

    def __call__(self, *arguments: Any) -> Any:
        """One turn; its answer and its seconds are kept in answers and seconds too."""
        self._pipe.send(arguments)
        seconds, value = self.answer()
        self.seconds.append(seconds)
        self.answers.append(value)
        return value

    def reset_peak(self) -> None:
        """What was held at most so far does not count."""
        self._pipe.send("reset")
        self.answer()

    def close(self) -> tuple[float, float] | None:
        """Ends the process: (peak, peak less what it held when it was ready) in MB; None where the system does not say."""
        try:
            with suppress(WorkerError, OSError):
                self._pipe.send(None)
                return self.answer()
            return None
        finally:
            self._process.join(10)
            self._process.kill()


def _serve(pipe: Any, build: Build, case: Case, raised: bool) -> None:
    warnings.simplefilter("ignore")
    try:
        if raised and device() == "cpu":
            from flora import _host
            _host.tune_allocator()
        call = build(case)
        held = memory(device()) if reset_peak(device()) else memory(device(), peak=True)
        pipe.send(("", None))
        while (arguments := pipe.recv()) is not None:
            began = time.perf_counter()
            value = reset_peak(device()) if arguments == "reset" else call(*arguments)
            if device() == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            _give_back()
            pipe.send(("", (seconds, value)))
        peak = memory(device(), peak=True)
        pipe.send(("", None if peak is None or held is None else (peak / 1e6, max(0.0, peak - held) / 1e6)))
    except ImportError as error:
        pipe.send((f"{error}. Is it installed?", None))
    except Exception:
        pipe.send((traceback.format_exc(), None))


def _give_back() -> None:
    """Returns freed memory to the system where less than 40 % of it is available, 60 % of a card's: the next variant needs it."""
    if device() == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < 0.6 * total:
            torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError, KeyError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        if int(facts["MemAvailable"].split()[0]) < 0.4 * int(facts["MemTotal"].split()[0]):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def workers(builders: Mapping[str, Build], case: Case, raised: Callable[[str], bool]) -> Iterator[dict[str, Worker]]:
    """A worker for every variant that can run here; the others are left out, and why is said. raised: which allocator, by name.

    Raises WorkerError where none is left.
    """
    with ExitStack() as stack:
        found = {}
        for name, build in builders.items():
            found[name] = Worker(build, case, raised(name))
            stack.callback(found[name].close)
        for name in list(found):
            try:
                found[name].answer()
            except WorkerError as error:
                print(f"{name} is left out: {error}", flush=True)
                del found[name]
        if not found:
            raise WorkerError("none of its variants can run here")
        time.sleep(1)                                                   # what the last one loaded is written and done
        yield found


def take_turns(found: Mapping[str, Worker], repeats: int, *arguments: Any) -> dict[str, list[float]]:
    """Seconds of every call, as measured where it ran; a slow spell of the machine hits all variants."""
    for _ in range(repeats):
        for worker in found.values():
            worker(*arguments)
    return {name: worker.seconds[-repeats:] for name, worker in found.items()}


def agree(losses: Mapping[str, Mapping[str, float]], case: Case) -> None:
    """Leaves unless all variants that trained from the same start came to the same losses: else they do not do the same work."""
    told = {name: found for name, found in losses.items() if found}
    first = next(iter(told), "")
    apart = {}
    for name, found in told.items():
        apart[name] = max(abs(loss - told[first][client]) / abs(told[first][client]) for client, loss in found.items())
        if not apart[name] <= (1e-4 if case.dtype == "float32" and "bf16" not in name + first else 3e-2):
            sys.exit(f"{case}: from the same start, {first} came to mean losses of {told[first]} and {name} to {found}; nothing is "
                     "measured")
    others = ", ".join(f"{name} {x:.0e}" for name, x in apart.items() if name != first) or "nobody's to compare"
    print(f"{case}: losses from the same start, relative to those of {first}: {others}", flush=True)
