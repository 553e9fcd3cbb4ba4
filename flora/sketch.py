"""ΔW of low rank from linear sketches of it: what of mixed-rank adapters can be added up without anybody's being seen.

Factors do not add; these products do. With Ω and Ψ drawn from a public seed, for M = ΔW (or ΔWᵀ, whichever stands upright, m >= n),

    Y = M Ω  (m, w)        Z = Ψᵀ M  (v, n)        T = Θᵀ M  (t, n), held out

Each client forms them from its factors; the sums over clients are the sketches of Σ p_k ΔW_k. If that sum has rank R <= w, then
range(Y) = range(M), and with Y = Q (..) by QR, M = Q (ΨᵀQ)⁺ Z exactly. Rounding by ε a number costs about ε √n ‖(ΨᵀQ)⁺‖_F, where
κ(ΨᵀQ) ≈ (√v + √w) / (√v - √w) depends on v and w alone, not on M: small singular values of M are not amplified, as R itself is
never inverted. w is R and 8 more, so that ΩᵀV (V spans M's rows) is well conditioned too, and v is w and an eighth more.
Too small a w gives a good low-rank approximation instead, and T tells: ‖T - Θᵀ M̂‖ / ‖T‖ estimates the relative error without
bias, as M̂ never saw Θ. Where the sketches would hold more numbers than M, M itself is sent, and all is exact.

The entries of Ω and Ψ are uniform in ±√3 (variance 1), exact multiples of Philox's words: the same on every machine.
Reference: Tropp, Yurtsever, Udell, Cevher 2017, "Practical sketching algorithms for low-rank matrix approximation", arXiv
1609.00048, algorithm 4 and theorem 4.3.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.errors import AdapterError
from flora.seeds import derive

SPARE = 8                                                       # columns of Y above the rank
TESTS = 8                                                       # rows that are held out
NOTHING = 1e-12                                                 # relative size of singular values that are fp64 rounding


@dataclass(frozen=True)
class Plan:
    """What is sent of one layer: M is (tall, short) = (m, n); Y has w columns, Z has v rows. w = 0: M itself is sent."""
    shape: tuple[int, int]
    w: int
    v: int
    seed: int

    @property
    def tall(self) -> int:
        return max(self.shape)

    @property
    def short(self) -> int:
        return min(self.shape)

    @property
    def size(self) -> int:
        """Numbers that a client sends of this layer."""
        return self.tall * self.w + (self.v + TESTS) * self.short if self.w else self.tall * self.short


@dataclass(frozen=True)
class Quality:
    """How good a recovery is. error: ‖M̂ - M‖_F / ‖M‖_F as the held-out rows estimate it (where M itself was sent, as far as it is
    known); rounding: about how much of that fixed point accounts for; condition: κ(ΨᵀQ), 1 where M itself was sent; rank: of M̂."""
    error: float
    rounding: float
    condition: float
    rank: int


def plan(shape: tuple[int, int], width: int, *seed: int | str) -> Plan:
    """The plan for sums of rank `width` and less; seed: public, of this run, round and layer. Raises AdapterError for width < 1."""
    if type(width) is not int or width < 1:
        raise AdapterError(f"expected a width of at least 1, the rank of the sum; got {width!r}")
    w = width + SPARE
    sketched = Plan(tuple(shape), w, w + max(16, w // 8), derive(*seed))
    return sketched if sketched.size < sketched.tall * sketched.short else Plan(tuple(shape), 0, 0, derive(*seed))


def _drawn(seed: int, side: str, rows: int, columns: int) -> Tensor:
    """fp64 (rows, columns), independent, uniform in ±√3."""
    raw = np.random.Philox(key=derive(seed, side)).random_raw(rows * columns) >> np.uint64(11)
    return torch.from_numpy(raw.astype(np.float64)).mul_(2.0**-52 * math.sqrt(3)).sub_(math.sqrt(3)).view(rows, columns)


def sketch(a: Adapter, plan: Plan) -> Tensor:
    """Y, Z and T of ΔW in one line, fp64 (plan.size,), on the CPU. Raises AdapterError for another shape, NaN or infinity."""
    if a.shape != plan.shape:
        raise AdapterError(f"expected an adapter for a weight {plan.shape} (out, in); got one for {a.shape}")
    left, right = a.B.detach().cpu().double(), a.scale.detach().cpu().double()[:, None] * a.A.detach().cpu().double()
    if not (bool(left.isfinite().all()) and bool(right.isfinite().all())):
        raise AdapterError("expected finite factors; got NaN or infinity. The client's training went wrong: leave it out.")
    if plan.shape[0] < plan.shape[1]:
        left, right = right.T, left.T
    if not plan.w:
        return (left @ right).flatten()
    Y = left @ (right @ _drawn(plan.seed, "right", plan.short, plan.w))
    Z = (_drawn(plan.seed, "left", plan.v + TESTS, plan.tall) @ left) @ right
    return torch.cat([Y.flatten(), Z.flatten()])


def recover(total: Tensor, plan: Plan, noise: float = 0.0) -> tuple[Adapter, Quality]:
    """The adapter whose sketches these are, fp32, balanced factors, scale ones, ranks by falling σ; and how good it is.

    total: fp64 (plan.size,); noise: standard deviation of the rounding of its numbers; ranks that it could have made are left out
    (one of zeros remains of a sum that is zero). Raises AdapterError for another size.
    """
    if tuple(total.shape) != (plan.size,):
        raise AdapterError(f"expected {plan.size} numbers, the sketches of a layer {plan.shape}; got {tuple(total.shape)}")
    if not plan.w:
        M = total.view(plan.tall, plan.short)
        U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
        keep = _kept(sigma, noise * (math.sqrt(plan.tall) + math.sqrt(plan.short)))
        tall, short = _factors(U[:, :keep], sigma[:keep], Vh[:keep])
        lost, rounding = torch.addmm(M, tall.double(), short.double(), alpha=-1).norm(), noise * math.sqrt(M.numel())
        error, rounding = (_share(part, sigma.norm()) for part in (math.hypot(lost, rounding), rounding))
        return _adapter(tall, short, plan), Quality(error, rounding, 1.0, keep)
    Y, rest = total[:plan.tall * plan.w].view(plan.tall, plan.w), total[plan.tall * plan.w:].view(-1, plan.short)
    left = _drawn(plan.seed, "left", plan.v + TESTS, plan.tall)
    Q = torch.linalg.qr(Y).Q
    U_P, sigma_P, Vh_P = torch.linalg.svd(left[:plan.v] @ Q, full_matrices=False)
    U, sigma, Vh = torch.linalg.svd(Vh_P.T @ ((U_P.T @ rest[:plan.v]) / sigma_P[:, None]), full_matrices=False)
    keep = _kept(sigma, noise * (math.sqrt(plan.short) + math.sqrt(plan.w)) / float(sigma_P[-1]))
    tall, short = _factors(Q @ U[:, :keep], sigma[:keep], Vh[:keep])
    lost, inverse = (rest[plan.v:] - (left[plan.v:] @ tall.double()) @ short.double()).norm(), float((1 / sigma_P).norm())
    of_Y = math.sqrt(plan.tall * keep / max(1, plan.w - keep - 1)) * math.hypot(inverse, 1.0)
    rounding = noise * math.hypot(of_Y, math.sqrt(plan.short) * inverse)
    return _adapter(tall, short, plan), Quality(_share(lost, rest[plan.v:].norm()), _share(rounding, sigma.norm()),
                                                float(sigma_P[0] / sigma_P[-1]), keep)


def _kept(sigma: Tensor, floor: float) -> int:
    """How many of these falling singular values are more than rounding; at least one."""
    return max(1, int((sigma > max(floor, NOTHING * float(sigma[0]))).sum()))


def _share(part: float | Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) else 0.0


def _factors(U: Tensor, sigma: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """M = U diag(σ) Vh as two balanced factors (m, r) and (r, n), fp32."""
    root = sigma.sqrt()
    return (U * root).float(), (root[:, None] * Vh).float()


def _adapter(tall: Tensor, short: Tensor, plan: Plan) -> Adapter:
    """The adapter of the layer with M = tall · short."""
    A, B = (short, tall) if plan.shape[0] >= plan.shape[1] else (tall.T, short.T)
    return Adapter(A.contiguous(), B.contiguous(), torch.ones(len(A)))
