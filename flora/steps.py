"""What an optimiser step of several clients computes: their rows cut into passes within a budget, made ready in the background."""
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

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
    """One forward and backward pass: its places, client by client, and their batch."""
    places: Sequence[Place]
    batch: Batch


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


class Loader:
    """Makes the passes of steps; the next step's in a thread, while this one computes.

    loss: says what a row puts into a batch; packed, pad_id: how; device: where to; apart: no pass has two rows of one client.
    budget: of the step begun last.
    """

    def __init__(self, loss: Loss, packed: bool, pad_id: int, device: torch.device, apart: bool = False):
        self.loss, self.packed, self.pad_id, self.device, self.apart = loss, packed, pad_id, device, apart
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flora-batches")
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
        for part in (part for wave in waves for part in passes(wave, budget, self.packed)):
            batch = batch_of([p.row for p in part], self.packed, self.pad_id, self.loss.sequences)
            out.append(Pass(part, batch.map(torch.Tensor.pin_memory) if self.device.type == "cuda" else batch))
        return out

    def to_device(self, one: Pass) -> Batch:
        return one.batch.map(lambda t: t.to(self.device, non_blocking=True))


def tokens_a_step(rows: Sequence[Row], count: int, loss: Loss) -> int:
    """About how many tokens a step of so many rows has, by the first rows."""
    some = [sum(len(part["input_ids"]) for part in loss.sequences(rows[i])) for i in range(min(64, len(rows)))]
    return round(sum(some) / len(some) * min(count, len(rows)))
