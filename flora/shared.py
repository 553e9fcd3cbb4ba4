"""Layers that read the same tensor, computed in one call: q, k and v; gate and up."""
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks

from flora import ops
from flora.layer import LoRALinear, matrix


@dataclass(eq=False)
class _Pass:
    """One run of a parent's forward: the saved-tensor hooks it began under, the tensor read first, how things stood then, and the
    outputs that wait for their layers."""
    hooks: object
    x: Tensor | None = None
    state: tuple[object, ...] = ()
    waiting: dict[LoRALinear, Tensor] = field(default_factory=dict)


def _state(x: Tensor) -> tuple[object, ...]:
    """What one output depends on beside x and the layer: what was written to x since, grad and inference mode, autocast, the
    checkpoint that it is in."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    version = None if x.is_inference() else x._version
    return version, x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, top_hooks(True)


class SharedInput:
    """Layers that read the same tensor: the first one called computes all of them in one pass of x.

    It works while their parent module's forward runs, in the same thread, and not outside: no output waits longer than that. Where
    a layer is called with another tensor after all (cross-attention), what waited is dropped and the layers go their own ways for
    good. A layer called under another grad mode or autocast, after a write to x, or in a checkpoint inside the parent (which would
    compute it again without the others) computes alone.
    """

    def __init__(self, parent: nn.Module, layers: list[LoRALinear]):
        self.layers, self.passes = layers, dict[int, _Pass]()                    # by thread
        self._hooks = [parent.register_forward_pre_hook(self._start), parent.register_forward_hook(self._stop, always_call=True)]
        for layer in layers:
            layer.shared = self

    def _start(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self.passes[threading.get_ident()] = _Pass(top_hooks(True))

    def _stop(self, *_: object) -> None:
        if self.passes:
            self.passes.pop(threading.get_ident(), None)

    def part(self) -> None:
        """Ends the sharing."""
        self.passes.clear()
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            layer.shared = None

    def take(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None where it has to compute alone (as has a replica, which DataParallel makes)."""
        if not self.passes or torch.compiler.is_compiling():
            return None
        now = self.passes.get(threading.get_ident())
        if now is None or not any(layer is m for m in self.layers) or not self._alike():
            return None
        state = _state(x)
        if now.x is None:
            if state[-1] != now.hooks:
                return None
            now.x, now.state, now.waiting = x, state, dict(zip(self.layers, self._compute(x), strict=True))
        if x is not now.x:
            self.part()
            return None
        if state != now.state:
            return None
        if layer not in now.waiting:
            self.part()
            return None
        y = now.waiting.pop(layer)
        if not now.waiting:
            now.x = None
        return y

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all layers, in one call."""
        first = self.layers[0]
        return ops.lora_linears(x, [matrix(m.base) for m in self.layers], [m.A for m in self.layers], [m.B for m in self.layers],
                                [m.scale for m in self.layers], [m.bias for m in self.layers],
                                row_offsets=first.routing.segments, dropout=first.dropout if first.training else 0.0,
                                seeds=[m.seed() for m in self.layers],
                                frozen=None if first.frozen is None else [m.frozen for m in self.layers if m.frozen is not None])

    def _alike(self) -> bool:
        """Whether one call can serve all: the same clients and dropout; frozen ranks for all, with the same ranges, or for none."""
        first = self.layers[0]
        return all(m.routing is first.routing and m.dropout == first.dropout and m.training == first.training
                   and (m.frozen is None) == (first.frozen is None)
                   and (m.frozen is None or first.frozen is None or m.frozen.ranges is first.frozen.ranges)
                   for m in self.layers[1:])
