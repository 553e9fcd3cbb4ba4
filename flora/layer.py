"""The layer: a linear module with an adapter beside it.

A module is wrapped, not rebuilt: the wrapper holds the original as `base`, so weights stay tied as they were, nothing is copied,
and detach puts back the very same object. A base is an `nn.Linear` or GPT-2's `Conv1D`, whose weight is stored transposed.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora import ops
from flora.adapter import Adapter, fresh
from flora.errors import TargetError
from flora.seeds import derive


@dataclass
class Routing:
    """What the layers of one model must know of the batch: shared by all, set before a forward pass.

    segments: which rows and ranks are whose (None: one client). row_keys: int64 (rows,) keys for dropout (None: drawn).
    """
    segments: ops.Segments | None = None
    row_keys: Tensor | None = None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Conv1D, nn.Linear or a subclass with no state but weight and bias; not the one that attention reads past its forward."""
    plain = set(module._parameters) <= {"weight", "bias"} and not module._buffers
    read_past = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return _is_conv1d(module) or (isinstance(module, nn.Linear) and plain and not read_past)


def matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in): a transposed view for Conv1D, so that writing to it writes to the parameter."""
    return module.weight.T if _is_conv1d(module) else module.weight


class LoRALinear(nn.Module):
    """y = base(x) + ((dropout(x) Aᵀ) · scale) Bᵀ, without ΔW.

    base: nn.Linear or Conv1D, its weight frozen here; A (rank, in) and B (out, rank) train; scale fp32 (rank,) does not.
    dtype: of A and B; None: fp32, or fp64 beside an fp64 weight. Raises TargetError for other modules. arXiv 2106.09685.
    """

    def __init__(self, base: nn.Module, rank: int = 16, alpha: float = 32, dropout: float = 0.0,
                 dtype: torch.dtype | None = None):
        super().__init__()
        if not is_linear(base) or base.weight.dtype not in ops.FLOATS:
            raise TargetError(f"expected an nn.Linear or Conv1D with a floating-point weight; got {type(base).__name__}. "
                              "Leave it out of targets.")
        if not 0.0 <= dropout < 1.0:
            raise TargetError(f"expected a dropout in [0, 1); got {dropout}")
        self.base, self.dropout, self.routing, self.name = base, dropout, Routing(), ""
        self.frozen: ops.Frozen | None = None
        weight = matrix(base)
        dtype = dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        start = fresh(tuple(weight.shape), rank, alpha, int(torch.randint(1 << 62, ()))).to(weight.device, dtype)
        self.A, self.B = nn.Parameter(start.A), nn.Parameter(start.B)
        self.register_buffer("scale", start.scale)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def adapter(self) -> Adapter:
        """A, B and scale as they are now: detached copies."""
        return Adapter(self.A.detach().clone(), self.B.detach().clone(), self.scale.clone())

    def load(self, adapter: Adapter) -> None:
        """Takes an adapter of any rank; parameters are written in place where the rank is the same, replaced where it is not."""
        with torch.no_grad():
            for name, value in (("A", adapter.A), ("B", adapter.B)):
                old = getattr(self, name)
                if old.shape == value.shape:
                    old.copy_(value)
                else:
                    new = value.detach().to(old.device, old.dtype, copy=True)
                    setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
            self.scale = adapter.scale.detach().to(self.scale.device, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        seed = self.routing.row_keys
        if dropout and seed is not None:                       # layers of one batch draw different masks
            seed = ops.row_keys(seed, derive(self.name))
        return ops.lora_linear(x, matrix(self.base), self.A, self.B, self.scale, self.base.bias,
                               row_offsets=self.routing.segments, frozen=self.frozen, dropout=dropout, seed=seed)

    def _apply(self, fn, recurse: bool = True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)               # model.half() must not round alpha / rank
        return self

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, dropout={self.dropout}"
