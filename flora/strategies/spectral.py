"""Rules that send the singular part of Σ p_k ΔW_k as a start: QR of the stack's factors and an SVD in rank space, nothing dense.

The best ranks come first and a start has one scale, so a client that truncates it to its rank holds the best it can.
"""
import math
from collections.abc import Sequence

import torch

from flora.adapter import Adapter, Adapters
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.strategies.base import Strategy, Terms, begin_fresh, by_layer, start_scale
from flora.strategies.exact import NOTHING, best_parts, stacked


def _starts(layers: dict[str, Terms], rank: int | None, scale: float | None, tol: float = NOTHING) -> Broadcast:
    scales = {name: start_scale(terms, scale) for name, terms in layers.items()}
    return Broadcast(start=best_parts(stacked(layers), rank, scales, tol) or None)


def _largest(updates: Sequence[Update], ranks: Sequence[int] | None) -> int:
    return max(ranks or [a.rank for u in updates for a in u.adapters.values()])


def aggregate_flexlora(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                       ranks: Sequence[int] | None = None, scale: float | None = None, sent: Adapters | None = None) -> Broadcast:
    """start: the best approximation of Σ p_k ΔW_k at the largest rank, of which a client keeps its best r_k.

    ranks: of all clients of the run (None: of these updates). FlexLoRA, arXiv 2402.11505, section 3; HLoRA, arXiv 2503.00813.
    """
    return _starts(by_layer(updates, weights, absent, server_lr, sent), _largest(updates, ranks), scale)


def aggregate_florist(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                      threshold: float = 0.95, scale: float | None = None, sent: Adapters | None = None) -> Broadcast:
    """start: as few singular values of Σ p_k ΔW_k as hold this share of Σ σ². FLoRIST, arXiv 2506.09199, section 3.

    threshold in (0, 1]; 1 keeps all of them, which is exact for a client of that rank. Σ_{i > r} σ_i² <= (1 - threshold) Σ σ².
    """
    if not 0.0 < threshold <= 1.0:
        raise StrategyError(f"expected threshold in (0, 1]; got {threshold}")
    tol = max(NOTHING, math.sqrt(1.0 - threshold))
    return _starts(by_layer(updates, weights, absent, server_lr, sent), None, scale, tol)


def rank_by_rank(terms: Terms) -> Terms:
    """Every p_k divided, for each rank i, by the sum of p over those who have rank i: into `scale`, as all weights."""
    total = torch.zeros(max(a.rank for a, _ in terms), dtype=torch.float64)
    for a, p in terms:
        total[:a.rank] += p
    return [(Adapter(a.A, a.B, a.scale * (p / total[:a.rank]).to(a.scale)), 1.0) for a, p in terms]


def aggregate_raflora(updates: Sequence[Update], weights: str = "examples", ranks: Sequence[int] | None = None,
                      scale: float | None = None, sent: Adapters | None = None) -> Broadcast:
    """start: the singular part, as flexlora's, of Σ_i Σ_{k: r_k > i} (p_k / Σ_{j: r_j > i} p_j) s_k b_ki a_kiᵀ.

    Each rank is averaged over the clients that have it, so that high ranks, which few clients hold, do not fade round by round
    (rank collapse). Not Σ p_k ΔW_k where ranks differ. raFLoRA, arXiv 2602.13486, section 5.
    """
    layers = by_layer(updates, weights, "renormalise", sent=sent)
    scales = {name: start_scale(terms, scale) for name, terms in layers.items()}
    total = stacked({name: rank_by_rank(terms) for name, terms in layers.items()})
    return Broadcast(start=best_parts(total, _largest(updates, ranks), scales) or None)


FLEXLORA = Strategy("flexlora", "SVD of the sum; each client takes its best ranks", "FlexLoRA, arXiv 2402.11505", begin_fresh,
                    aggregate_flexlora, mixed_ranks=True, groups="any")
FLORIST = Strategy("florist", "SVD of the sum, cut at a share of its energy", "FLoRIST, arXiv 2506.09199", begin_fresh,
                   aggregate_florist, mixed_ranks=True, groups="any")
RAFLORA = Strategy("raflora", "averages each rank over the clients that have it, then SVD", "raFLoRA, arXiv 2602.13486",
                   begin_fresh, aggregate_raflora, mixed_ranks=True)
