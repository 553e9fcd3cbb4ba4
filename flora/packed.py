"""The adapters of many clients on one model: one buffer a layer, in which each client's ranks lie together.

Rows of a batch are routed to their client's ranks by offsets (ops.Segments), so one forward and one backward pass serve all of
them and every gradient is its client's own. B is stored with its ranks outermost, as A is: a client's part of either factor, and of
its gradient, is one piece of memory, which that client's optimiser and clipping work on alone.
"""
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from flora import ops
from flora.adapter import Adapter, Adapters, all_layers, stack
from flora.layer import LoRALinear, Routing


class Packed:
    """Clients' adapters on the layers that nn.applied attached for `joined(starts)`.

    starts: each client's adapters by layer (a client may lack a layer); asleep: ranks that each client sees and does not train;
    train: "AB", "A" or "B". parameters[k]: client k's own factors, with gradients of their own.
    """

    def __init__(self, layers: Mapping[str, LoRALinear], starts: Sequence[Adapters], asleep: Sequence[Adapters], train: str):
        self.layers, self.count = layers, len(starts)
        self.parameters: list[list[Tensor]] = [[] for _ in starts]
        self._parts: list[dict[str, tuple[int, int]]] = [{} for _ in starts]
        self._routings: dict[tuple[int, ...], Routing] = {}
        self._ranges: dict[tuple[tuple[int, int], ...], Tensor] = {}
        for name, layer in layers.items():
            self._pack(name, layer, starts, train)
            layer.frozen = self._frozen(name, layer, asleep)

    def _pack(self, name: str, layer: LoRALinear, starts: Sequence[Adapters], train: str) -> None:
        ranks = [start[name].rank if name in start else 0 for start in starts]
        trains = any(ranks)
        if not trains:
            ranks[0] = layer.A.shape[0]                       # a rank of zeros that nobody trains stands for none
            layer.dropout = 0.0
        offsets = [0, *accumulate(ranks)]
        layer.B = nn.Parameter(layer.B.detach().T.contiguous().T)
        layer.routing = self._routings.setdefault(tuple(offsets), Routing())
        for factor, letter in ((layer.A, "A"), (layer.B, "B")):
            factor.requires_grad_(trains and letter in train)
            if factor.requires_grad:
                factor.grad = torch.zeros_like(factor)
        for k, (first, last) in enumerate(pairwise(offsets)):
            if not trains or first == last:
                continue
            self._parts[k][name] = (first, last)
            for factor, turned in ((layer.A, False), (layer.B, True)):
                if factor.requires_grad:
                    own = (factor.detach().T if turned else factor.detach())[first:last]
                    own.grad = (factor.grad.T if turned else factor.grad)[first:last]
                    self.parameters[k].append(own)

    def _frozen(self, name: str, layer: LoRALinear, asleep: Sequence[Adapters]) -> ops.Frozen | None:
        """What clients see of this layer and do not train, each distinct adapter once."""
        if not any(name in one for one in asleep):
            return None
        places: dict[int, tuple[int, int]] = {}
        held: list[Adapter] = []
        total, ranges = 0, []
        for one in asleep:
            a = one.get(name)
            if a is not None and id(a) not in places:
                places[id(a)] = (total, total + a.rank)
                total += a.rank
                held.append(a.to(layer.A.device, layer.A.dtype))
            ranges.append((0, 0) if a is None else places[id(a)])
        whole = stack(held)
        frozen = ops.Frozen(whole.A, whole.B, whole.scale, ranges)
        frozen.ranges = self._ranges.setdefault(tuple(ranges), frozen.ranges)       # one object: layers that share an input agree
        return frozen

    def route(self, rows: Sequence[int], keys: Tensor | None) -> None:
        """Says whose the rows of the next pass are: so many of each client, in order. keys: int64 (rows,), for dropout."""
        row_offsets = [0, *accumulate(rows)]
        for rank_offsets, routing in self._routings.items():
            routing.segments, routing.row_keys = ops.Segments(row_offsets, rank_offsets), keys

    def zero_grad(self) -> None:
        for layer in self.layers.values():
            for factor in (layer.A, layer.B):
                if factor.grad is not None:
                    factor.grad.zero_()

    def adapters(self, k: int) -> dict[str, Adapter]:
        """Client k's adapters as they are now: copies on the CPU."""
        out = {}
        for name, (first, last) in self._parts[k].items():
            layer = self.layers[name]
            A, B = layer.A.detach()[first:last], layer.B.detach()[:, first:last]
            out[name] = Adapter(A.to("cpu", copy=True), B.to("cpu", memory_format=torch.contiguous_format, copy=True),
                                layer.scale[first:last].to("cpu", copy=True))
        return out


def joined(starts: Sequence[Adapters], asleep: Sequence[Adapters]) -> dict[str, Adapter]:
    """One adapter a layer that holds all clients' ranks in order; a rank of zeros where nobody trains what somebody sees."""
    out = {}
    for name in all_layers([*starts, *asleep]):
        have = [start[name] for start in starts if name in start]
        if not have:
            a = next(one[name] for one in asleep if name in one)
            have = [Adapter(torch.zeros(1, a.A.shape[1]), torch.zeros(a.B.shape[0], 1), 1.0)]
        out[name] = stack(have)
    return out
