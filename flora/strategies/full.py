"""Full fine-tuning: the papers' bound, and the one rule that holds dense tensors, a layer at a time in fp32."""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flora.adapter import all_layers
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.strategies.base import Strategy, shares


def begin_full(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """Every client trains the base's own weights."""
    return Broadcast(train="weight")


def _averaged(terms: list[tuple[Tensor, float]]) -> Tensor:
    """Σ p_k W_k / Σ p_k, summed in fp32 (fp64 for fp64) in one buffer, in the clients' dtype."""
    dtype, share = terms[0][0].dtype, sum(p for _, p in terms)
    total = torch.zeros_like(terms[0][0], dtype=torch.promote_types(dtype, torch.float32))
    for weight, p in terms:
        total.add_(weight, alpha=p / share)
    return total.to(dtype)


def aggregate_full(updates: Sequence[Update], weights: str = "examples") -> Broadcast:
    """base: W = Σ p_k W_k of the weights that clients trained (Update.base), over those who have the layer.

    FedAvg, arXiv 1602.05629, algorithm 1.
    """
    if not isinstance(weights, str):
        raise StrategyError(f"expected weights by name for full, since weights are averaged whole; got the factor {weights}. Use "
                            '"examples", "uniform" or "tokens".')
    p = shares(updates, weights)
    held = [u.base or {} for u in updates]
    base = {layer: _averaged([(one[layer], pk) for one, pk in zip(held, p, strict=True) if layer in one])
            for layer in all_layers(held)}
    return Broadcast(base=base, train="weight")


FULL = Strategy("full", "full fine-tuning: averages the weights themselves", "FedAvg, arXiv 1602.05629", begin_full, aggregate_full,
                mixed_ranks=True, dense=True)
