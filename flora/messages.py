"""What crosses the wire: an Update goes up, a Broadcast comes down, both as plain safetensors.

Tensors are named `<part>/<layer>/<A|B|scale>`; everything else is JSON under the metadata key `flora`: a format version, the
kind, the fields, and a SHA-256 digest over the fields, the tensor table and the tensor bytes. Nothing in a message can run code.

What the receiver can make by itself does not travel: factors of zeros (a B at the start, one that stays at home), and, where both
ends hold a broadcast (`given`: the one that an update was trained on, the one before a broadcast), factors that did not change
since, such as FFA's A; of Fed-SB's factors, only the (r, r) core.

`decode` trusts nothing: sizes are bounded before anything is allocated, a flipped bit fails the digest, and adapters must
have finite numbers, fitting shapes and ranks within the limits. Whatever is wrong, it raises MessageError and nothing else; a
subclass says what (errors.py).

Decoded tensors are to be read. Zeros are one number expanded, so that a message of a hundred bytes cannot take gigabytes, and
held factors are those of `given`: who wants to write clones first (torch refuses to write into the former).
"""
import struct
from collections.abc import Mapping
from typing import Literal

import torch
from safetensors import SafetensorError

from flora import wire
from flora.adapter import Adapters
from flora.errors import MessageError, MessageFormatError
from flora.exchange import Broadcast, Update, cut
from flora.frames import core_in
from flora.limits import Limits
from flora.reading import Reader
from flora.wire import FORMAT, largest, numbers

__all__ = ["Broadcast", "Limits", "Update", "decode", "encode", "size"]


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
    zeros: dict[str, list[int | str]] = {}
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
            for name, factor, before in (("A", a.A, cut(known.get(layer), "A", a.rank)),
                                         ("B", a.B, cut(known.get(layer), "B", a.rank))):
                if not bool(factor.any()):
                    zeros[where + name] = [*factor.shape, wire.DTYPES[factor.dtype]]
                elif before is not None and before.dtype == factor.dtype and torch.equal(before.cpu(), factor.cpu()):
                    held.append(where + name)
                else:
                    tensors[where + name] = factor
    tensors |= {f"base/{layer}": w for layer, w in (message.base or {}).items()}
    needs = bool(held or (cores and isinstance(message, Update)))
    with_it = [given.run, int(given.version)] if given is not None and needs else None
    fields = {"format": FORMAT, **_fields(message), "parts": {part: list(adapters) for part, adapters in parts.items()},
              "zeros": zeros, "held": held, "cores": cores, "given": with_it}
    return wire.ordered(tensors), fields


def _frame_of(message: Update | Broadcast, given: Broadcast | None) -> int | None:
    """The seed of the frame that these adapters lie in; None where they lie in none."""
    sent = message if isinstance(message, Broadcast) else given
    return sent.frame if sent is not None and sent.train == "core" else None


def encode(message: Update | Broadcast, given: Broadcast | None = None, whole: bool = False) -> bytes:
    """The message as safetensors bytes, the same bytes for the same message. Factors keep their dtype; they are read on the CPU.

    given: the broadcast that the receiver holds too and decodes with; None: the message stands alone. whole: every bit comes back,
    which a core times its frame does not give. Raises MessageError for numbers that are not finite: no receiver would take them.
    """
    if isinstance(message, Update):
        numbers(message.metrics)
    tensors, fields = _travels(message, given, whole)
    for name, tensor in tensors.items():
        largest(name, tensor)
    return wire.write(tensors, fields)


def size(message: Update | Broadcast, given: Broadcast | None = None) -> int:
    """len(encode(message, given)), without the bytes being made."""
    return wire.size(*_travels(message, given))


def decode(data: bytes, expected: Mapping[str, tuple[int, int]] | None = None, limits: Limits | None = None,
           given: Broadcast | None = None, version: int | None = None,
           kind: Literal["update", "broadcast"] | None = None) -> Update | Broadcast:
    """The message in these bytes (data), checked. expected: (out, in) by layer name: all adapters must be for these layers; given:
    the broadcast that it was encoded with; version: of the base that an update must have been trained on, or that a broadcast must
    lead to; kind: which of them it must be.

    Raises MessageError, and nothing else, for whatever is not a whole, sound message within the limits.
    """
    try:
        return Reader(data, expected, limits or Limits(), given).message(version, kind)
    except MessageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError,
            struct.error, SafetensorError, MemoryError) as error:
        raise MessageFormatError(f"expected a flora message (safetensors); got bytes that cannot be read: "
                                 f"{type(error).__name__}: {str(error)[:200]}") from error
