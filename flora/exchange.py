"""What the parties exchange: an Update goes up, a Broadcast comes down. Plain records; messages.py makes bytes of them."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from flora.adapter import Adapter, Adapters

TRAIN = ("AB", "A", "B", "core", "weight")


@dataclass(frozen=True)
class Update:
    """What a client sends up: its whole adapters (the start included), and what the server needs to weigh them.

    num_examples: training rows, the weight of the client; metrics: numbers by name; base_version: of the broadcast it was
    trained on; client: its name; base: its weights (out, in) by layer, for full fine-tuning, which has no adapters.
    """
    adapters: Adapters
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    base_version: int = 0
    client: str = ""
    base: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Broadcast:
    """What the server sends down.

    merge: adapters to write into the base, once per run and version; start: where training continues (None: every client
    draws a fresh adapter); train: what trains, the factors "AB", "A" or "B", the "core" of Fed-SB (A = core · its frame), or the
    "weight" itself; version counts the base's states within a run.
    since: the version that merge adds to (None: version - 1; less for a client that missed rounds); base: weights (out, in) of
    this version by layer, which take the place of the model's: where they are fewer bytes than what was missed.
    frame: the seed of Fed-SB's fixed factors (frames.py).
    """
    merge: Adapters | None = None
    start: Adapters | None = None
    version: int = 0
    train: Literal["AB", "A", "B", "core", "weight"] = "AB"
    run: str = ""
    since: int | None = None
    base: Mapping[str, torch.Tensor] | None = None
    frame: int = 0


def cut(a: Adapter | None, factor: str, rank: int) -> torch.Tensor | None:
    """A factor, "A" or "B", of the first `rank` ranks; None where there are not so many."""
    if a is None or a.rank < rank:
        return None
    return a.A[:rank] if factor == "A" else a.B[:, :rank]
