"""Updates with which a few clients would spoil a round: bounded, or left out, before a rule combines the rest.

Everything is judged by the change that a client makes to what the rule sums, and by inner products of changes alone. K clients give
a (K, K) Gram matrix, of which norms, distances and angles are read off. Rules that sum ΔW: ΔW_k less the start that was sent, by

    ⟨ΔW_k, ΔW_l⟩_F = Σ over layers of Σ ((B_k S_k)ᵀ (B_l S_l)) ⊙ (A_k A_lᵀ)

products of rank size, nothing dense; which factors wrote a ΔW does not matter. Rules that combine factors: how far A and B moved
from the start, at the start's scale; ranks that had no start count whole. Mixed ranks need no care in either.

None of these stops a client that stays within what honest ones send; with skewed data an honest client may look like a liar.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flora.adapter import Adapter, Adapters, all_layers, pad, stack, truncate
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.parallel import each
from flora.strategies.base import Strategy, one_of


@dataclass(frozen=True)
class Robust:
    """How a server guards a round.

    how: "clip" scales every change down to the bound; "krum" and "trim" do so too, and leave out f = ⌊share · K⌋ clients, those
    that Krum's rule finds farthest from their K - f - 2 nearest, or at most f, those that point against the direction of most.
    Both judge directions alone: with fresh starts of mixed ranks, lengths differ among honest clients, and distances say no more.
    share: of the clients that may lie, under a half; bound: of ‖change‖_F (None: the median of the round).
    """
    how: Literal["clip", "krum", "trim"]
    share: float = 0.2
    bound: float | None = None

    def __post_init__(self) -> None:
        one_of("robust", self.how, "clip", "krum", "trim")
        if not 0.0 < self.share < 0.5:
            raise StrategyError(f"expected a share of clients that may lie in (0, 0.5); got {self.share}")
        if self.bound is not None and not 0.0 < self.bound < math.inf:
            raise StrategyError(f"expected a positive, finite bound; got {self.bound}")

    def needs(self, count: int) -> int:
        """Updates that a round must have so that this can judge it, of as many as count."""
        return 2 * math.floor(self.share * count) + 3 if self.how == "krum" else 3

    def refuse(self, rule: Strategy, first: Broadcast) -> None:
        """Raises StrategyError for a rule whose updates do not say what a client changes. first: what a run begins with."""
        if rule.home or rule.pooled or rule.dense:
            raise StrategyError(f"robust {self.how}: expected a strategy whose clients send whole adapters; got {rule.name}. Leave "
                                "robust out, or take another strategy.")
        if rule.groups != "any" and first.start is None:
            raise StrategyError(f"robust {self.how}: expected a strategy that sums ΔW, or that sends the start from which factors "
                                f"move; got {rule.name}. Leave robust out, or take another strategy.")


@dataclass(frozen=True)
class Sifted:
    """updates: those that count, in order, bounded; left_out: reasons, by client; shortened: factors under 1, by client."""
    updates: list[Update]
    left_out: Mapping[str, str]
    shortened: Mapping[str, float]


def change(update: Update, sent: Adapters | None) -> dict[str, Adapter]:
    """ΔW_k less what it started from, by layer: the ranks of both, the start's with its scale negated."""
    held = sent or {}
    return {layer: stack([a, truncate(held[layer], a.rank) * -1.0]) if layer in held else a
            for layer, a in update.adapters.items()}


def moves(update: Update, sent: Adapters | None) -> dict[str, tuple[Tensor, Tensor, Adapter]]:
    """By layer how far A (r, in) and Bᵀ (r, out) moved, fp64, and what they moved from: the start cut to the client's rank, with
    zeros in the ranks that had none. A scale other than the start's is written into B first."""
    out = {}
    for layer, a in update.adapters.items():
        given = (sent or {}).get(layer)
        begun = pad(truncate(given, a.rank), a.rank) if given is not None else Adapter(
            torch.zeros_like(a.A), torch.zeros_like(a.B), a.scale)
        ratio = (a.scale.double() / begun.scale.double()).nan_to_num(0.0, 0.0, 0.0)
        out[layer] = (a.A.detach().double() - begun.A.detach().double(),
                      (a.B.detach().double() * ratio - begun.B.detach().double()).T, begun)
    return out


def gram(changes: Sequence[Adapters]) -> Tensor:
    """⟨ΔW_k, ΔW_l⟩_F over all layers, fp64 (K, K); a layer that one of them lacks is zero there."""
    def one(layer: str) -> Tensor:
        have = [(k, c[layer]) for k, c in enumerate(changes) if layer in c]
        A = torch.cat([a.A.detach().double() for _, a in have])
        B = torch.cat([a.B.detach().double() * a.scale.double() for _, a in have], 1)
        products = (B.T @ B).mul_(A @ A.T)
        owner = torch.tensor([k for k, a in have for _ in range(a.rank)], device=products.device)
        rows = products.new_zeros(len(changes), len(products)).index_add_(0, owner, products)
        return products.new_zeros(len(changes), len(changes)).index_add_(1, owner, rows).cpu()

    return sum(each(one, all_layers(changes)), torch.zeros(len(changes), len(changes), dtype=torch.float64))


def gram_of_moves(moved: Sequence[Mapping[str, tuple[Tensor, Tensor, Adapter]]]) -> Tensor:
    """⟨moves of k, moves of l⟩ over all layers and both factors, fp64 (K, K); ranks and layers that one of them lacks are zero."""
    total = torch.zeros(len(moved), len(moved), dtype=torch.float64)
    for layer in dict.fromkeys(name for one in moved for name in one):
        have = [(k, one[layer]) for k, one in enumerate(moved) if layer in one]
        rank = max(len(dA) for _, (dA, _, _) in have)
        rows = torch.stack([torch.cat([torch.nn.functional.pad(part, (0, 0, 0, rank - len(part))).flatten() for part in parts[:2]])
                            for _, parts in have]).cpu()
        whose = torch.tensor([k for k, _ in have])
        total[whose[:, None], whose] += rows @ rows.T
    return total


def sift(updates: Sequence[Update], robust: Robust, sent: Adapters | None = None, factors: bool = False) -> Sifted:
    """The updates of a round as a rule may combine them. sent: the start that they were trained from; factors: the rule combines
    factors, not ΔW.

    Raises StrategyError for fewer updates than can be judged (Robust.needs).
    Reference: norm bounding, arXiv 1911.07963; Krum, NeurIPS 2017 (arXiv 1703.02757); in rank space: ours.
    """
    least = robust.needs(len(updates))
    if len(updates) < least:
        raise StrategyError(f"robust {robust.how}: expected at least {least} updates to judge {len(updates)} by, with "
                            f"share={robust.share}; got {len(updates)}. Sample more clients, or lower share.")
    products = gram_of_moves([moves(u, sent) for u in updates]) if factors else gram([change(u, sent) for u in updates])
    norms = products.diagonal().clamp(min=0.0).sqrt()
    bound = robust.bound or float(norms.median())
    long = {k: bound / norm for k, norm in enumerate(norms.tolist()) if norm > bound * (1 + 1e-9)}
    back = moved_back if factors else shortened
    kept = [back(u, long.get(k, 1.0), sent) if k in long or (factors and _rescaled(u, sent)) else u for k, u in enumerate(updates)]
    cut = {updates[k].client: factor for k, factor in long.items()}
    if robust.how == "clip":
        return Sifted(kept, {}, cut)
    unit = norms.clamp(min=float(norms.max()) * 1e-12 or 1.0)
    cosines = products / unit[:, None] / unit
    out = (_krum if robust.how == "krum" else _trim)(cosines, math.floor(robust.share * len(updates)))
    left = {updates[k].client: why for k, why in out.items()}
    return Sifted([u for u in kept if u.client not in left], left, {c: f for c, f in cut.items() if c not in left})


def _krum(cosines: Tensor, spare: int) -> dict[int, str]:
    """Whom to leave out: the `spare` that are farthest from their K - f - 2 nearest, in squares of distances of directions."""
    count = len(cosines)
    apart = (2.0 - 2.0 * cosines).fill_diagonal_(0.0).sort(1).values[:, 1:count - spare - 1].sum(1)
    typical = float(apart.median()) or 1.0
    return {k: f"its change points apart from the others' (Krum's score is {float(apart[k]) / typical:.2f} times the median)"
            for k in apart.argsort(descending=True, stable=True)[:spare].tolist()}


def _trim(cosines: Tensor, spare: int) -> dict[int, str]:
    """Whom to leave out: who points against the direction of most, the leading eigenvector of the cosines; the worst first."""
    common = torch.linalg.eigh(cosines).eigenvectors[:, -1]
    agree = common / (float(common.median()) or 1.0)            # of either sign: most agree with themselves
    return {k: f"its change points against the others' ({float(agree[k]):.2f} times the median client's agreement with them)"
            for k in agree.argsort(stable=True)[:spare].tolist() if float(agree[k]) < 0}


def shortened(update: Update, t: float, sent: Adapters | None) -> Update:
    """t times its change of ΔW: t ΔW_k by the scale, and (1 - t) of the start beside it."""
    held = sent or {}
    return replace(update, adapters={
        layer: stack([a * t, truncate(held[layer], a.rank) * (1.0 - t)]) if layer in held else a * t
        for layer, a in update.adapters.items()})


def moved_back(update: Update, t: float, sent: Adapters | None) -> Update:
    """The start and t times the moves of its factors, at the start's scale. A factor that did not move keeps its bits."""
    out = {}
    for layer, (dA, dB, begun) in moves(update, sent).items():
        a = update.adapters[layer]
        out[layer] = Adapter((begun.A.double() + t * dA).to(a.A.dtype), (begun.B.double() + t * dB.T).to(a.B.dtype), begun.scale)
    return replace(update, adapters=out)


def _rescaled(update: Update, sent: Adapters | None) -> bool:
    """Whether it has another scale than its start, at which moves are judged."""
    return any(not torch.equal(a.scale.cpu(), truncate(sent[layer], a.rank).scale.cpu()) for layer, a in update.adapters.items()
               if sent and layer in sent)
