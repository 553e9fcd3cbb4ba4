"""Measures the forms and the blocks of rule.py on this card and writes the table that rule reads.

Per shape, first the blocks of every kernel, then, with those, the forms of the forward and of the backward operator. What is not at
least 3 % faster than the default blocks, or than the `addmm_` form, is not taken, so that noise does not choose; clients have no
`addmm_` form, so there the cuBLAS base product is the one to beat.

Code is compiled beforehand on all cores. What is timed is the card alone: it is kept busy while calls are queued, and several calls
lie between two events. x is read again at once, so from the L2 cache where it fits, as behind the layer that wrote it; weights are
taken in turn, so that they come from memory, as in a model.
"""
import contextlib
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from flora.kernels import triton as backend
from flora.kernels.triton import configs, rule, tiles
from flora.kernels.triton.configs import Config
from flora.kernels.triton.grads import Piece, dy_pass, outer
from flora.kernels.triton.launch import ahead
from flora.kernels.triton.linear import add_low_rank
from flora.kernels.triton.shrink import shrink

MARGIN = 0.97
CLIENTS = 10
ROUNDS, CALLS, BATCH = 5, 20, 2e-3         # rounds; most calls of a round, and the seconds that they are to take together
HOPELESS = 1.3                             # times the fastest in the first round: not measured further
L2_BYTES = 128 << 20                       # weights taken in turn are more than any card's L2 cache


class Shape(NamedTuple):
    """A call to measure: rows, out_features, in_features, the ranks of an adapter, whether ten clients share the rows, and how many
    such layers read the same x (q, k and v: three)."""
    M: int
    N: int
    K: int
    ranks: int
    segmented: bool
    layers: int = 1

    def key(self, op: str, dtype: torch.dtype) -> str:
        return rule.shape_key(op, self.M, self.N, self.K, self.layers * self.ranks, self.segmented, dtype)


class Measured(NamedTuple):
    """What one pass of one shape gave: its key, what was taken, and the median seconds of each that was tried."""
    key: str
    taken: rule.Form | Config
    seconds: dict[Any, float]


def card_seconds(call: Callable[[], object], count: int, busy: float) -> float:
    """Seconds a call takes the card, of `count` in a row: it is kept busy while the host queues them. busy: the seconds of that.
    Not for calls that wait for the card."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(3e9 * min(busy, 0.1)))                               # cycles, of at most 2 GHz: half as long again
    start.record()
    for _ in range(count):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / count


class _Clock:
    """Seconds of a call on the card, or of the host where there is none."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def once(self, call: Callable[[], object], count: int, busy: float) -> float:
        """Seconds a call, of `count` in a row. busy: seconds that queueing them takes the host."""
        if self.cuda:
            return card_seconds(call, count, busy)
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count

    def compare(self, calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        """Median seconds of every call, taking turns; of one that is far behind the seconds of its first round. What cannot be
        compiled, and what the card has no room for, is left out with a warning."""
        counts, seconds, fastest = {}, dict[Any, list[float]](), 0.0
        for name, call in calls.items():
            try:
                self.once(call, 1, 0.0)
                began = time.perf_counter()
                call()
                host = time.perf_counter() - began
                alone = self.once(call, 1, host)
            except (TritonError, torch.cuda.OutOfMemoryError) as error:
                warnings.warn(f"not measured: {name}, {type(error).__name__}: {error}", stacklevel=2)
                continue
            counts[name] = max(1, min(CALLS, int(BATCH / alone))), host
        for number in range(ROUNDS):
            for name, (count, host) in counts.items():
                if number < 1 or seconds[name][0] <= HOPELESS * fastest:
                    seconds.setdefault(name, []).append(self.once(calls[name], count, count * host))
            fastest = min(values[0] for values in seconds.values()) if seconds else 0.0
        return {name: statistics.median(values) for name, values in seconds.items()}


class _Operands:
    """Random operands of a shape, the operators' calls on them, and every kernel's."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        M, N, K, R, segmented, L = shape
        new, count = {"dtype": dtype, "device": device}, CLIENTS if segmented else 1
        self.shape, self.dtype, self.device, total = shape, dtype, torch.device(device), count * R
        self.x, self.h = torch.randn(M, K, **new), torch.randn(M, L * R, **new)
        self.dys = [torch.randn(M, N, **new) for _ in range(L)]
        copies = 1 if device == "cpu" else max(1, min(16, L2_BYTES // (L * N * K * dtype.itemsize)))
        self.weights = itertools.cycle([[torch.randn(N, K, **new) for _ in range(L)] for _ in range(copies)])
        self.As, self.Bs = [torch.randn(total, K, **new) for _ in range(L)], [torch.randn(N, total, **new) for _ in range(L)]
        self.scale = torch.ones(total, device=device)
        self.offsets = [torch.tensor([n * k // count for k in range(count + 1)]) for n in (M, total)] if segmented else [None, None]
        self.of = tiles.training_ranks(*self.offsets, total)
        self.shared = (self.As, self.Bs, [self.scale] * L, [], *self.offsets, None, [R] * L, 0.0, [])

    def passes(self) -> dict[str, Callable[[], object]]:
        """The forward and the backward operator."""
        L = self.shape.layers
        return {"forward": lambda: backend.lora_linear(self.x, next(self.weights), [None] * L, *self.shared),
                "backward": lambda: backend.lora_linear_backward(self.dys, self.x, self.h, next(self.weights), *self.shared,
                                                                 [True] * (2 * L + 1))}

    def kernels(self) -> Iterator[tuple[tuple[Any, ...], Callable[[Config], object]]]:
        """((kernel, M, N, K, ranks, turned), its call with given blocks) of every kernel that the passes may launch."""
        (M, N, K, R, segmented, L), of, x, dy = self.shape, self.of, self.x, self.dys[0]
        A, B, scale = torch.cat(self.As), self.Bs[0], self.scale.repeat(L)
        whole = of if segmented else tiles.training_ranks(None, None, L * R)
        width, layers = (R, L) if segmented else (L * R, 1)
        h, h1, suffix = self.h, self.h[:, :R], "_parts" if segmented else ""
        y, dx, ranks = dy.clone(), x.clone(), R if segmented else of.ranks
        dA, dB, dh1 = [torch.empty_like(a) for a in self.As], torch.empty_like(B), torch.empty_like(h1)
        pieces = [Piece(out, i, i * R, of) for i, out in enumerate(dA)]
        yield ("shrink", M, 0, K, L * R, False), lambda c: shrink(x, A, scale, whole, width, layers, out=h, config=c)
        yield ("outer", M, 0, K, L * R, False), lambda c: outer(h, x, pieces, whole, width, layers, config=c)
        if R <= configs.ONE_PASS_RANKS:
            yield ("dy_pass", M, N, 0, R, False), lambda c: dy_pass(dy, B, self.scale, h1, dh1, dB, of, R, config=c)
        else:
            yield ("shrink", M, 0, N, R, False), lambda c: shrink(dy, B.T, self.scale, of, R, out=dh1, config=c)
            yield ("outer", M, 0, N, R, False), lambda c: outer(h1, dy, [Piece(dB.T, 0, 0, of)], of, R, config=c)
        yield ("expand" + suffix, M, N, 0, ranks, False), lambda c: add_low_rank(y, h1, B, of, R, config=c)
        yield ("expand" + suffix, M, K, 0, width, False), lambda c: add_low_rank(dx, h, A.T, whole, width, layers, config=c)
        yield ("linear" + suffix, M, N, K, ranks, False), lambda c: add_low_rank(y, h1, B, of, R, x=x, w=next(self.weights)[0],
                                                                                 config=c)
        if L == 1:
            yield ("linear" + suffix, M, K, N, ranks, True), lambda c: add_low_rank(dx, h, A.T, of, R, x=dy,
                                                                                    w=next(self.weights)[0].T, config=c)

    def candidates(self, known: Mapping[str, Config]) -> dict[str, dict[Config, Callable[[], object]]]:
        """By blocks_key, every kernel whose blocks are not known, with each of its candidates; in fp32 there is one."""
        found: dict[str, dict[Config, Callable[[], object]]] = {}
        for (kernel, *sizes, turned), call in self.kernels() if self.dtype != torch.float32 else ():
            key = rule.blocks_key(kernel, *sizes, self.dtype, turned)
            if key not in known and key not in found:
                every = configs.candidates(kernel, *sizes, self.dtype, self.device)
                found[key] = {config: lambda call=call, config=config: call(config) for config in every}
        return found

    def forms(self) -> list[rule.Form]:
        return [form for form in rule.FORMS if form.skinny == "triton" or not self.shape.segmented]


def _with(form: rule.Form, call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with rule.use(form):
            call()
    return run


def _compile(calls: Iterable[Callable[[], object]]) -> None:
    """Compiles what calls launch; what cannot be compiled says so when it is called."""
    with contextlib.suppress(TritonError), ahead():
        for call in calls:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                call()


def measure(shape: Shape, dtype: torch.dtype, device: str, blocks: dict[str, Config]) -> Iterator[Measured]:
    """The best blocks of each kernel of a shape, which are added to `blocks`, then, with these, the best form of each pass."""
    operands, clock = _Operands(shape, dtype, device), _Clock(device)
    tried = operands.candidates(blocks)
    _compile(call for calls in tried.values() for call in calls.values())
    for key, calls in tried.items():
        if seconds := clock.compare(calls):
            yield Measured(key, blocks.setdefault(key, _best(seconds, next(iter(calls)))), seconds)
    rule.measuring(blocks)
    passes = {op: {form: _with(form, call) for form in operands.forms()} for op, call in operands.passes().items()}
    _compile(call for calls in passes.values() for call in calls.values())
    for op, calls in passes.items():
        if seconds := clock.compare(calls):
            yield Measured(shape.key(op, dtype), _best(seconds, next(iter(calls))), seconds)


def _best(seconds: Mapping[Any, float], floor: Any) -> Any:
    """The fastest, if it is so by the margin, else the floor (where that could run)."""
    best = min(seconds, key=seconds.__getitem__)
    return best if floor not in seconds or seconds[best] < MARGIN * seconds[floor] else floor


class Table:
    """The table of this card that is being measured: read once, written after every shape."""

    def __init__(self, device: str):
        name = rule.device_name(torch.device(device))
        self.path, self.about = rule.own_tables() / f"{rule.device_key(name)}.json", {"device": name, **versions()}
        self.forms, self.blocks = dict[str, rule.Form](), dict[str, Config]()
        if self.path.exists() and _about(self.path) == self.about:            # of another card or version: measured again
            self.forms, self.blocks, _ = rule.read(self.path)

    def has(self, shape: Shape, dtype: torch.dtype) -> bool:
        return all(shape.key(op, dtype) in self.forms for op in ("forward", "backward"))

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        blocks = {key: astuple(config)[:7] for key, config in self.blocks.items()}
        partial.write_text(json.dumps({"about": self.about, "forms": self.forms, "blocks": blocks}, indent=1) + "\n")
        partial.replace(self.path)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": backend.triton.__version__}


def _about(path: Path) -> object:
    try:
        return json.loads(path.read_text())["about"]
    except (ValueError, KeyError, TypeError):
        return None


def tune(shapes: Sequence[Shape], dtype: torch.dtype, device: str = "cuda", minutes: float | None = None,
         ) -> Iterator[tuple[int, list[Measured]]]:
    """Measures every shape that this card's table in rule.own_tables() has not, in their order, and adds each to it at once.

    minutes: no shape is begun after them. Yields (shapes left, what was measured) after every shape; shapes that round to the same
    key are measured once.
    """
    table, ends = Table(device), None if minutes is None else time.monotonic() + 60 * minutes
    due: dict[str, Shape] = {}
    for shape in shapes:
        if not table.has(shape, dtype):
            due.setdefault(shape.key("forward", dtype), shape)
    try:
        for number, shape in enumerate(due.values(), 1):
            if ends is not None and time.monotonic() >= ends:
                return
            results = list(measure(shape, dtype, device, table.blocks))
            table.forms.update({m.key: m.taken for m in results if isinstance(m.taken, rule.Form)})
            table.write()
            yield len(due) - number, results
    finally:
        rule.measuring(None)
        rule.forget()
