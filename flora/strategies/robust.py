"""Updates with which a few clients would spoil a round: bounded, or left out, before a rule combines the rest.

Everything is judged by the change that a client makes, ΔW_k less the start that it was sent, and by inner products alone:

    ⟨ΔW_k, ΔW_l⟩_F = Σ over layers of Σ ((B_k S_k)ᵀ (B_l S_l)) ⊙ (A_k A_lᵀ)

so K clients give a (K, K) Gram matrix out of products of rank size, nothing dense is formed, and norms, distances and angles are
read off it. Mixed ranks need no care. An inner product ignores which factors wrote it: a client cannot hide by rotating them.

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
from flora.messages import Update
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

    def refuse(self, rule: Strategy) -> None:
        """Raises StrategyError for a rule whose updates do not say what a client changes."""
        if rule.home or rule.pooled or rule.dense:
            raise StrategyError(f"robust {self.how}: expected a strategy whose clients send whole adapters; got {rule.name}. Leave "
                                "robust out, or take another strategy.")


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


def sift(updates: Sequence[Update], robust: Robust, sent: Adapters | None = None) -> Sifted:
    """The updates of a round as a rule may combine them. sent: the start that they were trained from.

    Raises StrategyError for fewer updates than can be judged (Robust.needs).
    Reference: norm bounding, arXiv 1911.07963; Krum, NeurIPS 2017 (arXiv 1703.02757); in rank space: ours.
    """
    least = robust.needs(len(updates))
    if len(updates) < least:
        raise StrategyError(f"robust {robust.how}: expected at least {least} updates to judge {len(updates)} by, with "
                            f"share={robust.share}; got {len(updates)}. Sample more clients, or lower share.")
    products = gram([change(update, sent) for update in updates])
    norms = products.diagonal().clamp(min=0.0).sqrt()
    kept, factors = _clip(updates, norms, robust.bound or float(norms.median()), sent)
    if robust.how == "clip":
        return Sifted(kept, {}, factors)
    unit = norms.clamp(min=float(norms.max()) * 1e-12 or 1.0)
    cosines = products / unit[:, None] / unit
    out = (_krum if robust.how == "krum" else _trim)(cosines, math.floor(robust.share * len(updates)))
    left = {updates[k].client: why for k, why in out.items()}
    return Sifted([u for u in kept if u.client not in left], left, {c: f for c, f in factors.items() if c not in left})


def _clip(updates: Sequence[Update], norms: Tensor, bound: float, sent: Adapters | None) -> tuple[list[Update], dict[str, float]]:
    """The updates with every change at most so long, and the factors of those that were longer."""
    factors = {k: bound / norm for k, norm in enumerate(norms.tolist()) if norm > bound * (1 + 1e-9)}
    kept = [shortened(u, bound, float(norms[k]), sent) if k in factors else u for k, u in enumerate(updates)]
    return kept, {updates[k].client: factor for k, factor in factors.items()}


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
    common = common * (1.0 if float(common.sum()) >= 0 else -1.0)
    agree = common / (float(common.median()) or 1.0)
    return {k: f"its change points against the others' ({float(agree[k]):.2f} times the median client's agreement with them)"
            for k in agree.argsort(stable=True)[:spare].tolist() if float(agree[k]) < 0}


def shortened(update: Update, bound: float, norm: float, sent: Adapters | None) -> Update:
    """The update with ‖change‖_F = bound: by its scale where it started from nothing, else back towards its start along the
    straight line of the factors. norm: of its change."""
    held = sent or {}
    if not any(layer in held for layer in update.adapters):
        return replace(update, adapters={layer: a * (bound / norm) for layer, a in update.adapters.items()})
    starts = {layer: _start(a, held.get(layer)) for layer, a in update.adapters.items()}
    steps = {layer: (a.A.double() - starts[layer].A.double(), a.B.double() - starts[layer].B.double())
             for layer, a in update.adapters.items()}
    linear = {layer: stack([Adapter(dA, starts[layer].B.double(), a.scale), Adapter(starts[layer].A.double(), dB, a.scale)])
              for (layer, a), (dA, dB) in zip(update.adapters.items(), steps.values(), strict=True)}
    square = {layer: Adapter(dA, dB, update.adapters[layer].scale) for layer, (dA, dB) in steps.items()}
    t = _reach(gram([linear, square]), bound)
    back = {layer: (starts[layer].A.double() + t * dA, starts[layer].B.double() + t * dB) for layer, (dA, dB) in steps.items()}
    return replace(update, adapters={layer: Adapter(back[layer][0].to(a.A.dtype), back[layer][1].to(a.B.dtype), a.scale)
                                     for layer, a in update.adapters.items()})


def _start(a: Adapter, sent: Adapter | None) -> Adapter:
    """What a client's factors started from: the start cut to its rank; ranks above it with its own A, and B = 0."""
    if sent is None:
        return Adapter(a.A, torch.zeros_like(a.B), a.scale)
    cut = truncate(sent, a.rank)
    more = pad(cut, a.rank)
    return Adapter(torch.cat([cut.A, a.A[cut.rank:].to(cut.A.dtype)]), more.B, a.scale)


def _reach(products: Tensor, bound: float) -> float:
    """t in [0, 1] with ‖t L + t² Q‖_F = bound, by bisection. products: the Gram matrix of L and Q."""
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        at = t * t * (products[0, 0] + 2 * t * products[0, 1] + t * t * products[1, 1])
        low, high = (t, high) if float(at) <= bound * bound else (low, t)
    return low
