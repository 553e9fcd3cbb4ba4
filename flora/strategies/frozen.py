"""Rules under which one factor is the same for all clients, so that the average of the other is the average of ΔW.

    Σ p_k B_k diag(s) A = (Σ p_k B_k) diag(s) A

The shared factor is passed on to the bit, and checked to the bit: averaging adapters of different A would have cross terms.
"""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal

import torch

from flora.adapter import Adapter, Adapters, common_scale, fresh_adapters, pad
from flora.frames import frame
from flora.messages import Broadcast, Update
from flora.parallel import each
from flora.strategies.base import Strategy, Terms, begin_frozen_A, by_layer, needs_sent, one_factor, one_rank, one_scale


def _averaged(layer: str, terms: Terms, trained: Literal["A", "B"], mixed_alpha: str) -> Adapter:
    """The adapter whose ΔW is Σ p_k ΔW_k: the factor that trained is summed in fp32, scales that differ go into it alone."""
    one_scale(layer, terms, mixed_alpha)
    shared = one_factor(layer, terms, "A" if trained == "B" else "B")
    scale = common_scale([a for a, _ in terms], [p for _, p in terms])
    total = torch.zeros(())
    for a, p in terms:
        factor = getattr(a, trained)
        part = factor.to(torch.promote_types(factor.dtype, torch.float32)) * p
        if not torch.equal(a.scale, scale):
            ratio = a.scale / scale
            part = part * (ratio if trained == "B" else ratio[:, None])
        total = total + part
    total = total.to(reduce(torch.promote_types, (getattr(a, trained).dtype for a, _ in terms)))
    return Adapter(shared, total, scale) if trained == "B" else Adapter(total, shared, scale)


def aggregate_ffa(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                  mixed_alpha: str = "refuse", sent: Adapters | None = None) -> Broadcast:
    """start: the A that all share and B = Σ p_k B_k; only B trains, ever. FFA-LoRA, arXiv 2403.12313, section 4."""
    needs_sent(weights, server_lr, sent)
    layers = by_layer(updates, weights, absent, server_lr, sent)
    return Broadcast(start={name: _averaged(name, terms, "B", mixed_alpha) for name, terms in layers.items()}, train="B")


def trained_in(version: int) -> Literal["A", "B"]:
    """What RoLoRA trains on this version of the base: B first, since A has no gradient while B = 0."""
    return "A" if version % 2 else "B"


def aggregate_rolora(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                     mixed_alpha: str = "refuse", sent: Adapters | None = None) -> Broadcast:
    """start: the average of the factor that trained beside the other, which all share; next the other trains.

    B trains on even versions, A on odd ones. RoLoRA, arXiv 2502.01755, algorithm 1.
    """
    needs_sent(weights, server_lr, sent)
    version = updates[0].base_version
    layers = by_layer(updates, weights, absent, server_lr, sent)
    start = {name: _averaged(name, terms, trained_in(version), mixed_alpha) for name, terms in layers.items()}
    return Broadcast(start=start, train=trained_in(version + 1))


def refactored(a: Adapter) -> Adapter:
    """The same ΔW at the same rank with orthonormal rows in A: A = Vᵀ, B diag(s) = U Σ of the SVD of ΔW, taken in rank space.

    s is one number, the mean scale. Where in < r the ranks above are zeros.
    """
    common = float(a.scale.double().mean())
    Q_A, R_A = torch.linalg.qr(a.A.double().T)                  # A = R_Aᵀ Q_Aᵀ
    Q_B, R_B = torch.linalg.qr(a.B.double() * a.scale.double())
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)                # Vh square: orthonormal rows also where σ = 0
    count = len(sigma)
    A, B = Vh @ Q_A.T, a.B.new_zeros(a.shape[0], len(Vh), dtype=torch.float64)
    B[:, :count] = (Q_B @ U[:, :count]) * (sigma / common)
    return pad(Adapter(A.to(a.A.dtype), B.to(a.B.dtype), common), a.rank)


def begin_fedsvd(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """A shared A with orthonormal rows, and B = 0."""
    drawn = begin_frozen_A(shapes, ranks, seed, scale)
    return replace(drawn, start={name: refactored(a) for name, a in (drawn.start or {}).items()})


def aggregate_fedsvd(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                     mixed_alpha: str = "refuse", sent: Adapters | None = None) -> Broadcast:
    """start: A = Vᵀ and B = U Σ of the SVD of (Σ p_k B_k) A, so that A is orthonormal and follows what was learnt; B trains.

    FedSVD, arXiv 2505.12805, section 3.
    """
    averaged = aggregate_ffa(updates, weights, absent, server_lr, mixed_alpha, sent)
    start = averaged.start or {}
    return replace(averaged, start=dict(zip(start, each(lambda name: refactored(start[name]), start), strict=True)))


def begin_fedsb(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], seed: int, scale: float = 2.0) -> Broadcast:
    """The fixed B, and A = core · frame with a core of zeros; the core trains."""
    rank = one_rank(ranks)
    drawn = fresh_adapters(shapes, rank, scale * rank, seed)
    start = {name: Adapter(torch.zeros_like(a.A), frame(a.shape, rank, seed, name)[1], a.scale) for name, a in drawn.items()}
    return Broadcast(start=start, train="core", frame=seed)


def aggregate_fedsb(updates: Sequence[Update], weights: str | float = "examples", absent: str = "zero", server_lr: float = 1.0,
                    mixed_alpha: str = "refuse", seed: int = 0, sent: Adapters | None = None) -> Broadcast:
    """start: B as it is and A = Σ p_k core_k · frame, which is the mean of the A's that clients send: core_k multiplies A outside.

    So ΔW = B diag(s) (core · A), both factors fixed for the run (frames.frame, by seed); the average of cores is exact. The
    paper takes the frame from the first gradient; here it is drawn from the seed. Fed-SB, arXiv 2502.15436, section 3.
    """
    needs_sent(weights, server_lr, sent)
    layers = by_layer(updates, weights, absent, server_lr, sent)
    start = {name: _averaged(name, terms, "A", mixed_alpha) for name, terms in layers.items()}
    return Broadcast(start=start, train="core", frame=seed)


FFA = Strategy("ffa", "one A for all, frozen; averages B: exact", "FFA-LoRA, arXiv 2403.12313", begin_frozen_A, aggregate_ffa)
ROLORA = Strategy("rolora", "trains and averages B and A in turn: exact", "RoLoRA, arXiv 2502.01755", begin_frozen_A,
                  aggregate_rolora)
FEDSVD = Strategy("fedsvd", "averages B; an SVD gives the next A, orthonormal: exact", "FedSVD, arXiv 2505.12805", begin_fedsvd,
                  aggregate_fedsvd)
FEDSB = Strategy("fedsb", "A and B fixed; averages the r x r core between them: exact", "Fed-SB, arXiv 2502.15436", begin_fedsb,
                 aggregate_fedsb)
