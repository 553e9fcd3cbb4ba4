"""The adapters of many clients on one model: one buffer a layer, in which each client's ranks lie together.

Rows of a batch are routed to their client's ranks by offsets (ops.Segments), so one forward and one backward pass serve all of
them and every gradient is its client's own. B is stored with its ranks outermost, as A is: a client's part of either factor, and of
its gradient, is one piece of memory, which that client's optimiser and clipping work on alone.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from flora import ops
from flora.adapter import Adapter, Adapters, all_layers, stack
from flora.forms import Factors, Form, Slot
from flora.layer import LoRALinear, Routing

MOST_RANKS, MOST_CLIENTS = 1024, 256                            # what a kernel takes


class Packed:
    """Clients' adapters on the layers that nn.applied attached for `joined(starts)`.

    starts: each client's adapters by layer (a client may lack a layer); asleep: ranks that each client sees and does not train;
    train: which factors get gradients, "AB", "A", "B", or "" for none. form(k, slots): what client k trains of its slots by layer
    (forms.py; None: the factors themselves). parameters[k]: client k's own, by name; after `take_gradients` their gradients are
    its own.
    """

    def __init__(self, layers: Mapping[str, LoRALinear], starts: Sequence[Adapters], asleep: Sequence[Adapters], train: str,
                 form: Callable[[int, dict[str, Slot]], Form] | None = None):
        self.layers, self.count = layers, len(starts)
        self._slots: list[dict[str, Slot]] = [{} for _ in starts]
        self._routings: dict[tuple[int, ...], Routing] = {}
        self._ranges: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self._trained: dict[str, list[Tensor]] = {}
        self._rows: list[int] = []
        for name, layer in layers.items():
            self._pack(name, layer, starts, train)
            layer.frozen = self._frozen(name, layer, asleep)
        self._alike = len(set(map(frozenset, self._slots))) == 1
        self._forms = [Factors(slots) if form is None else form(k, slots) for k, slots in enumerate(self._slots)]
        self.parameters = [form.parameters for form in self._forms]

    def _pack(self, name: str, layer: LoRALinear, starts: Sequence[Adapters], train: str) -> None:
        ranks = [start[name].rank if name in start else 0 for start in starts]
        trains = any(ranks)
        if not trains:
            ranks[0] = layer.A.shape[0]                       # a rank of zeros that nobody trains stands for none
            layer.dropout = 0.0
        offsets = [0, *accumulate(ranks)]
        if not layer.B.T.is_contiguous():
            layer.B = nn.Parameter(layer.B.detach().T.contiguous().T)
        layer.routing = self._routings.setdefault(tuple(offsets), Routing())
        if layer.dropout:
            layer.routing.names.append(name)
        for factor, wanted in ((layer.A, "A" in train), (layer.B, "B" in train)):
            factor.requires_grad_(trains and wanted)
        self._trained[name] = [factor for factor in (layer.A, layer.B) if factor.requires_grad]
        for k, (first, last) in enumerate(pairwise(offsets)):
            if trains and first < last:
                self._slots[k][name] = Slot(layer, first, last)

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
        if frozen.ranges is not None:
            frozen.ranges = self._ranges.setdefault(tuple(ranges), frozen.ranges)     # one object: layers that share an input agree
        return frozen

    def route(self, rows: Sequence[int], keys: Tensor | None) -> None:
        """Says whose the rows of the next pass are: so many of each client, in order. keys: int64 (rows,), for dropout.

        Layers that none of these clients trains take no part in the backward pass: it ends at the lowest one that some do.
        """
        row_offsets = [0, *accumulate(rows)]
        same, self._rows = self._rows == row_offsets, row_offsets       # then what a kernel has made of the segments still holds
        for rank_offsets, routing in self._routings.items():
            routing.segments = routing.segments if same else ops.Segments(row_offsets, rank_offsets)
            routing.row_keys = keys
        if same:
            return
        if not self._alike:
            here = {name for k, count in enumerate(rows) if count for name in self._slots[k]}
            for name, factors in self._trained.items():
                for factor in factors:
                    factor.requires_grad_(name in here)

    def zero_grad(self) -> None:
        """No gradients: the next pass's are taken as they come, later ones are added to them."""
        for factors in self._trained.values():
            for factor in factors:
                factor.grad = None

    def take_gradients(self, k: int) -> None:
        """Gives client k's parameters their parts of the gradients."""
        self._forms[k].take_gradients()

    def write(self, k: int) -> None:
        """Writes client k's factors after a step of its optimiser, where what trains is not the factors themselves."""
        self._forms[k].write()

    def adapters(self, k: int) -> dict[str, Adapter]:
        """Client k's adapters as they are now: copies on the CPU."""
        return self._forms[k].adapters()

    def weights(self, k: int) -> None:
        """None: the base does not train."""


def joined(starts: Sequence[Adapters], asleep: Sequence[Adapters]) -> dict[str, Adapter]:
    """One adapter a layer, on the CPU, that holds all clients' ranks in order, B with its ranks outermost; a rank of zeros where
    nobody trains what somebody sees. Some may come from a GPU and some not."""
    out = {}
    for name in all_layers([*starts, *asleep]):
        have = [start[name].to("cpu") for start in starts if name in start]
        if not have:
            a = next(one[name] for one in asleep if name in one)
            have = [Adapter(torch.zeros(1, a.A.shape[1]), torch.zeros(a.B.shape[0], 1), 1.0)]
        out[name] = Adapter(torch.cat([a.A for a in have]), torch.cat([a.B.T for a in have]).T, torch.cat([a.scale for a in have]))
    return out


def together(adapters: Mapping[str, Adapters]) -> Iterator[list[str]]:
    """Names of clients whose adapters one kernel takes at once, in order."""
    group: list[str] = []
    total = 0
    for name, own in adapters.items():
        rank = max((a.rank for a in own.values()), default=0)
        if group and (len(group) == MOST_CLIENTS or total + rank > MOST_RANKS):
            yield group
            group, total = [], 0
        group.append(name)
        total += rank
    if group:
        yield group
