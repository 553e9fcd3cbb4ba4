"""What crosses the wire: an Update goes up, a Broadcast comes down, both as plain safetensors.

Tensors are named `<part>/<layer>/<A|B|scale>`; everything else is JSON under the metadata key `flora`: a format version, the
kind, the fields, and a SHA-256 digest over the fields, the tensor table and the tensor bytes. Nothing in a message can run code.

`decode` trusts nothing: sizes are bounded before anything is allocated, a flipped bit fails the digest, and adapters must
have finite numbers, fitting shapes and ranks within the limits. Whatever is wrong, it raises MessageError and nothing else.
"""
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError

from flora.adapter import Adapter, Adapters
from flora.errors import AdapterError, MessageError

FORMAT = 1
TRAIN = ("AB", "A", "B", "core", "weight")
_FACTORS = ("A", "B", "scale")


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
    """What a receiver accepts. Sizes in bytes, counted before anything of that size is allocated."""
    max_bytes: int = 1 << 34
    max_header_bytes: int = 1 << 24
    max_rank: int = 1 << 20
    max_examples: int = 1 << 40


def _digest(fields: Mapping[str, object], table: Mapping[str, object], data: bytes | memoryview) -> str:
    digest = hashlib.sha256(json.dumps([fields, table], sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


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


def encode(message: Update | Broadcast) -> bytes:
    """The message as safetensors bytes, the same bytes for the same message. Factors keep their dtype; they are read on the CPU."""
    parts = {part: adapters for part, adapters in _parts(message).items() if adapters is not None}
    tensors = {f"{part}/{layer}/{factor}": getattr(adapter, factor).detach().cpu().clone(memory_format=torch.contiguous_format)
               for part, adapters in parts.items() for layer, adapter in adapters.items() for factor in _FACTORS}
    dense = message.base or {}
    tensors |= {f"base/{layer}": w.detach().cpu().clone(memory_format=torch.contiguous_format) for layer, w in dense.items()}
    raw = safetensors.torch.save(tensors)
    size = struct.unpack("<Q", raw[:8])[0]
    table, data = json.loads(raw[8:8 + size]), memoryview(raw)[8 + size:]
    fields = {"format": FORMAT, **_fields(message), "parts": {part: list(adapters) for part, adapters in parts.items()}}
    header = _header_bytes({**fields, "digest": _digest(fields, table, data)}, table)
    return b"".join((struct.pack("<Q", len(header)), header, data))


def _header_bytes(fields: Mapping[str, object], table: Mapping[str, object]) -> bytes:
    """The one way to write a header: so a byte that changed is found even where JSON reads the same (a space, 1e5 and 1E5)."""
    header = json.dumps({"__metadata__": {"flora": json.dumps(fields, sort_keys=True)}, **table}).encode()
    return header + b" " * (-len(header) % 8)


def decode(data: bytes, expected: Mapping[str, tuple[int, int]] | None = None,
           limits: Limits | None = None) -> Update | Broadcast:
    """The message in these bytes, checked. expected: (out, in) by layer name: all adapters must be for these layers.

    Raises MessageError, and nothing else, for whatever is not a whole, sound message within the limits.
    """
    try:
        return _decode(data, expected, limits or Limits())
    except MessageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError,
            struct.error, SafetensorError, MemoryError) as error:
        raise MessageError(f"expected a flora message (safetensors); got bytes that cannot be read: "
                           f"{type(error).__name__}: {str(error)[:200]}") from error


def _require(good: bool, expected: str, got: object) -> None:
    if not good:
        raise MessageError(f"expected {expected}; got {str(got)[:200]}. The message is refused.")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    _require(len(keys) == len(pairs), "every key once in the header", "a key twice")
    return keys


def _header(data: bytes, limits: Limits) -> dict:
    """The fields of the header, sizes and digest checked."""
    _require(isinstance(data, (bytes, bytearray, memoryview)), "bytes", type(data).__name__)
    view = memoryview(data).cast("B")
    _require(8 <= len(view) <= limits.max_bytes, f"8 to {limits.max_bytes:,} bytes", f"{len(view):,}")
    size = struct.unpack("<Q", view[:8])[0]
    _require(size <= min(limits.max_header_bytes, len(view) - 8), f"a header of at most {limits.max_header_bytes:,} bytes",
             f"{size:,} in a message of {len(view):,}")
    header = json.loads(bytes(view[8:8 + size]), object_pairs_hook=_unique)
    _require(isinstance(header, dict), "a JSON object as header", type(header).__name__)
    fields = json.loads(header.pop("__metadata__")["flora"], object_pairs_hook=_unique)
    _require(fields.get("format") == FORMAT, f"format {FORMAT}", fields.get("format"))
    _require(_header_bytes(fields, header) == view[8:8 + size], "a header as flora writes it", "another spelling of it")
    digest = fields.pop("digest")
    body = view[8 + size:]
    _require(_digest(fields, header, body) == digest, "the sender's SHA-256 digest", "another: it changed on the way")
    return fields


def _decode(data: bytes, expected: Mapping[str, tuple[int, int]] | None, limits: Limits) -> Update | Broadcast:
    fields = _header(data, limits)
    _require(fields["kind"] in ("update", "broadcast"), "an update or a broadcast", fields["kind"])
    tensors = safetensors.torch.load(bytes(data))
    parts = {part: _adapters(part, layers, tensors, expected, limits) for part, layers in fields["parts"].items()}
    base = _weights(fields, tensors, expected)
    _require(not tensors, "only tensors of the layers listed", sorted(tensors)[:3])
    known = {"adapters"} if fields["kind"] == "update" else {"merge", "start"}
    _require(set(parts) <= known, f"no parts but {', '.join(sorted(known))}", sorted(parts))
    if fields["kind"] == "update":
        return Update(parts["adapters"], _count(fields, "num_examples", 1, limits.max_examples), _metrics(fields["metrics"]),
                      _count(fields, "base_version", 0, 1 << 62), _text(fields, "client"), base)
    _require(fields["train"] in TRAIN, f"train out of {', '.join(TRAIN)}", fields["train"])
    since = None if fields["since"] is None else _count(fields, "since", 0, 1 << 62)
    return Broadcast(parts.get("merge"), parts.get("start"), _count(fields, "version", 0, 1 << 62), fields["train"],
                     _text(fields, "run"), since, base, _count(fields, "frame", -(1 << 63), 1 << 63))


def _weights(fields: Mapping[str, object], tensors: dict[str, torch.Tensor],
             expected: Mapping[str, tuple[int, int]] | None) -> dict[str, torch.Tensor] | None:
    """The dense weights of a message, taken out of tensors."""
    if fields.get("base") is None:
        return None
    _require(isinstance(fields["base"], list) and len(fields["base"]) > 0 and "merge" not in fields["parts"],
             "weights of at least one layer, and no merge beside them", fields["base"])
    out = {}
    for layer in fields["base"]:
        weight = out[layer] = tensors.pop(f"base/{layer}")
        _require(weight.is_floating_point() and weight.dim() == 2 and bool(torch.isfinite(weight).all()),
                 f"{layer}: a weight (out, in) of finite floating-point numbers", f"{weight.dtype} {tuple(weight.shape)}")
        if expected is not None:
            _require(layer in expected, f"layers of this model ({len(expected)} of them)", layer)
            _require(tuple(weight.shape) == tuple(expected[layer]), f"{layer}: (out, in) = {tuple(expected[layer])}",
                     tuple(weight.shape))
    return out


def _adapters(part: str, layers: list[str], tensors: dict[str, torch.Tensor], expected: Mapping[str, tuple[int, int]] | None,
              limits: Limits) -> dict[str, Adapter]:
    """The adapters of one part, taken out of tensors."""
    out = {}
    for layer in layers:
        A, B, scale = (tensors.pop(f"{part}/{layer}/{factor}") for factor in _FACTORS)
        for name, tensor in zip(_FACTORS, (A, B, scale), strict=True):
            _require(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()), f"finite floating-point numbers in {layer}",
                     f"{name} of {tensor.dtype}" + (" with NaN or infinity" if tensor.is_floating_point() else ""))
        _require(scale.dtype == torch.float32 and scale.dim() == 1, f"{layer}: scale fp32 (rank,)",
                 f"{scale.dtype} {tuple(scale.shape)}")
        try:
            out[layer] = Adapter(A, B, scale)
        except AdapterError as error:
            raise MessageError(f"{layer}: {error}. The message is refused.") from error
        _require(out[layer].rank <= limits.max_rank, f"{layer}: a rank of at most {limits.max_rank}", out[layer].rank)
        if expected is not None:
            _require(layer in expected, f"layers of this model ({len(expected)} of them)", layer)
            _require(out[layer].shape == tuple(expected[layer]), f"{layer}: (out, in) = {tuple(expected[layer])}", out[layer].shape)
    return out


def _count(fields: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = fields[name]
    _require(type(value) is int and low <= value <= high, f"{name} between {low} and {high}", value)
    return value


def _text(fields: Mapping[str, object], name: str) -> str:
    _require(isinstance(fields[name], str), f"{name} as text", type(fields[name]).__name__)
    return fields[name]


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        _require(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                 f"a finite number as metric {name}", value)
    return dict(metrics)
