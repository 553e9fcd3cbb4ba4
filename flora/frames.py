"""Fed-SB's fixed factors: what a core that trains is put between. Drawn from a seed, so that nobody has to send them.

Reference: Fed-SB, arXiv 2502.15436, section 3.
"""
from functools import lru_cache

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.seeds import derive


@lru_cache(1024)
def frame(shape: tuple[int, int], rank: int, seed: int, layer: str) -> tuple[Tensor, Tensor]:
    """The fixed factors of a layer, A (r, in) with orthonormal rows and B (out, r) with orthonormal columns, fp32.

    Drawn from the seed and the layer's name, so that nobody sends them: a client needs them to move A by core · frame.
    Where r exceeds a side, ranks above it are zeros. The tensors are shared by all who ask: nobody writes to them.
    """
    draw = torch.Generator().manual_seed(derive(seed, "frame", layer))
    sides = [torch.linalg.qr(torch.randn(side, rank, generator=draw, dtype=torch.float64)).Q for side in (shape[1], shape[0])]
    A, B = (torch.nn.functional.pad(Q, (0, rank - Q.shape[1])).float() for Q in sides)
    return A.T.contiguous(), B


def core(a: Adapter, frame_A: Tensor) -> Tensor:
    """The (r, r) core of an adapter B · diag(s) · (core · A): what Fed-SB's clients need to send."""
    return a.A @ frame_A.to(a.A).T


def core_in(a: Adapter, seed: int, layer: str) -> Tensor | None:
    """The core of an adapter that lies in the frame of this seed, up to the rounding of fp32; None for any other adapter."""
    frame_A, frame_B = frame(a.shape, a.rank, seed, layer)
    if a.A.dtype != torch.float32 or not torch.equal(a.B.cpu(), frame_B):
        return None
    small = core(a, frame_A)
    return small if float((small @ frame_A - a.A).norm()) <= 1e-5 * float(a.A.norm()) else None
