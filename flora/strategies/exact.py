"""What equals Σ p_k s_k B_k A_k: the stack, and a stack that leaves part of itself to training as a start.

An update holds a client's whole adapters, relative to the base without the start. So base + Σ p_k ΔW_k is the true new model, and
whatever start is sent, merging the rest, Σ p_k ΔW_k - start, keeps it so in every round: the rest is a stack too, with the
start's scale negated.
"""
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flora.adapter import Adapter, Adapters, compress, rescale, stack
from flora.messages import Broadcast, Update
from flora.parallel import each
from flora.strategies.average import averages
from flora.strategies.base import (
    Strategy,
    Terms,
    begin_fresh,
    begin_one_rank,
    by_layer,
    needs_sent,
    one_of,
    shared_start,
    start_scale,
)

NOTHING = 1e-12                                                 # relative size of singular values that are fp64 rounding


def stacked(layers: Mapping[str, Terms]) -> dict[str, Adapter]:
    """Σ p_k ΔW_k of every layer."""
    return {name: stack([a * p for a, p in terms]) for name, terms in layers.items()}


def best_parts(totals: Adapters, rank: int | None, scales: Mapping[str, float], tol: float = NOTHING) -> dict[str, Adapter]:
    """The best approximation of every layer at this rank, at the scale that a start is sent with; a layer of zeros is left out.

    A rank of zeros has no gradient on either side, so none is kept: clients draw fresh ones in their place.
    """
    def part(name: str) -> Adapter | None:
        best = compress(totals[name], rank, tol)
        return rescale(best, scales[name]) if bool(best.A.any()) else None

    parts = each(part, totals)
    return {name: a for name, a in zip(totals, parts, strict=True) if a is not None}


def without(total: Adapters, start: Adapters) -> dict[str, Adapter]:
    """total - start, of which nothing is formed: their ranks side by side."""
    return {name: stack([a, start[name] * -1.0]) if name in start else a for name, a in total.items()}


def begin_flora(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0,
                start: str = "fresh") -> Broadcast:
    """Nothing to start from, or (start="shared") one A for all."""
    one_of("start", start, "fresh", "warm", "shared")
    return shared_start(shapes, max(ranks), seed, scale) if start == "shared" else begin_fresh(shapes, ranks, seed, scale)


def aggregate_flora(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                    start: str = "fresh", ranks: Sequence[int] | None = None, scale: float | None = None, seed: int = 0,
                    sent: Adapters | None = None) -> Broadcast:
    """merge + start = Σ p_k ΔW_k, whatever is sent as start. arXiv 2409.05976, section 3.

    start: "fresh", none: clients draw their own, and merge is the stack of rank Σ r_k; "warm", the best part of the sum at the
    smallest rank, so that every client holds all of it, fresh ranks above; "shared", one A drawn from seed and the version, B = 0.
    ranks: of all clients of the RUN, sampled or not (None: of these updates); scale: what the start is sent with (None: the
    clients' mean); sent: the start of this round, which counts where server_lr, factors or missing layers leave Σ p short of 1.
    """
    one_of("start", start, "fresh", "warm", "shared")
    layers = by_layer(updates, weights, absent, server_lr, sent)
    total = stacked(layers)
    if start == "fresh":
        return Broadcast(merge=total)
    ranks = ranks or [a.rank for u in updates for a in u.adapters.values()]
    if start == "warm":
        begun = best_parts(total, min(ranks), {name: start_scale(terms, scale) for name, terms in layers.items()})
        return Broadcast(merge=without(total, begun), start=begun or None)
    common = start_scale([term for terms in layers.values() for term in terms], scale)
    drawn = shared_start({name: a.shape for name, a in total.items()}, max(ranks), seed, common, updates[0].base_version + 1)
    return replace(drawn, merge=total)


def aggregate_fedex(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                    mixed_alpha: str = "refuse", sent: Adapters | None = None) -> Broadcast:
    """start: A = Σ p_k A_k, B = Σ p_k B_k; merge = Σ p_k ΔW_k - B diag(s) A, a stack of rank Σ r_k + r.

    absent is about ΔW; the averages are of those who have the layer. The residual is taken from the start as it is sent, rounded.
    FedEx-LoRA, arXiv 2410.09432, section 4.
    """
    needs_sent(weights, server_lr, sent)
    layers = by_layer(updates, weights, absent, server_lr, sent)
    plain = weights if isinstance(weights, str) else "uniform"
    begun = averages(by_layer(updates, plain, "renormalise", sent=sent), mixed_alpha)
    return Broadcast(merge=without(stacked(layers), begun), start=begun)


FLORA = Strategy("flora", "stacks the adapters: exact for any mix of ranks", "FLoRA, arXiv 2409.05976", begin_flora,
                 aggregate_flora, mixed_ranks=True, groups="any")
FEDEX = Strategy("fedex", "averages A and B, and merges what that leaves out: exact and warm", "FedEx-LoRA, arXiv 2410.09432",
                 begin_one_rank, aggregate_fedex, splits=True)
