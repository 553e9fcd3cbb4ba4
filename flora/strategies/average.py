"""The averages of factors, which FLoRA is measured against: not Σ p_k ΔW_k, since mean(B) mean(A) has cross terms.

Training continues from the average, so nothing is merged: the global model is the base with `start` on top.
"""
from collections.abc import Mapping, Sequence

import torch

from flora.adapter import Adapter, mean, pad
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.strategies.base import Strategy, begin_fresh, by_layer, shared_start


def _one_rank(ranks: Sequence[int]) -> int:
    if len(set(ranks)) != 1:
        raise StrategyError(f"fedit averages factors of one rank; got ranks {sorted(set(ranks), reverse=True)}. Use strategy "
                            "flora (exact for mixed ranks) or zeropad, or give every client the same lora_r.")
    return ranks[0]


def begin_fedit(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    return shared_start(shapes, _one_rank(ranks), seed, scale)


def begin_zeropad(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    return shared_start(shapes, max(ranks), seed, scale)


def _zeros_like(a: Adapter) -> Adapter:
    return Adapter(torch.zeros_like(a.A), torch.zeros_like(a.B), a.scale)


def _means(layers: Mapping[str, list[tuple[Adapter, float]]]) -> dict[str, Adapter]:
    """The average of every layer's factors; what is missing to Σ p = 1 are clients that count as zero."""
    out = {}
    for name, have in layers.items():
        adapters, p = [a for a, _ in have], [p for _, p in have]
        short = 1.0 - sum(p)
        if short > 1e-9:
            adapters, p = [*adapters, _zeros_like(adapters[0])], [*p, short]
        out[name] = mean(adapters, p)
    return out


def aggregate_fedit(updates: Sequence[Update], weights: str = "examples", absent: str = "renormalise") -> Broadcast:
    """start: A = Σ p_k A_k, B = Σ p_k B_k, for adapters of one rank. FedIT, arXiv 2305.05644, section 3."""
    layers = by_layer(updates, weights, absent)
    for have in layers.values():
        _one_rank([a.rank for a, _ in have])
    return Broadcast(start=_means(layers))


def aggregate_zeropad(updates: Sequence[Update], weights: str = "examples", absent: str = "renormalise") -> Broadcast:
    """start: the average of factors padded with zeros to the largest rank; clients truncate. arXiv 2409.05976, section 4."""
    layers = by_layer(updates, weights, absent)
    padded = {}
    for name, have in layers.items():
        rank = max(a.rank for a, _ in have)
        padded[name] = [(pad(a, rank), p) for a, p in have]
    return Broadcast(start=_means(padded))


def aggregate_standalone(updates: Sequence[Update]) -> Broadcast:
    """Nothing is combined: every client goes on from its own adapter."""
    return Broadcast()


FEDIT = Strategy("fedit", "averages A and B of one rank", "FedIT, arXiv 2305.05644", begin_fedit, aggregate_fedit)
ZEROPAD = Strategy("zeropad", "pads to the largest rank with zeros, averages, truncates", "the baseline of arXiv 2409.05976",
                   begin_zeropad, aggregate_zeropad)
CENTRALIZED = Strategy("centralized", "one client with everybody's rows: the upper bound", "the papers' bound", begin_zeropad,
                       aggregate_fedit, pooled=True)
STANDALONE = Strategy("standalone", "no server: every client alone: the lower bound", "the papers' bound", begin_fresh,
                      aggregate_standalone, home="AB")
