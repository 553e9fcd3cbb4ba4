"""What a strategy is: two functions, and the facts about them that a run must know."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flora.adapter import Adapter, all_layers, fresh_adapters, normalised
from flora.errors import StrategyError
from flora.messages import Broadcast, Update


@dataclass(frozen=True)
class Strategy:
    """One published way to combine clients.

    begin(shapes, ranks, seed, scale=2.0): the first Broadcast; shapes (out, in) by layer, ranks of all clients of the run.
    aggregate(updates, **options): the next Broadcast. home: the factors that never leave the client ("" or "AB").
    pooled: the run trains one client on everybody's rows (the papers' upper bound).
    """
    name: str
    summary: str
    paper: str
    begin: Callable[..., Broadcast]
    aggregate: Callable[..., Broadcast]
    home: Literal["", "AB"] = ""
    pooled: bool = False


def begin_fresh(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """Every client draws its own adapter: right wherever ΔW, not the factors, is what is combined."""
    return Broadcast()


def shared_start(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, scale: float) -> Broadcast:
    """One A for all, drawn from the seed, and B = 0: independent random A's must not be averaged."""
    return Broadcast(start=fresh_adapters(shapes, rank, scale * rank, seed, "start"))


def weights_of(updates: Sequence[Update], weights: str) -> list[float]:
    """The weight of each update before it is normalised: its number of examples, or 1."""
    if weights not in ("examples", "uniform"):
        raise StrategyError(f'expected weights="examples" or "uniform"; got {weights!r}')
    return [float(u.num_examples) if weights == "examples" else 1.0 for u in updates]


def by_layer(updates: Sequence[Update], weights: str, absent: str) -> dict[str, list[tuple[Adapter, float]]]:
    """For every layer, the adapters that clients sent and their p_k.

    absent: what a client without the layer counts as: "zero" keeps p_k = n_k / Σ n over all clients, "renormalise" takes it over
    those who have the layer.
    """
    if absent not in ("zero", "renormalise"):
        raise StrategyError(f'expected absent="zero" or "renormalise"; got {absent!r}')
    everyone = normalised(weights_of(updates, weights))
    out = {}
    for layer in all_layers([u.adapters for u in updates]):
        have = [(u.adapters[layer], p) for u, p in zip(updates, everyone, strict=True) if layer in u.adapters]
        total = sum(p for _, p in have) if absent == "renormalise" else 1.0
        out[layer] = [(adapter, p / total) for adapter, p in have]
    return out
