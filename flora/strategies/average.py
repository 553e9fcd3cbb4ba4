"""The averages of factors, which FLoRA is measured against: not Σ p_k ΔW_k, since mean(B) mean(A) has cross terms.

Training continues from the average, so nothing is merged: the global model is the base with `start` on top.
"""
import math
from collections.abc import Mapping, Sequence

import torch

from flora.adapter import Adapter, Adapters, combine, normalised, pad
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.parallel import each
from flora.strategies.base import (
    Strategy,
    Terms,
    begin_fresh,
    begin_one_rank,
    begin_padded,
    by_layer,
    needs_sent,
    one_scale,
)


def _zeros_like(a: Adapter) -> Adapter:
    return Adapter(torch.zeros_like(a.A), torch.zeros_like(a.B), a.scale)


def averages(layers: Mapping[str, Terms], mixed_alpha: str) -> dict[str, Adapter]:
    """Every layer's factors averaged at one scale, padded to its largest rank; what lacks to Σ p = 1 counts as zero."""
    out = {}
    for name, terms in layers.items():
        one_scale(name, terms, mixed_alpha)
        rank = max(a.rank for a, _ in terms)
        adapters, p = [pad(a, rank) for a, _ in terms], [p for _, p in terms]
        short = 1.0 - sum(p)
        if abs(short) > 1e-9:
            adapters, p = [*adapters, _zeros_like(adapters[0])], [*p, short]
        out[name] = combine(adapters, p)
    return out


def aggregate_fedit(updates: Sequence[Update], weights: str | float = "examples", absent: str = "renormalise",
                    server_lr: float = 1.0, mixed_alpha: str = "refuse", sent: Adapters | None = None) -> Broadcast:
    """start: A = Σ p_k A_k, B = Σ p_k B_k, for adapters of one rank. FedIT, arXiv 2305.05644, section 3."""
    needs_sent(weights, server_lr, sent)
    return Broadcast(start=averages(by_layer(updates, weights, absent, server_lr, sent), mixed_alpha))


def aggregate_zeropad(updates: Sequence[Update], weights: str | float = "examples", absent: str = "renormalise",
                      server_lr: float = 1.0, mixed_alpha: str = "fold", sent: Adapters | None = None) -> Broadcast:
    """start: the average of factors padded with zeros to the largest rank; clients truncate. arXiv 2409.05976, section 4.

    One alpha for mixed ranks is a scale for each, so those are written at one scale first unless mixed_alpha="refuse".
    """
    needs_sent(weights, server_lr, sent)
    return Broadcast(start=averages(by_layer(updates, weights, absent, server_lr, sent), mixed_alpha))


def _size(a: Adapter) -> float:
    """‖B diag(s) A‖_F = √tr((BᵀB) S (AAᵀ) S), by products of rank size: half of its digits, enough for a weight."""
    B, A = a.B.double() * a.scale.double(), a.A.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0.0).sqrt())


def aggregate_hetlora(updates: Sequence[Update], mixed_alpha: str = "fold", sent: Adapters | None = None) -> Broadcast:
    """start: A = Σ p_k A_k, B = Σ p_k B_k padded to the largest rank, with p_k = ‖ΔW_k‖_F / Σ ‖ΔW_j‖_F layer by layer.

    A layer counts for those who have it; sent keeps the layers that nobody has. How a client's rank shrinks: `pruned_rank`.
    HetLoRA, arXiv 2401.06432, section 3.
    """
    layers = by_layer(updates, "uniform", "renormalise", sent=sent)
    norms = each(lambda name: [_size(a) for a, _ in layers[name]], layers)
    weighed = {}
    for (name, terms), sizes in zip(layers.items(), norms, strict=True):
        p = normalised(sizes if any(sizes) else [1.0] * len(sizes))
        weighed[name] = [(a, pk) for (a, _), pk in zip(terms, p, strict=True)]
    return Broadcast(start=averages(weighed, mixed_alpha))


def tail(adapters: Adapters, rank: int) -> torch.Tensor:
    """Σ over layers of ‖B[:, rank:]‖_F ‖A[rank:]‖_F, what the ranks from `rank` on hold: HetLoRA's regulariser, with gradient."""
    parts = [torch.linalg.norm(a.B[:, rank:]) * torch.linalg.norm(a.A[rank:]) for a in adapters.values() if a.rank > rank]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def kept_rank(rank: int, decay: float) -> int:
    """⌊decay · rank⌋, at least 1: what HetLoRA's pruning leaves of a rank."""
    return max(1, math.floor(decay * rank))


def pruned_rank(before: Adapters, after: Adapters, rank: int, decay: float = 0.99) -> int:
    """The rank that a client goes on with: ⌊decay · rank⌋ (at least 1) where the ranks above it shrank in training, else rank.

    before, after: its adapters at the start and at the end of the round. `truncate` then cuts them. Raises StrategyError.
    HetLoRA, arXiv 2401.06432, section 3.2 (rank self-pruning).
    """
    if not 0.0 < decay < 1.0 or rank < 1:
        raise StrategyError(f"expected decay in (0, 1) and a rank of at least 1; got {decay} and {rank}")
    keep = kept_rank(rank, decay)
    return keep if float(tail(after, keep)) < float(tail(before, keep)) else rank


def aggregate_fedsa(updates: Sequence[Update], weights: str | float = "examples", absent: str = "renormalise",
                    server_lr: float = 1.0, sent: Adapters | None = None) -> Broadcast:
    """start: A = Σ p_k A_k with B = 0; every client puts in the B that it keeps. Looks at no B. FedSA-LoRA, arXiv 2410.01463.

    All must train at one scale, since a B that stays at home cannot take up another.
    """
    needs_sent(weights, server_lr, sent)
    layers = {name: [(Adapter(a.A, torch.zeros_like(a.B), a.scale), p) for a, p in terms]
              for name, terms in by_layer(updates, weights, absent, server_lr, sent).items()}
    return Broadcast(start=averages(layers, "refuse"))


def aggregate_standalone(updates: Sequence[Update]) -> Broadcast:
    """Nothing is combined: every client goes on from its own adapter."""
    return Broadcast()


FEDIT = Strategy("fedit", "averages A and B of one rank", "FedIT, arXiv 2305.05644", begin_one_rank, aggregate_fedit,
                 groups="alike")
ZEROPAD = Strategy("zeropad", "pads to the largest rank with zeros, averages, truncates", "the baseline of arXiv 2409.05976",
                   begin_padded, aggregate_zeropad, mixed_ranks=True, groups="alike")
HETLORA = Strategy("hetlora", "zeropad weighted by the norm of ΔW; ranks prune themselves", "HetLoRA, arXiv 2401.06432",
                   begin_padded, aggregate_hetlora, mixed_ranks=True, prunes=True)
FEDSA = Strategy("fedsa", "averages A; every client keeps its B", "FedSA-LoRA, arXiv 2410.01463", begin_one_rank, aggregate_fedsa,
                 home="B")
CENTRALIZED = Strategy("centralized", "one client with everybody's rows: the upper bound", "the papers' bound", begin_padded,
                       aggregate_fedit, pooled=True)
STANDALONE = Strategy("standalone", "no server: every client alone: the lower bound", "the papers' bound", begin_fresh,
                      aggregate_standalone, home="AB", mixed_ranks=True)
