"""What crosses the wire: an Update goes up, a Broadcast comes down, both as plain safetensors.

Tensors are named `<part>/<layer>/<A|B|scale>`; everything else is JSON under the metadata key `flora`: a format version, the
kind, the fields, and a SHA-256 digest over the fields, the tensor table and the tensor bytes. Nothing in a message can run code.

What the receiver can make by itself does not travel: factors of zeros (a B at the start, one that stays at home), and, where both
ends hold a broadcast (`given`: the one that an update was trained on, the one before a broadcast), factors that did not change
since, such as FFA's A; of Fed-SB's factors, only the (r, r) core.

`decode` trusts nothing: sizes are bounded before anything is allocated, a flipped bit fails the digest, and adapters must
have finite numbers, fitting shapes and ranks within the limits. Whatever is wrong, it raises MessageError and nothing else.
"""
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from safetensors import SafetensorError

from flora import wire
from flora.adapter import Adapter, Adapters
from flora.errors import AdapterError, MessageError
from flora.frames import core_in, frame
from flora.wire import FORMAT, numbers, require

TRAIN = ("AB", "A", "B", "core", "weight")


@dataclass(frozen=True)
class Update:
    """What a client sends up: its whole adapters (the start included), and what the server needs to weigh them.

    num_examples: training rows, the weight of the client; metrics: numbers by name; base_version: of the broadcast it was
    trained on; client: its name; base: its weights (out, in) by layer, for full fine-tuning, which has no adapters.
    """
    adapters: Adapters
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    base_version: int = 0
    client: str = ""
    base: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Broadcast:
    """What the server sends down.

    merge: adapters to write into the base, once per run and version; start: where training continues (None: every client
    draws a fresh adapter); train: what trains, the factors "AB", "A" or "B", the "core" of Fed-SB (A = core · its frame), or the
    "weight" itself; version counts the base's states within a run.
    since: the version that merge adds to (None: version - 1; less for a client that missed rounds); base: weights (out, in) of
    this version by layer, which take the place of the model's: where they are fewer bytes than what was missed.
    frame: the seed of Fed-SB's fixed factors (frames.py).
    """
    merge: Adapters | None = None
    start: Adapters | None = None
    version: int = 0
    train: Literal["AB", "A", "B", "core", "weight"] = "AB"
    run: str = ""
    since: int | None = None
    base: Mapping[str, torch.Tensor] | None = None
    frame: int = 0


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts. Sizes in bytes, counted before anything of that size is allocated; max_frame_bytes: of the fixed
    factors that it makes for the cores of a message."""
    max_bytes: int = 1 << 34
    max_header_bytes: int = 1 << 24
    max_rank: int = 1 << 20
    max_examples: int = 1 << 40
    max_frame_bytes: int = 1 << 30


def _parts(message: Update | Broadcast) -> dict[str, Adapters | None]:
    if isinstance(message, Update):
        return {"adapters": message.adapters}
    return {"merge": message.merge, "start": message.start}


def _fields(message: Update | Broadcast) -> dict[str, object]:
    if isinstance(message, Update):
        fields = {"kind": "update", "num_examples": int(message.num_examples), "base_version": int(message.base_version),
                  "metrics": {name: float(value) for name, value in message.metrics.items()}, "client": message.client}
        return fields if message.base is None else {**fields, "base": list(message.base)}
    return {"kind": "broadcast", "version": int(message.version), "train": message.train, "run": message.run,
            "since": message.since, "frame": int(message.frame), "base": None if message.base is None else list(message.base)}


def _travels(message: Update | Broadcast, given: Broadcast | None,
             whole: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors that travel, and what the fields say of those that do not. whole: no cores."""
    tensors: dict[str, torch.Tensor] = {}
    zeros: dict[str, list[int]] = {}
    held: list[str] = []
    cores: dict[str, list[int]] = {}
    seed = None if whole else _frame_of(message, given)
    parts = {part: adapters for part, adapters in _parts(message).items() if adapters is not None}
    for part, adapters in parts.items():
        known = (given.start or {}) if given is not None and part != "merge" else {}
        for layer, a in adapters.items():
            where = f"{part}/{layer}/"
            tensors[where + "scale"] = a.scale
            if part != "merge" and seed is not None and (small := core_in(a, seed, layer)) is not None:
                cores[where] = [*a.shape]
                if bool(small.any()):
                    tensors[where + "core"] = small
                continue
            for name, factor, before in (("A", a.A, _cut(known.get(layer), "A", a.rank)),
                                         ("B", a.B, _cut(known.get(layer), "B", a.rank))):
                if not bool(factor.any()):
                    zeros[where + name] = [*factor.shape, wire.DTYPES[factor.dtype]]
                elif before is not None and before.dtype == factor.dtype and torch.equal(before.cpu(), factor.cpu()):
                    held.append(where + name)
                else:
                    tensors[where + name] = factor
    tensors |= {f"base/{layer}": w for layer, w in (message.base or {}).items()}
    needs = given is not None and bool(held or (cores and isinstance(message, Update)))
    fields = {"format": FORMAT, **_fields(message), "parts": {part: list(adapters) for part, adapters in parts.items()},
              "zeros": zeros, "held": held, "cores": cores, "given": [given.run, int(given.version)] if needs else None}
    return wire.ordered(tensors), fields


def _frame_of(message: Update | Broadcast, given: Broadcast | None) -> int | None:
    """The seed of the frame that these adapters lie in; None where they lie in none."""
    sent = message if isinstance(message, Broadcast) else given
    return sent.frame if sent is not None and sent.train == "core" else None


def _cut(a: Adapter | None, factor: str, rank: int) -> torch.Tensor | None:
    """A factor of the first `rank` ranks; None where there are not so many."""
    if a is None or a.rank < rank:
        return None
    return a.A[:rank] if factor == "A" else a.B[:, :rank]


def encode(message: Update | Broadcast, given: Broadcast | None = None, whole: bool = False) -> bytes:
    """The message as safetensors bytes, the same bytes for the same message. Factors keep their dtype; they are read on the CPU.

    given: the broadcast that the receiver holds too and decodes with; None: the message stands alone. whole: every bit comes back,
    which a core times its frame does not give. Raises MessageError for metrics that are not finite numbers.
    """
    if isinstance(message, Update):
        numbers(message.metrics)
    return wire.write(*_travels(message, given, whole))


def size(message: Update | Broadcast, given: Broadcast | None = None) -> int:
    """len(encode(message, given)), without the bytes being made."""
    return wire.size(*_travels(message, given))


def decode(data: bytes, expected: Mapping[str, tuple[int, int]] | None = None,
           limits: Limits | None = None, given: Broadcast | None = None) -> Update | Broadcast:
    """The message in these bytes, checked. expected: (out, in) by layer name: all adapters must be for these layers; given: the
    broadcast that it was encoded with.

    Raises MessageError, and nothing else, for whatever is not a whole, sound message within the limits.
    """
    try:
        return _Reader(data, expected, limits or Limits(), given).message()
    except MessageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError,
            struct.error, SafetensorError, MemoryError) as error:
        raise MessageError(f"expected a flora message (safetensors); got bytes that cannot be read: "
                           f"{type(error).__name__}: {str(error)[:200]}") from error


class _Reader:
    """One message as it is read: its fields, and its tensors, which are taken out one by one."""

    def __init__(self, data: bytes, expected: Mapping[str, tuple[int, int]] | None, limits: Limits, given: Broadcast | None):
        self.expected, self.limits, self.framed = expected, limits, 0
        self.fields, self.tensors = wire.read(data, limits.max_bytes, limits.max_header_bytes)
        self.given = self._given(given)

    def _given(self, given: Broadcast | None) -> Broadcast | None:
        """The broadcast that this message was encoded with."""
        if self.fields["given"] is None:
            return given if self.fields["kind"] == "update" else None
        require(given is not None, "to be told the broadcast that this message was encoded with (given=)", "none")
        require(self.fields["given"] == [given.run, given.version], "a message encoded with the broadcast given "
                f"({given.run!r}, version {given.version})", f"one encoded with {self.fields['given']}")
        return given

    def message(self) -> Update | Broadcast:
        fields = self.fields
        require(fields["kind"] in ("update", "broadcast"), "an update or a broadcast", fields["kind"])
        known = {"adapters"} if fields["kind"] == "update" else {"merge", "start"}
        require(set(fields["parts"]) <= known, f"no parts but {', '.join(sorted(known))}", sorted(fields["parts"]))
        if fields["kind"] == "broadcast":
            require(fields["train"] in TRAIN, f"train out of {', '.join(TRAIN)}", fields["train"])
        parts = {part: self._adapters(part, layers) for part, layers in fields["parts"].items()}
        base = self._weights(set(parts.get("merge") or ()))
        left = [*self.tensors, *fields["zeros"], *fields["held"], *fields["cores"]]
        require(not left, "only tensors of the layers listed", sorted(left)[:3])
        if fields["kind"] == "update":
            return Update(parts["adapters"], self._count("num_examples", 1, self.limits.max_examples), numbers(fields["metrics"]),
                          self._count("base_version", 0, 1 << 62), self._text("client"), base)
        since = None if fields["since"] is None else self._count("since", 0, 1 << 62)
        return Broadcast(parts.get("merge"), parts.get("start"), self._count("version", 0, 1 << 62), fields["train"],
                         self._text("run"), since, base, self._count("frame", -(1 << 63), 1 << 63))

    def _of_layer(self, layer: str, shape: tuple[int, ...]) -> None:
        """Refuses layers and (out, in) that are not expected."""
        if self.expected is not None:
            require(layer in self.expected, f"layers of this model ({len(self.expected)} of them)", layer)
            require(tuple(shape) == tuple(self.expected[layer]), f"{layer}: (out, in) = {tuple(self.expected[layer])}", shape)

    def _weights(self, merged: set[str]) -> dict[str, torch.Tensor] | None:
        """The dense weights of a message."""
        layers = self.fields.get("base")
        if layers is None:
            return None
        require(isinstance(layers, list) and len(layers) > 0 and not merged & set(layers),
                "weights of at least one layer, and of none that is merged too", layers)
        out = {}
        for layer in layers:
            weight = out[layer] = self.tensors.pop(f"base/{layer}")
            require(weight.is_floating_point() and weight.dim() == 2 and bool(torch.isfinite(weight).all()),
                    f"{layer}: a weight (out, in) of finite floating-point numbers", f"{weight.dtype} {tuple(weight.shape)}")
            self._of_layer(layer, tuple(weight.shape))
        return out

    def _adapters(self, part: str, layers: list[str]) -> dict[str, Adapter]:
        """The adapters of one part."""
        out = {}
        for layer in layers:
            where = f"{part}/{layer}/"
            scale = self._finite(where + "scale", self.tensors.pop(where + "scale"))
            require(scale.dtype == torch.float32 and scale.dim() == 1, f"{layer}: scale fp32 (rank,)",
                    f"{scale.dtype} {tuple(scale.shape)}")
            require(len(scale) <= self.limits.max_rank, f"{layer}: a rank of at most {self.limits.max_rank}", len(scale))
            if where in self.fields["cores"]:
                A, B = self._framed(where, layer, len(scale))
            else:
                A, B = (self._factor(where, layer, name, len(scale)) for name in ("A", "B"))
            try:
                out[layer] = Adapter(A, B, scale)
            except AdapterError as error:
                raise MessageError(f"{layer}: {error}. The message is refused.") from error
            self._of_layer(layer, out[layer].shape)
        return out

    def _finite(self, name: str, t: torch.Tensor) -> torch.Tensor:
        wide = t.float() if t.element_size() == 1 else t         # torch has no isfinite for 8 bits
        require(t.is_floating_point() and bool(torch.isfinite(wide).all()), f"finite floating-point numbers in {name}",
                f"{name} of {t.dtype}" + (" with NaN or infinity" if t.is_floating_point() else ""))
        return t

    def _factor(self, where: str, layer: str, name: str, rank: int) -> torch.Tensor:
        """A factor that travelled, or is zeros (one number, expanded: nothing of the size claimed is allocated), or is held."""
        if where + name in self.fields["zeros"]:
            *shape, dtype = self.fields["zeros"].pop(where + name)
            require(dtype in wire.BY_NAME, f"{where + name}: a dtype out of {', '.join(wire.BY_NAME)}", dtype)
            require(len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape) and 8 * shape[0] * shape[1]
                    <= self.limits.max_bytes, f"{where + name}: (rows, columns) of at most {self.limits.max_bytes:,} bytes", shape)
            return torch.zeros((), dtype=wire.BY_NAME[dtype]).expand(shape)
        if where + name in self.fields["held"]:
            self.fields["held"].remove(where + name)
            start = (self.given.start or {}) if self.given is not None else {}
            factor = _cut(start.get(layer), name, rank)
            require(factor is not None, f"{where + name}: a factor of the broadcast given, of rank {rank} at least", "none")
            return factor
        return self._finite(where + name, self.tensors.pop(where + name))

    def _framed(self, where: str, layer: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter of which the core travelled."""
        shape, is_update = self.fields["cores"].pop(where), self.fields["kind"] == "update"
        require(isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape),
                f"{layer}: (out, in) of its core", shape)
        require(not is_update or self.given is not None, "to be told the broadcast that it was trained on (given=)", "none")
        self._of_layer(layer, tuple(shape))
        self.framed += 4 * rank * sum(shape)
        require(rank <= max(shape) and self.framed <= self.limits.max_frame_bytes,
                f"cores of ranks up to (out, in), whose frames take {self.limits.max_frame_bytes:,} bytes at most",
                f"rank {rank} for {shape}, {self.framed:,} bytes so far")
        seed = self.given.frame if is_update else self._count("frame", -(1 << 63), 1 << 63)
        known = self.given is not None and self.given.frame == seed          # whoever else sends seeds shall not fill the cache
        frame_A, frame_B = (frame if known else frame.__wrapped__)(tuple(shape), rank, seed, layer)
        small = self.tensors.pop(where + "core", None)
        if small is None:
            return torch.zeros_like(frame_A), frame_B
        self._finite(where + "core", small)
        require(small.dtype == torch.float32 and tuple(small.shape) == (rank, rank), f"{layer}: a core fp32 ({rank}, {rank})",
                f"{small.dtype} {tuple(small.shape)}")
        return small @ frame_A, frame_B

    def _count(self, name: str, low: int, high: int) -> int:
        value = self.fields[name]
        require(type(value) is int and low <= value <= high, f"{name} between {low} and {high}", value)
        return value

    def _text(self, name: str) -> str:
        require(isinstance(self.fields[name], str), f"{name} as text", type(self.fields[name]).__name__)
        return self.fields[name]
