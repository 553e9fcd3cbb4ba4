"""One message as its receiver reads it: every field and tensor is checked before it becomes part of an Update or a Broadcast.

The container has been checked before (wire.py: sizes, spelling, digest, dtypes, places). What is checked here costs memory only
where numbers travelled: zeros are one number expanded, held factors are views of the receiver's own, and the frames of cores
are counted, in bytes and in work, before they are made. Time is linear in the bytes of the message, frames aside.
"""
import unicodedata
from collections.abc import Mapping

import torch

from flora import wire
from flora.adapter import Adapter
from flora.errors import (
    MessageCountError,
    MessageDtypeError,
    MessageLayerError,
    MessageRankError,
    MessageShapeError,
    MessageSizeError,
    MessageValueError,
    MessageVersionError,
)
from flora.exchange import TRAIN, Broadcast, Update, cut
from flora.frames import frame
from flora.limits import Limits
from flora.wire import largest, numbers, require, sides

COMMON = {"format": int, "kind": str, "parts": dict, "zeros": dict, "held": list, "cores": dict, "given": (list, type(None))}
FIELDS = {"update": COMMON | {"num_examples": object, "base_version": int, "metrics": dict, "client": str},
          "broadcast": COMMON | {"version": int, "train": str, "run": str, "since": (int, type(None)), "base": (list, type(None)),
                                 "frame": int}}
PARTS = {"update": ("adapters",), "broadcast": ("merge", "start")}
REVERSING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f", "\u061c"}


class Reader:
    """A message: its fields, and its tensors, which are taken out one by one. Raises MessageError where it is not sound."""

    def __init__(self, data: bytes, expected: Mapping[str, tuple[int, int]] | None, limits: Limits, given: Broadcast | None):
        self.expected, self.limits = expected, limits
        self.decoded = self.framed = self.work = 0
        self.fields, self.tensors = wire.read(data, limits)
        self._well_formed()
        self.held = self._held()
        self.given = self._given(given)

    def message(self, version: int | None, kind: str | None) -> Update | Broadcast:
        """The message, of this version and kind where they are given."""
        fields = self.fields
        update = fields["kind"] == "update"
        require(kind is None or fields["kind"] == kind, f"a message of kind {kind}", fields["kind"])
        count = self._integer("base_version" if update else "version", 0, 1 << 62)
        require(version is None or count == version, f"version {version} of the base", count, MessageVersionError)
        examples = self._examples() if update else 0
        metrics = self._metrics() if update else {}
        name = self._text(fields["client" if update else "run"], "client" if update else "run")
        parts = {part: self._adapters(part, self._layers(layers, part)) for part, layers in fields["parts"].items()}
        base = self._weights(set(parts.get("merge") or ()))
        left = [*self.tensors, *fields["zeros"], *self.held, *fields["cores"]]
        require(not left, "only tensors of the layers listed", left[:3], MessageLayerError)
        if update:
            return Update(parts["adapters"], examples, metrics, count, name, base)
        return Broadcast(parts.get("merge"), parts.get("start"), count, fields["train"], name, self._since(count), base,
                         self._integer("frame", -(1 << 63), 1 << 63))

    def _well_formed(self) -> None:
        """Refuses fields that are missing, unknown or of another type."""
        fields = self.fields
        kind = fields.get("kind")
        require(kind in tuple(FIELDS), "an update or a broadcast", kind)
        types = FIELDS[kind] | ({"base": list} if "base" in fields and kind == "update" else {})
        require(set(fields) == set(types), f"the fields of a message of kind {kind}", sorted(set(fields) ^ set(types)))
        for name, types_of in types.items():
            value = fields[name]
            require(isinstance(value, types_of) and not (isinstance(value, bool) and name != "num_examples"),
                    f"{name} as {_spelt(types_of)}", f"{type(value).__name__} {value!s:.100}")
        known = PARTS[kind]
        require(set(fields["parts"]) <= set(known) and ("adapters" in fields["parts"] or kind == "broadcast"),
                f"no parts but {', '.join(known)}" + (", which an update has" if kind == "update" else ""), [*fields["parts"]][:5])
        require(kind == "update" or fields["train"] in TRAIN, f"train out of {', '.join(TRAIN)}", fields.get("train"))

    def _held(self) -> set[str]:
        """The names of factors that the receiver holds, as a set: a list would make the time quadratic."""
        held = self.fields["held"]
        require(all(isinstance(name, str) for name in held), "names of factors as text in held", held[:3])
        require(len(set(held)) == len(held), "every factor in held once", "one that comes twice", MessageLayerError)
        return set(held)

    def _given(self, given: Broadcast | None) -> Broadcast | None:
        """The broadcast that this message was encoded with."""
        said = self.fields["given"]
        if said is None:
            return given if self.fields["kind"] == "update" else None
        require(given is not None, "to be told the broadcast that this message was encoded with (given=)", "none",
                MessageVersionError)
        require(said == [given.run, given.version], "a message encoded with the broadcast given "
                f"({given.run!r}, version {given.version})", f"one encoded with {said!s:.100}", MessageVersionError)
        return given

    def _layers(self, layers: object, part: str) -> list[str]:
        """The names of a part's layers: few enough, each of this model. (One that comes twice lacks its tensors.)"""
        require(isinstance(layers, list) and all(isinstance(name, str) for name in layers), f"{part} as a list of names", layers)
        require(len(layers) <= self.limits.max_layers, f"at most {self.limits.max_layers:,} layers in {part}", f"{len(layers):,}",
                MessageSizeError)
        for layer in layers:
            self._text(layer, f"a layer of {part}")
            require(self.expected is None or layer in self.expected, f"layers of this model ({len(self.expected or ())} of them)",
                    layer, MessageLayerError)
        return layers

    def _of_layer(self, layer: str, shape: tuple[int, ...]) -> None:
        """Refuses (out, in) that are not expected."""
        wanted = tuple(self.expected[layer]) if self.expected is not None else shape
        require(tuple(shape) == wanted, f"{layer}: (out, in) = {wanted}", shape, MessageShapeError)

    def _costs(self, name: str, count: int, itemsize: int) -> None:
        """Counts what a tensor of so many numbers takes when it is held by itself."""
        self.decoded += count * itemsize
        require(self.decoded <= self.limits.max_decoded_bytes, f"at most {self.limits.max_decoded_bytes:,} bytes of tensors",
                f"{self.decoded:,} with {name}", MessageSizeError)

    def _take(self, name: str) -> torch.Tensor:
        require(name in self.tensors, f"the tensor {name}", "none of that name", MessageLayerError)
        tensor = self.tensors.pop(name)
        self._costs(name, tensor.numel(), tensor.element_size())
        return tensor

    def _weights(self, merged: set[str]) -> dict[str, torch.Tensor] | None:
        """The dense weights of a message."""
        if self.fields.get("base") is None:
            return None
        layers = self._layers(self.fields["base"], "base")
        require(len(layers) > 0 and not merged & set(layers), "weights of at least one layer, and of none that is merged too",
                layers, MessageLayerError)
        out = {}
        for layer in layers:
            weight = out[layer] = self._take(f"base/{layer}")
            require(weight.dim() == 2, f"{layer}: a weight (out, in)", tuple(weight.shape), MessageShapeError)
            self._of_layer(layer, tuple(weight.shape))
            self._bounded(layer, largest(f"base/{layer}", weight))
        return out

    def _adapters(self, part: str, layers: list[str]) -> dict[str, Adapter]:
        """The adapters of one part."""
        out, total = {}, 0
        for layer in layers:
            where = f"{part}/{layer}/"
            scale = self._take(where + "scale")
            require(scale.dtype == torch.float32, f"{layer}: scale fp32", scale.dtype, MessageDtypeError)
            require(scale.dim() == 1, f"{layer}: scale (rank,)", tuple(scale.shape), MessageShapeError)
            rank, total = len(scale), total + len(scale)
            require(rank <= self.limits.max_rank and total <= self.limits.max_total_rank, f"{layer}: a rank of at most "
                    f"{self.limits.max_rank:,}, {self.limits.max_total_rank:,} in all layers", f"{rank:,}, {total:,}",
                    MessageRankError)
            framed = where in self.fields["cores"]
            A, B = self._framed(where, layer, rank) if framed else (self._factor(where, layer, name, rank) for name in ("A", "B"))
            require(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == rank, f"{layer}: A (rank, in) and B (out, rank) of one "
                    f"rank, one number a rank in scale ({rank})", f"A {tuple(A.shape)}, B {tuple(B.shape)}", MessageShapeError)
            self._of_layer(layer, (B.shape[0], A.shape[1]))
            self._bounded(layer, rank * largest(where + "scale", scale) * largest(where + "A", A) * largest(where + "B", B))
            out[layer] = Adapter(A, B, scale)
        return out

    def _bounded(self, layer: str, change: float) -> None:
        """Refuses finite numbers whose product is not: max |ΔW| <= rank · max |scale| · max |A| · max |B|."""
        require(change <= self.limits.max_change, f"{layer}: numbers of ΔW or a weight up to {self.limits.max_change:.3g}",
                f"{change:.3g} at most", MessageValueError)

    def _factor(self, where: str, layer: str, name: str, rank: int) -> torch.Tensor:
        """A factor that travelled, or is zeros (one number, expanded: nothing of the size claimed is allocated), or is held."""
        if where + name in self.fields["zeros"]:
            return self._zeros(where + name, self.fields["zeros"].pop(where + name))
        if where + name not in self.held:
            return self._take(where + name)
        self.held.remove(where + name)
        start = (self.given.start or {}) if self.given is not None else {}
        factor = cut(start.get(layer), name, rank)
        require(factor is not None, f"{where + name}: a factor of the broadcast given, of rank {rank} at least", "none",
                MessageVersionError)
        self._costs(where + name, factor.numel(), factor.element_size())
        return factor

    def _zeros(self, name: str, claim: object) -> torch.Tensor:
        require(isinstance(claim, list) and len(claim) == 3, f"{name}: [rows, columns, dtype]", claim)
        *shape, dtype = claim
        require(dtype in self.limits.dtypes, f"{name}: a dtype out of {', '.join(self.limits.dtypes)}", dtype, MessageDtypeError)
        require(sides(shape), f"{name}: rows and columns, from 1 up", shape, MessageShapeError)
        self._costs(name, shape[0] * shape[1], wire.BY_NAME[dtype].itemsize)
        return torch.zeros((), dtype=wire.BY_NAME[dtype]).expand(shape)

    def _framed(self, where: str, layer: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter of which the core travelled."""
        shape, is_update, limits = self.fields["cores"].pop(where), self.fields["kind"] == "update", self.limits
        require(sides(shape) and len(shape) == 2, f"{layer}: (out, in) of its core", shape, MessageShapeError)
        require(not is_update or self.given is not None, "to be told the broadcast that it was trained on (given=)", "none",
                MessageVersionError)
        self._of_layer(layer, tuple(shape))
        seed = self.given.frame if is_update else self._integer("frame", -(1 << 63), 1 << 63)
        own = (self.given.start or {}).get(layer) if self.given is not None and self.given.frame == seed else None
        known = own is not None and own.shape == tuple(shape) and own.rank == rank
        require(known or not is_update, f"{layer}: a core of the rank and shape that were sent", f"rank {rank} for {shape}",
                MessageRankError)
        self.framed += 4 * rank * sum(shape)
        self.work += sum(rank * side * min(rank, side) for side in shape)
        require(self.framed <= limits.max_frame_bytes and self.work <= limits.max_frame_work, "cores whose frames take "
                f"{limits.max_frame_bytes:,} bytes at most, made with {limits.max_frame_work:,} multiply-adds at most",
                f"{self.framed:,} and {self.work:,} so far", MessageSizeError)
        self._costs(where, rank * sum(shape), 4)
        frame_A, frame_B = (frame if known else frame.__wrapped__)(tuple(shape), rank, seed, layer)     # strangers fill no cache
        if where + "core" not in self.tensors:
            return torch.zeros_like(frame_A), frame_B
        small = self._take(where + "core")
        require(small.dtype == torch.float32, f"{layer}: a core fp32", small.dtype, MessageDtypeError)
        require(tuple(small.shape) == (rank, rank), f"{layer}: a core ({rank}, {rank})", tuple(small.shape), MessageShapeError)
        return small @ frame_A, frame_B

    def _integer(self, name: str, low: int, high: int) -> int:
        value = self.fields[name]
        require(low <= value <= high, f"{name} between {low} and {high}", value)
        return value

    def _since(self, version: int) -> int | None:
        since = None if self.fields["since"] is None else self._integer("since", 0, 1 << 62)
        require(since is None or since < version, f"since below version {version}", since, MessageVersionError)
        return since

    def _examples(self) -> int:
        value = self.fields["num_examples"]
        require(type(value) is int and 1 <= value <= self.limits.max_examples,
                f"num_examples between 1 and {self.limits.max_examples:,}", value, MessageCountError)
        return value

    def _metrics(self) -> dict[str, float]:
        metrics, most = self.fields["metrics"], self.limits.max_metrics
        require(len(metrics) <= most, f"at most {most:,} metrics", f"{len(metrics):,}", MessageSizeError)
        for name in metrics:
            self._text(name, "a metric's name")
        return numbers(metrics)

    def _text(self, text: str, name: str) -> str:
        """A name that can be printed, written as UTF-8 and shown as it is."""
        require(len(text) <= self.limits.max_name, f"{name} of at most {self.limits.max_name} characters", len(text),
                MessageSizeError)
        odd = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in REVERSING]
        require(not odd or not self.limits.plain_names, f"{name} as plain text", f"the characters {odd[:3]}")
        return text


def _spelt(types: type | tuple[type, ...]) -> str:
    named = {str: "text", int: "an integer", dict: "an object", list: "a list", type(None): "null"}
    return " or ".join(named.get(t, t.__name__) for t in (types if isinstance(types, tuple) else (types,)))
