"""The layer: a linear module with an adapter beside it.

A module is wrapped, not rebuilt: the wrapper holds the original as `base`, so weights stay tied as they were, nothing is copied,
and detach puts back the very same object. A base is an `nn.Linear`, GPT-2's `Conv1D`, whose weight is stored transposed, or a
linear that only its own forward can multiply with (quantised, hooked, a forward of its own): then the LoRA path is added to that.
"""
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flora import ops
from flora.adapter import Adapter, fresh
from flora.errors import TargetError
from flora.seeds import derive
from flora.segments import sent_to
from flora.sharded import is_sharded, own_part, own_span, whole

if TYPE_CHECKING:
    from flora.shared import SharedInput


@dataclass
class Routing:
    """What the layers of one model must know of the batch: shared by all, set before a forward pass.

    segments: which rows and ranks are whose (None: one client). row_keys: int64 (rows,) keys for dropout (None: drawn). names: of
    layers that drop: their keys are made all at once, which takes a dozen launches on a GPU and not thirty a layer.
    """
    segments: ops.Segments | None = None
    row_keys: Tensor | None = None
    names: list[str] = field(default_factory=list)
    _made: tuple[Tensor, dict[str, Tensor]] | None = None

    def keys_of(self, name: str) -> Tensor | None:
        """A layer's own keys of the rows."""
        if self.row_keys is None or name not in self.names:
            return None if self.row_keys is None else ops.row_keys(self.row_keys, derive(name))
        if self._made is None or self._made[0] is not self.row_keys:
            seeds = sent_to(self.row_keys.device, torch.tensor([derive(name) for name in self.names]))
            self._made = self.row_keys, dict(zip(self.names, ops.row_keys(self.row_keys, seeds[:, None]), strict=True))
        return self._made[1][name]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Conv1D, nn.Linear or a subclass with no state but weight and bias; not the one that attention reads past its forward.

    Its weight can be read; its product is x Wᵀ + bias, unless computes_itself says that its forward has to be asked."""
    if is_opaque(module):
        return False
    plain = set(module._parameters) <= {"weight", "bias"} and not module._buffers
    read_past = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return _is_conv1d(module) or (isinstance(module, nn.Linear) and plain and not read_past)


def is_opaque(module: nn.Module) -> bool:
    """A linear module whose weight is no plain floating-point matrix (4-bit, 8-bit, FP8, packed): it says in_features and
    out_features, and has no submodules. Its product is its own; nothing can be merged into it. (A plain weight whose product is its
    own all the same: computes_itself.)"""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if isinstance(module, Accumulated):
        return True
    if not all(isinstance(size, int) for size in sizes) or isinstance(module, LoRALinear) or len(module._modules):
        return False
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.dtype in ops.FLOATS
    return not plain and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def overrides(module: nn.Module) -> bool:
    """Whether a linear module has a forward of its own, by its class or put on the instance: what it does with the weight is not
    known, so an update merged into the weight need not be the one that an adapter adds. accelerate's hooks are no such forward, nor
    is Falcon's, which spells out nn.Linear's."""
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return (own and type(module).__name__ != "FalconLinear") or ("forward" in module.__dict__ and not hasattr(module, "_hf_hook"))


def computes_itself(module: nn.Module) -> bool:
    """Whether a linear module has to be called for its product: it has forward hooks (accelerate's replace the forward of the
    instance) or a forward of its own. An adapter attached to it adds to what it gives, as to a quantised one; hooks that come after
    the adapter are not seen."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__) or overrides(module)


def device_for(module: nn.Module) -> torch.device:
    """Where an adapter beside a module, or what a model reads, has to lie: with the first weight, or, where accelerate has
    offloaded that, where it is computed with."""
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    if device.type != "meta":
        return device
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    there = next((where for hook in hooks if (where := getattr(hook, "execution_device", None)) is not None), device)
    return torch.device(there)


def own_product(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives for x, to be added to in place: a copy where a forward or a hook may keep it, or give x itself."""
    y = module(x)
    if not isinstance(y, Tensor):
        raise TargetError(f"expected a tensor from a linear module; {type(module).__name__} gives a {type(y).__name__}. "
                          "Leave it out of targets.")
    return y.clone() if computes_itself(module) else y


def refuse_parametrized(module: nn.Module, name: str = "") -> None:
    """Raises TargetError for a weight that is computed at every use: what is written to it is lost."""
    if parametrize.is_parametrized(module, "weight"):
        raise TargetError(f"{name or type(module).__name__}: expected a weight that is a parameter; it is computed by "
                          "torch.nn.utils.parametrize. Call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') "
                          "first, or leave it out of targets.")


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if is_opaque(module):
        return cast("tuple[int, int]", (module.out_features, module.in_features))
    return cast("tuple[int, int]", tuple(matrix(module).shape))


def matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in): a transposed view for Conv1D, so that writing to it writes to the parameter."""
    weight = cast(Tensor, module.weight)
    return weight.T if _is_conv1d(module) else weight


class Accumulated(nn.Module):
    """y = base(x) + (x Aᵀ · scale) Bᵀ: a base that is not written to, with the update it has had kept beside it.

    base: any linear module, quantised or not; A, B, scale are buffers that do not train. An adapter attaches to it as to any
    quantised linear.
    """

    A: Tensor
    B: Tensor
    scale: Tensor

    def __init__(self, base: nn.Module, adapter: Adapter):
        super().__init__()
        self.base = base
        self.out_features, self.in_features = shape_of(base)
        for name in ("A", "B", "scale"):
            self.register_buffer(name, getattr(adapter, name).detach().clone())

    @property
    def weight(self) -> Tensor | None:
        return getattr(self.base, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    @property
    def adapter(self) -> Adapter:
        """What is kept: the whole update."""
        return Adapter(self.A, self.B, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return ops.lora_add_(own_product(self.base, x), x, self.A, self.B, self.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> "Accumulated":
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self


class LoRALinear(nn.Module):
    """y = base(x) + ((dropout(x) Aᵀ) · scale) Bᵀ, without ΔW.

    base: nn.Linear, Conv1D or a quantised linear, its weight frozen here; A (rank, in) and B (out, rank) train; scale fp32
    (rank,) does not. dtype: of A and B; None: fp32, or fp64 beside an fp64 weight. adapter: starts from a copy of it, in the place
    of a fresh one of this rank and alpha. Raises TargetError for other modules. arXiv 2106.09685.
    """

    scale: Tensor

    def __init__(self, base: nn.Module, rank: int = 16, alpha: float = 32, dropout: float = 0.0,
                 dtype: torch.dtype | None = None, adapter: Adapter | None = None):
        super().__init__()
        self.opaque = is_opaque(base)
        if not (self.opaque or is_linear(base)):
            raise TargetError(f"expected an nn.Linear, a Conv1D or a quantised linear; got {type(base).__name__}. "
                              "Leave it out of targets.")
        refuse_parametrized(base)
        self.opaque |= computes_itself(base)
        if not 0.0 <= dropout < 1.0:
            raise TargetError(f"expected a dropout in [0, 1); got {dropout}")
        self.base, self.dropout, self.routing, self.name = base, dropout, Routing(), ""
        self.frozen: ops.Frozen | None = None
        self.shared: SharedInput | None = None
        held = next(itertools.chain(base.parameters(), base.buffers()))
        dtype = dtype or (torch.float64 if held.dtype == torch.float64 else torch.float32)
        start, device = adapter or fresh(shape_of(base), rank, alpha, int(torch.randint(1 << 62, ()))), device_for(base)
        self.A, self.B = (nn.Parameter(f.detach().to(device, dtype, copy=adapter is not None)) for f in (start.A, start.B))
        self.register_buffer("scale", start.scale.detach().to(device, copy=adapter is not None))

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def adapter(self) -> Adapter:
        """A, B and scale as they are now: detached copies. Of sharded ones the whole: every process asks at once."""
        return Adapter(whole(self.A.detach()).clone(), whole(self.B.detach()).clone(), self.scale.clone())

    def load(self, adapter: Adapter) -> None:
        """Takes an adapter of any rank; parameters are written in place where the rank is the same, replaced where it is not."""
        with torch.no_grad():
            for name, value in (("A", adapter.A), ("B", adapter.B)):
                old = getattr(self, name)
                if is_sharded(old) and old.shape == value.shape:
                    own_part(old).copy_(value[own_span(self.name, old)])
                elif old.shape == value.shape:
                    old.copy_(value)
                else:
                    new = value.detach().to(old.device, old.dtype, copy=True)
                    setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
            self.scale = adapter.scale.detach().to(self.scale.device, copy=True)

    def seed(self) -> Tensor | None:
        """This layer's dropout keys: layers of one batch draw different masks. None: drawn by the operator."""
        return self.routing.keys_of(self.name) if self.dropout and self.training else None

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) of x (..., in): one operator, of the layers beside it that read x too where they are asked together."""
        if self.shared is not None and (y := self.shared.take(self, x)) is not None:
            return y
        options: dict[str, Any] = {"row_offsets": self.routing.segments, "frozen": self.frozen, "seed": self.seed(),
                                   "dropout": self.dropout if self.training else 0.0}
        if self.opaque:
            return ops.lora_add_(own_product(self.base, x), x, self.A, self.B, self.scale, **options)
        return ops.lora_linear(x, matrix(self.base), self.A, self.B, self.scale, self.bias, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)               # model.half() must not round alpha / rank
        return self

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"rank={self.A.shape[0]}, dropout={self.dropout}"
