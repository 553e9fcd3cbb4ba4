"""What an optimiser step of several clients computes: their rows cut into passes within a budget, made ready in the background."""
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flora.data.batches import Batch, batch_of
from flora.losses import Loss, Row


class Place(NamedTuple):
    """A row of a step: whose it is, its number among that client's rows of the step, which keys its dropout, the tokens of each of
    its sequences, and the first layer that its client trains."""
    client: int
    sequence: int
    row: Row
    lengths: tuple[int, ...]
    depth: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: its places, client by client, and their batch. whose int64 (rows,): their clients; share fp64
    (rows,): what the sum of a row's terms is multiplied by."""
    places: Sequence[Place]
    batch: Batch
    whose: Tensor
    share: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Pass":
        """The same with `change` applied to every tensor."""
        return Pass(self.places, self.batch.map(change), change(self.whose), change(self.share))


def passes(places: Sequence[Place], budget: int, packed: bool) -> Iterator[list[Place]]:
    """Cuts a step into passes of at most so many tokens, of at least one row; clients of one depth together.

    packed: tokens are counted as they are, passes are of like size, and a client's rows stay together. Padded: each as long as the
    longest, sequences of like length together, so that at most a quarter of a pass is padding, but for small ones. In a pass rows
    lie client by client.
    """
    def whole(part: list[Place]) -> list[Place]:
        return sorted(part, key=lambda p: (p.client, p.sequence))

    ordered = sorted(places, key=lambda p: (p.depth, p.client if packed else -max(p.lengths), p.sequence))
    for _, alike in groupby(ordered, key=lambda p: p.depth):
        alike = list(alike)
        total = sum(p.tokens for p in alike)
        share = total / -(-total // budget)
        part: list[Place] = []
        for place in alike:
            if part and _full(part, place, budget, share if packed else None):
                yield whole(part)
                part = []
            part.append(place)
        yield whole(part)


def _full(part: Sequence[Place], place: Place, budget: int, share: float | None) -> bool:
    """Whether one more row does not go into a pass. share: tokens that a packed pass should have; None: padded."""
    if share is not None:
        held = sum(p.tokens for p in part)
        return held + place.tokens > budget or held + place.tokens / 2 > share
    longest, count = max(part[0].lengths), sum(len(p.lengths) for p in part)
    ragged = max(place.lengths) < 0.75 * longest and longest * count >= 256
    return longest * (count + len(place.lengths)) > budget or ragged


class Reading:
    """Numbers of a step on their way to the host: on a GPU the copy begins at once, and `read` waits for it alone."""

    def __init__(self, t: Tensor):
        self._there = t.to("cpu", non_blocking=True)            # into memory that the GPU writes by itself
        self._done = torch.cuda.current_stream(t.device).record_event() if t.is_cuda else None

    def read(self) -> list[Any]:
        """The numbers, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._there.tolist()


class Loader:
    """Makes the passes of steps; the next step's in a thread, while this one computes.

    loss: says what a row puts into a batch; packed, pad_id: how; device: where to; apart: no pass has two rows of one client, and
    a row's share is one over its own terms, where it is one over its client's terms of the step else. budget: of the step begun
    last.
    """

    def __init__(self, loss: Loss, packed: bool, pad_id: int, device: torch.device, apart: bool = False):
        self.loss, self.packed, self.pad_id, self.device, self.apart = loss, packed, pad_id, device, apart
        here = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())     # each thread has a GPU of its own
        self._pool = ThreadPoolExecutor(1, "flora-batches", *here)
        self._next: Future | None = None
        self.budget = 0

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def prefetch(self, places: Callable[[], Sequence[Place]], budget: int) -> None:
        """Begins to make a step: its places, then the passes."""
        def work() -> tuple[Sequence[Place], list[Pass]]:
            found = places()
            return found, self.make(found, budget)

        self.budget, self._next = budget, self._pool.submit(work)

    def take(self) -> tuple[Sequence[Place], list[Pass]]:
        """The places and passes of the step that was begun. Raises what making them raised."""
        return self._next.result()

    def make(self, places: Sequence[Place], budget: int) -> list[Pass]:
        """The passes of a step, in pinned memory where the model is on a GPU."""
        out, waves = [], [places]
        if self.apart:
            waves = [[p for p in places if p.sequence == i] for i in sorted({p.sequence for p in places})]
        terms = [self.loss.terms(p.row) for p in places]
        whole = Counter[int]()
        for p, count in zip(places, terms, strict=True):
            whole[p.client] += count
        share = {(p.client, p.sequence): 1.0 / (count if self.apart else whole[p.client])
                 for p, count in zip(places, terms, strict=True)}
        for part in (part for wave in waves for part in passes(wave, budget, self.packed)):
            batch = batch_of([p.row for p in part], self.packed, self.pad_id, self.loss.sequences)
            one = Pass(part, batch, torch.tensor([p.client for p in part]),
                       torch.tensor([share[p.client, p.sequence] for p in part], dtype=torch.float64))
            out.append(one.map(Tensor.pin_memory) if self.device.type == "cuda" else one)
        return out

    def to_device(self, one: Pass) -> Pass:
        """Its tensors there; on a GPU nothing waits for the copies."""
        return one.map(lambda t: t.to(self.device, non_blocking=True))


def tokens_a_step(rows: Sequence[Row], count: int, loss: Loss) -> int:
    """About how many tokens a step of so many rows has, by the first rows."""
    some = [sum(len(part["input_ids"]) for part in loss.sequences(rows[i])) for i in range(min(64, len(rows)))]
    return round(sum(some) / len(some) * min(count, len(rows)))
