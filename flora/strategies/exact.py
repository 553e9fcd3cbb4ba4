"""FLoRA: the server's answer is the clients' stack, Σ p_k s_k B_k A_k without a rounding, for any ranks and any alpha."""
from collections.abc import Sequence

from flora.adapter import stack
from flora.messages import Broadcast, Update
from flora.strategies.base import Strategy, begin_fresh, by_layer


def aggregate_flora(updates: Sequence[Update], weights: str = "examples", absent: str = "zero") -> Broadcast:
    """merge = Σ p_k ΔW_k as a stack of rank Σ r_k; clients start from fresh adapters. arXiv 2409.05976, section 3."""
    layers = by_layer(updates, weights, absent)
    return Broadcast(merge={name: stack([a * p for a, p in have]) for name, have in layers.items()})


FLORA = Strategy("flora", "stacks the adapters: exact for any mix of ranks", "FLoRA, arXiv 2409.05976", begin_fresh,
                 aggregate_flora)
