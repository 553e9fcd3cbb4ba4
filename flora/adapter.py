"""The law: an adapter is ΔW = B · diag(scale) · A. Stacking adapters is concatenating ranks; weighting one multiplies `scale`.

So a weighted sum of adapters of any ranks and any alpha is exact and costs no arithmetic:

    Σ p_k B_k diag(s_k) A_k = [B_1 B_2 ...] · diag(p_1 s_1, p_2 s_2, ...) · [A_1; A_2; ...]

Weighting touches neither A nor B, so nothing that is held in bf16 is rounded again. Stacking is associative: a tree of
servers gives the flat answer. Every other aggregation rule is a compression of the stack (`compress`, by QR of the factors
and an SVD of a small core, never of the dense matrix) or an average of factors (`mean`, which is not the average of ΔW).

Reference: FLoRA, arXiv 2409.05976, section 3.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from flora.errors import AdapterError
from flora.seeds import derive


@dataclass(frozen=True, eq=False)
class Adapter:
    """ΔW = B diag(scale) A of one layer.

    A (rank, in), B (out, rank), any float dtype; scale fp32 (rank,), or a number for all ranks (alpha / rank). `adapter * p`
    weights it. Raises AdapterError for shapes that do not fit, a rank of 0, or tensors on different devices.
    """
    A: Tensor
    B: Tensor
    scale: Tensor
    if TYPE_CHECKING:                                        # a number stands for a vector of it
        def __init__(self, A: Tensor, B: Tensor, scale: Tensor | float) -> None: ...

    def __post_init__(self) -> None:
        A, B = self.A, self.B
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
            raise AdapterError(f"expected A (rank, in) and B (out, rank) of one rank >= 1; got A {tuple(A.shape)}, "
                               f"B {tuple(B.shape)}")
        if not (A.is_floating_point() and B.is_floating_point()):
            raise AdapterError(f"expected A and B of a floating-point dtype; got {A.dtype} and {B.dtype}")
        scale = self.scale
        if not isinstance(scale, Tensor) or scale.dim() == 0:
            scale = torch.full((A.shape[0],), float(scale), device=A.device)
        if tuple(scale.shape) != (A.shape[0],):
            raise AdapterError(f"expected a scale of ({A.shape[0]},), one number a rank; got {tuple(scale.shape)}")
        if not A.device == B.device == scale.device:
            raise AdapterError(f"expected A, B and scale on one device; got {A.device}, {B.device}, {scale.device}")
        object.__setattr__(self, "scale", scale.to(torch.float32))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it belongs to."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of A, B and scale."""
        return sum(t.numel() * t.element_size() for t in (self.A, self.B, self.scale))

    def delta(self) -> Tensor:
        """Dense ΔW (out, in) in fp64. For tests and oracles: library code never forms it."""
        return (self.B.detach().double() * self.scale.double()) @ self.A.detach().double()

    def __mul__(self, weight: float) -> "Adapter":
        return replace(self, scale=self.scale * float(weight))

    __rmul__ = __mul__

    def to(self, *args: Any, **kwargs: Any) -> "Adapter":
        """A and B moved or cast as Tensor.to does; scale moves and stays fp32. Itself, where nothing changes."""
        A, B = self.A.to(*args, **kwargs), self.B.to(*args, **kwargs)
        if A is self.A and B is self.B:
            return self
        return Adapter(A, B, self.scale.to(A.device))


Adapters: TypeAlias = Mapping[str, Adapter]


def _of_one_layer(adapters: Sequence[Adapter]) -> tuple[int, int]:
    """The (out, in) that all share. Factors are told apart by their place, never by shape: a rank may equal a feature size."""
    shapes = {adapter.shape for adapter in adapters}
    if len(shapes) != 1:
        raise AdapterError(f"expected at least one adapter, all of one layer; got (out, in) of {sorted(shapes)}")
    return shapes.pop()


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """Σ ΔW_k, exactly, as one adapter: ranks concatenated in the order given. Weight the terms with `adapter * p_k`.

    Dtypes promote (fp32 with bf16 gives fp32). Raises AdapterError where shapes differ or the list is empty.
    """
    _of_one_layer(adapters)
    return Adapter(torch.cat([a.A for a in adapters]), torch.cat([a.B for a in adapters], dim=1),
                   torch.cat([a.scale for a in adapters]))


def normalised(weights: Sequence[float]) -> list[float]:
    """w_k / Σ w, for weights that are finite, not negative and not all zero. Raises AdapterError otherwise."""
    values = [float(w) for w in weights]
    total = sum(values)
    if not values or any(not 0.0 <= w < float("inf") for w in values) or not 0.0 < total < float("inf"):
        raise AdapterError(f"expected finite weights >= 0 with a positive sum; got {values}")
    return [w / total for w in values]


def _at_scale(a: Adapter, scale: Tensor) -> Adapter:
    """The same ΔW with another scale: the change is split evenly between A and B. Ranks whose scale agrees keep their bits."""
    ratio = (a.scale.double() / scale.double()).nan_to_num(0.0, 0.0, 0.0)
    root = ratio.abs().sqrt()
    A = torch.where((ratio == 1)[:, None], a.A, (a.A.double() * root[:, None]).to(a.A.dtype))
    B = torch.where(ratio == 1, a.B, (a.B.double() * (root * ratio.sign())).to(a.B.dtype))
    return Adapter(A, B, scale)


def mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """A = Σ p_k A_k, B = Σ p_k B_k with p_k = w_k / Σ w: FedAvg of the factors, which is not the average of ΔW.

    As combine does it, for weights >= 0 that need not sum to 1. Raises AdapterError. Reference: FedIT, arXiv 2305.05644.
    """
    return combine(adapters, normalised(weights))


def combine(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> Adapter:
    """A = Σ c_k A_k, B = Σ c_k B_k with coefficients c of any sign: a linear step on the factors.

    Adapters of different scale are first written at one common scale (their |c|-weighted mean, same ΔW_k), since factors
    trained under different alpha / r do not average. Sums run in fp32; dtypes promote, as in stack. Raises AdapterError for
    ranks that differ (pad first).
    """
    _of_one_layer(adapters)
    if len({a.rank for a in adapters}) != 1:
        raise AdapterError(f"expected adapters of one rank; got {[a.rank for a in adapters]}. Pad them to one rank, or stack.")
    if len(coefficients) != len(adapters):
        raise AdapterError(f"expected one weight an adapter; got {len(coefficients)} for {len(adapters)} adapters")
    scale = common_scale(adapters, coefficients)
    adapters = [_at_scale(a, scale) if not torch.equal(a.scale, scale) else a for a in adapters]
    A = reduce(torch.add, [c * a.A.to(_sum_dtype(a.A)) for c, a in zip(coefficients, adapters, strict=True)])
    B = reduce(torch.add, [c * a.B.to(_sum_dtype(a.B)) for c, a in zip(coefficients, adapters, strict=True)])
    return Adapter(A.to(_common_dtype([a.A for a in adapters])), B.to(_common_dtype([a.B for a in adapters])), scale)


def common_scale(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> Tensor:
    """The scale (r,) that all share, to the bit, or else the mean of their |scale|, weighted by |coefficients|."""
    scale = adapters[0].scale
    if all(torch.equal(a.scale, scale) for a in adapters):
        return scale
    total = sum(abs(c) for c in coefficients)
    return reduce(torch.add, [abs(c) / total * a.scale.abs() for c, a in zip(coefficients, adapters, strict=True)])


def _common_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (factor.dtype for factor in factors))


def _sum_dtype(factor: Tensor) -> torch.dtype:
    return torch.promote_types(factor.dtype, torch.float32)


def pad(a: Adapter, rank: int) -> Adapter:
    """The same ΔW with ranks of zeros added up to `rank`; they carry the mean scale. Raises AdapterError for a smaller rank."""
    more = rank - a.rank
    if more < 0:
        raise AdapterError(f"expected a rank of at least {a.rank} to pad to; got {rank}. Use truncate or compress.")
    if more == 0:
        return a
    return Adapter(torch.cat([a.A, a.A.new_zeros(more, a.A.shape[1])]), torch.cat([a.B, a.B.new_zeros(a.B.shape[0], more)], 1),
                   torch.cat([a.scale, a.scale.mean().expand(more)]))


def truncate(a: Adapter, rank: int) -> Adapter:
    """The first `rank` ranks (all, where there are no more), scale as it is. The best ones come first after `compress`."""
    if rank < 1:
        raise AdapterError(f"expected a rank of at least 1; got {rank}")
    return Adapter(a.A[:rank], a.B[:, :rank], a.scale[:rank])


def _check_bounds(rank: int | None, tol: float | None) -> None:
    if rank is not None and rank < 1:
        raise AdapterError(f"expected a rank of at least 1; got {rank}")
    if tol is not None and not 0.0 <= tol < 1.0:
        raise AdapterError(f"expected a tolerance in [0, 1); got {tol}")


def _kept(sigma: Tensor, rank: int | None, tol: float | None) -> int:
    """How many of these falling singular values are kept."""
    keep = len(sigma) if rank is None else min(rank, len(sigma))
    if tol is not None:
        tail = sigma.square().flip(0).cumsum(0).flip(0)         # tail[r]: what is lost when r ranks are kept
        keep = min(keep, max(1, int((tail > tol * tol * tail[0]).sum())))
    return keep


def compress(a: Adapter, rank: int | None = None, tol: float | None = None) -> Adapter:
    """The best approximation of ΔW at a smaller rank: QR of the factors, SVD of the (R, R) core, never anything dense.

    rank: at most this many ranks; tol: as few as keep ‖ΔW - ΔW_r‖_F <= tol ‖ΔW‖_F; neither: min(R, in, out), which is exact.
    Returns balanced factors (‖A_i‖ = ‖B_i‖ = √σ_i, σ falling), scale ones, in a's dtypes. Computed in fp64.
    Raises AdapterError for a rank under 1 or a tol outside [0, 1). Reference: Eckart-Young; FLoRIST, arXiv 2506.09199.
    """
    _check_bounds(rank, tol)
    QR_B, QR_A = (torch.geqrf(side) for side in (a.B.detach().double() * a.scale.double(), a.A.detach().double().T))
    U, sigma, Vh = torch.linalg.svd(_triangle(QR_B) @ _triangle(QR_A).T, full_matrices=False)
    keep = _kept(sigma, rank, tol)
    root = sigma[:keep].sqrt()
    A = _times_Q(QR_A, Vh[:keep].T * root).T.to(a.A.dtype)
    B = _times_Q(QR_B, U[:, :keep] * root).to(a.B.dtype)
    return Adapter(A.contiguous(), B.contiguous(), a.scale.new_ones(keep))


def _triangle(QR: tuple[Tensor, Tensor]) -> Tensor:
    """R of a QR as reflectors."""
    return QR[0][:len(QR[1])].triu()


def _times_Q(QR: tuple[Tensor, Tensor], right: Tensor) -> Tensor:
    """Q · right without forming Q, of which only as many columns are needed as ranks are kept."""
    reflectors, tau = QR
    return torch.ormqr(reflectors, tau, torch.nn.functional.pad(right, (0, 0, 0, len(reflectors) - len(right))))


def of_dense(delta: Tensor, rank: int | None = None, tol: float | None = None) -> tuple[Adapter, float]:
    """The best adapter of a dense delta (out, in), such as a streaming server's sum, at this rank or relative error, as compress
    gives it, and its relative error in the Frobenius norm. With a rank alone by a seeded randomised SVD. In fp32, or fp64 of an
    fp64 sum. Raises AdapterError as compress does."""
    _check_bounds(rank, tol)
    full, delta = min(delta.shape), delta.to(_sum_dtype(delta))
    if rank is not None and tol is None and rank + 8 < full // 2:
        devices = [delta.device] if delta.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            U, sigma, V = torch.svd_lowrank(delta, rank + 8, niter=4)
        Vh = V.T
    else:
        U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
    keep = _kept(sigma.double(), rank, tol)
    root = sigma[:keep].sqrt()
    adapter = Adapter(root[:, None] * Vh[:keep], U[:, :keep] * root, 1.0)
    size, lost = float(delta.norm()), float(torch.addmm(delta, adapter.B, adapter.A, alpha=-1).norm())
    return adapter, lost / size if size else 0.0


def norm(a: Adapter) -> float:
    """‖ΔW‖_F in fp64, from the R factors of B · scale and Aᵀ."""
    R_B = torch.linalg.qr(a.B.detach().double() * a.scale.double(), mode="r").R
    R_A = torch.linalg.qr(a.A.detach().double().T, mode="r").R
    return float((R_B @ R_A.T).norm())


def rescale(a: Adapter, scale: float) -> Adapter:
    """The same ΔW with this constant scale and factors of equal norm rank by rank: what a start is sent with.

    A rank that is zero on one side keeps its other side as it is. Raises AdapterError for a scale that is not positive.
    """
    if not 0.0 < scale < float("inf"):
        raise AdapterError(f"expected a positive, finite scale; got {scale}")
    A, B, ratio = a.A.detach().double(), a.B.detach().double(), a.scale.double() / scale
    norm_A, norm_B = A.norm(dim=1), B.norm(dim=0) * ratio.abs()
    dead = (norm_A == 0) | (norm_B == 0)
    one = torch.ones_like(ratio)
    grow = torch.where(dead, one, (norm_B / norm_A).sqrt())
    grow_B = torch.where(norm_A == 0, one, ratio / grow)
    return Adapter((A * grow[:, None]).to(a.A.dtype), (B * grow_B).to(a.B.dtype), torch.full_like(a.scale, scale))


def fold(a: Adapter) -> Adapter:
    """The same ΔW with scale moved into B and scale ones: what formats without a scale vector hold. B is rounded again."""
    return Adapter(a.A, (a.B * a.scale).to(a.B.dtype), torch.ones_like(a.scale))


def fresh(shape: tuple[int, int], rank: int, alpha: float, seed: int) -> Adapter:
    """An untrained adapter for a weight of shape (out, in): A uniform in ±1/√in, B zero (so ΔW = 0), scale alpha / rank, fp32 on
    the CPU.

    The numbers depend on seed alone. Raises AdapterError for a rank under 1. Reference: LoRA, arXiv 2106.09685, section 4.1.
    """
    if rank < 1:
        raise AdapterError(f"expected a rank of at least 1; got {rank}")
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)             # on the CPU and in fp32, whatever default a context has set
    A = (torch.rand(rank, in_features, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) / in_features**0.5
    return Adapter(A, torch.zeros(out_features, rank, dtype=torch.float32, device="cpu"), alpha / rank)


def fresh_adapters(shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float, *seed: int | str) -> dict[str, Adapter]:
    """A fresh adapter for every layer of shapes; each layer's numbers depend on the seed and on its name, not on the others."""
    return {name: fresh(shape, rank, alpha, derive(*seed, name)) for name, shape in shapes.items()}


def all_layers(adapters: Sequence[Mapping[str, object]]) -> list[str]:
    """Every layer that any of them has, in order of first appearance."""
    return list(dict.fromkeys(name for each in adapters for name in each))
