"""What a strategy is: two functions, and the facts about them that a run must know; and what the rules share.

Every rule is a weighted sum over clients, of ΔW or of factors, and one idea makes server learning rates, fixed weights and
missing layers the same thing: what the weights lack to Σ p = 1 counts as the start that was sent (as zero, where none was).
So Σ p_k ΔW_k + (1 - Σ p_k) ΔW_sent is a step from the start towards the clients, and of length 1 with p_k = n_k / Σ n.
"""
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flora.adapter import Adapter, Adapters, all_layers, fresh_adapters, normalised
from flora.errors import StrategyError
from flora.messages import Broadcast, Update

Terms = list[tuple[Adapter, float]]


@dataclass(frozen=True)
class Strategy:
    """One published way to combine clients.

    begin(shapes, ranks, seed, scale=2.0): the first Broadcast; shapes (out, in) by layer, ranks of all clients of the run.
    aggregate(updates, **options): the next Broadcast. Options that a run fills in have these names: weights, ranks, scale and
    seed as in begin, and sent, the start that the updates were trained from.
    home: the factors that never leave the client ("", "B" or "AB"). pooled: the run trains one client on everybody's rows (the
    papers' upper bound). mixed_ranks: whether clients may differ in rank. dense: updates carry weights, not adapters. prunes:
    clients lower their own ranks for good while they train. groups: the answers that it can aggregate of groups (group.py): "any",
    as it sums ΔW; "alike", of groups that aggregate by this rule themselves, as it combines factors; "", none. splits: one part of
    the sum is merged and the rest sent as a start, so an old update counts what was merged since twice.
    """
    name: str
    summary: str
    paper: str
    begin: Callable[..., Broadcast]
    aggregate: Callable[..., Broadcast]
    home: Literal["", "B", "AB"] = ""
    pooled: bool = False
    mixed_ranks: bool = False
    dense: bool = False
    prunes: bool = False
    groups: Literal["", "alike", "any"] = ""
    splits: bool = False

    @property
    def options(self) -> list[str]:
        """Names of the options that aggregate takes."""
        return list(inspect.signature(self.aggregate).parameters)[1:]


def begin_fresh(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """Every client draws its own adapter: right wherever ΔW, not the factors, is what is combined."""
    return Broadcast()


def begin_one_rank(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """A shared start for clients of one rank. Raises StrategyError for mixed ranks."""
    return shared_start(shapes, one_rank(ranks), seed, scale)


def begin_padded(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """A shared start of the largest rank, which clients truncate."""
    return shared_start(shapes, max(ranks), seed, scale)


def begin_frozen_A(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """A shared start for clients of one rank whose B trains."""
    return replace(begin_one_rank(shapes, ranks, seed, scale), train="B")


def shared_start(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, scale: float, version: int = 0) -> Broadcast:
    """One A for all, drawn from the seed and version, and B = 0: independent random A's must not be averaged.

    shapes: (out, in) by layer; rank: of the start; scale: its alpha / rank.
    """
    key = (seed, "start") if version == 0 else (seed, "start", version)
    return Broadcast(start=fresh_adapters(shapes, rank, scale * rank, *key))


def one_rank(ranks: Sequence[int]) -> int:
    """The rank that all have. Raises StrategyError, which names the strategies that take mixed ranks."""
    if len(set(ranks)) != 1:
        from flora.strategies import STRATEGIES

        mixed = ", ".join(s.name for s in STRATEGIES.values() if s.mixed_ranks and not s.home and not s.dense)
        raise StrategyError(f"expected clients of one rank; got ranks {sorted(set(ranks), reverse=True)}. Give every client the "
                            f"same lora_r, or use a strategy that takes mixed ranks: {mixed}.")
    return ranks[0]


def one_of(name: str, value: object, *allowed: str) -> None:
    """Raises StrategyError unless the option has one of these values."""
    if value not in allowed:
        raise StrategyError(f"expected {name}=" + " or ".join(f'"{a}"' for a in allowed) + f"; got {value!r}")


def shares(updates: Sequence[Update], weights: str | float) -> list[float]:
    """p_k of each update: n_k / Σ n ("examples", or "tokens" from its metrics), 1 / K ("uniform"), or this factor for each."""
    if isinstance(weights, (int, float)) and not isinstance(weights, bool):
        if not 0.0 < weights < math.inf:
            raise StrategyError(f"expected a positive, finite factor as weights; got {weights}")
        return [float(weights)] * len(updates)
    if weights not in ("examples", "uniform", "tokens"):
        raise StrategyError(f'expected weights="examples", "uniform", "tokens" or a factor for every client; got {weights!r}')
    counts: dict[str, Callable[[Update], float]] = {"examples": lambda u: u.num_examples, "uniform": lambda u: 1,
                                                    "tokens": lambda u: u.metrics.get("tokens", 0)}
    values = [float(counts[weights](u)) for u in updates]
    for u, value in zip(updates, values, strict=True):
        if not 0.0 < value < math.inf:
            raise StrategyError(f'client {u.client}: expected metrics["tokens"] of at least 1 with weights="tokens"; got '
                                f'{u.metrics.get("tokens")}. Report them, or weigh by examples.')
    return normalised(values)


def by_layer(updates: Sequence[Update], weights: str | float, absent: str, server_lr: float = 1.0,
             sent: Adapters | None = None) -> dict[str, Terms]:
    """For every layer the terms (adapter, p) of its sum: updates, then the start that was sent for what lacks to Σ p = 1.

    absent: what a client without the layer counts as: "zero", no change (p_k over all clients; the start, or 0 where none was
    sent), "renormalise" takes p over those who have the layer. server_lr multiplies every p. A layer that no client has stays as
    it was sent.
    """
    one_of("absent", absent, "zero", "renormalise")
    if not 0.0 < server_lr < math.inf:
        raise StrategyError(f"expected a positive, finite server_lr; got {server_lr}")
    everyone = shares(updates, weights)
    held = sent or {}
    out: dict[str, Terms] = {}
    for layer in all_layers([*(u.adapters for u in updates), held]):
        have = [(u.adapters[layer], p) for u, p in zip(updates, everyone, strict=True) if layer in u.adapters]
        total = sum(p for _, p in have) if absent == "renormalise" and isinstance(weights, str) else 1.0
        terms = [(a, server_lr * p / total) for a, p in have]
        rest = 1.0 - sum(p for _, p in terms)
        if layer in held and abs(rest) > 1e-9:
            terms.append((held[layer], rest))
        out[layer] = terms
    return out


def needs_sent(weights: str | float, server_lr: float, sent: Adapters | None) -> None:
    """Raises StrategyError where a step of another length than 1 is asked of a rule on factors, and where it starts is not said."""
    if sent is None and not (server_lr == 1.0 and isinstance(weights, str)):
        raise StrategyError(f"expected sent, the start that the updates were trained from, with server_lr={server_lr} and "
                            f"weights={weights!r}; got None. Give Broadcast.start of the round, or leave both as they are.")


def one_scale(layer: str, terms: Terms, mixed_alpha: str) -> None:
    """Raises StrategyError for adapters trained under different alpha / r, unless mixed_alpha is "fold"."""
    one_of("mixed_alpha", mixed_alpha, "refuse", "fold")
    first, scales = terms[0][0].scale, sorted({s for a, _ in terms for s in a.scale.tolist()})
    if mixed_alpha == "refuse" and len(scales) > 1 and any(a.scale.tolist() != first.tolist() for a, _ in terms):
        raise StrategyError(f"{layer}: expected one scale (alpha / r) from all clients, since factors are averaged; got {scales}. "
                            'Give every client the same alpha, pass mixed_alpha="fold" to write all at one scale first, or use '
                            "flora, which is exact for any.")


def one_factor(layer: str, terms: Terms, factor: Literal["A", "B"]) -> Tensor:
    """The factor that all clients share, number by number. Raises StrategyError where they differ."""
    first: Tensor = getattr(terms[0][0], factor)
    for number, (a, _) in enumerate(terms):
        if not torch.equal(getattr(a, factor), first):
            raise StrategyError(f"{layer}: expected one {factor}, the same for all clients, as it did not train in this round; "
                                f"got another one from client number {number} than from number 0. Start the run with "
                                "Strategy.begin and train what Broadcast.train says, or use flora.")
    return first


def start_scale(terms: Terms, scale: float | None) -> float:
    """The scale that a start is sent with: the run's, or the mean of what the clients trained with."""
    if scale is not None:
        return float(scale)
    values = [(float(a.scale.abs().double().mean()), abs(p)) for a, p in terms]
    first = values[0][0]
    return first if all(v == first for v, _ in values) else sum(v * p for v, p in values) / sum(p for _, p in values)


def leave_home(adapters: Adapters, home: str) -> dict[str, Adapter]:
    """What may travel of a client's adapters: the factors that stay at home are zeros."""
    return {name: Adapter(torch.zeros_like(a.A) if "A" in home else a.A, torch.zeros_like(a.B) if "B" in home else a.B, a.scale)
            for name, a in adapters.items()}


def come_home(start: Adapters, held: Adapters, home: str) -> dict[str, Adapter]:
    """Where a client goes on: the start that the server sent, with its own factors (home: which) where it has held some of the
    same rank."""
    out = dict(start)
    for name, a in start.items():
        own = held.get(name) if home else None
        if own is not None and own.rank == a.rank:
            out[name] = Adapter(own.A if "A" in home else a.A, own.B if "B" in home else a.B, a.scale)
    return out
