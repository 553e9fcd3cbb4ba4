"""The container of a message: safetensors, with the fields as JSON in its header and a SHA-256 digest over all of it.

    8 bytes   length of the header
    header    {"__metadata__": {"flora": fields}, name: {dtype, shape, data_offsets}, ...}, padded to 8 bytes
    body      the tensors, larger dtypes first so that each is aligned

`read` trusts nothing: sizes are bounded before anything of that size is allocated, and a header that is spelt in another way
than `write` would spell it is refused, so a byte that changed is found even where JSON reads the same (a space, 1e5 and 1E5).
"""
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from flora.errors import (
    MessageDigestError,
    MessageDtypeError,
    MessageError,
    MessageFormatError,
    MessageShapeError,
    MessageSizeError,
    MessageValueError,
)
from flora.limits import Limits

FORMAT = 1
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
NO_DIGEST = "0" * 64
HUGE = 1.7976931348623157e308                                    # beyond it, fp64 has only infinity
CHUNK = 1 << 20


def require(good: bool, expected: str, got: object, error: type[MessageError] = MessageFormatError) -> None:
    """Raises this MessageError unless good."""
    if not good:
        raise error(f"expected {expected}; got {str(got)[:200]}. The message is refused.")


def largest(name: str, tensor: torch.Tensor) -> float:
    """max |t|, in one pass and without a copy. Raises MessageValueError where a number is not finite."""
    once, top = tensor.detach(), 0.0
    for dimension, stride in enumerate(once.stride()):           # zeros that a stranger claims are one number: it is read once
        once = once.narrow(dimension, 0, 1) if stride == 0 and once.shape[dimension] > 1 else once
    small = once.element_size() == 1                             # torch knows no order of 8-bit floats: a few of them at a time
    parts = (p.float() for p in once.reshape(-1).split(CHUNK)) if small else (once,)
    for part in parts if once.numel() else ():
        low, high = (float(x) for x in torch.aminmax(part))      # NaN where there is one
        require(math.isfinite(low) and math.isfinite(high), f"finite numbers in {name}",
                f"{name} of {tensor.dtype} with NaN or infinity", MessageValueError)
        top = max(top, -low, high)
    return top


def ordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as they lie in a message. Raises MessageDtypeError for a dtype that safetensors has no name for."""
    for name, tensor in tensors.items():
        require(tensor.dtype in DTYPES, f"{name} of a dtype out of {', '.join(map(str, DTYPES))}", tensor.dtype, MessageDtypeError)
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _table(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    out: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        out[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [offset, end]}
        offset = end
    return out


def _header(fields: Mapping[str, object], table: Mapping[str, object]) -> bytes:
    header = json.dumps({"__metadata__": {"flora": json.dumps(fields, sort_keys=True)}, **table}).encode()
    return header + b" " * (-len(header) % 8)


def _digest(fields: Mapping[str, object], table: Mapping[str, object], *parts: memoryview) -> str:
    digest = hashlib.sha256(json.dumps([fields, table], sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def size(tensors: Mapping[str, torch.Tensor], fields: Mapping[str, object]) -> int:
    """Bytes that `write` gives."""
    table = _table(tensors)
    return 8 + len(_header({**fields, "digest": NO_DIGEST}, table)) + sum(t.numel() * t.element_size() for t in tensors.values())


def write(tensors: Mapping[str, torch.Tensor], fields: Mapping[str, object]) -> bytes:
    """The message of these tensors, in the order of `ordered`, and fields, which JSON can hold."""
    table = _table(tensors)
    flat = [t.detach().cpu().contiguous().reshape(-1) for t in tensors.values()]
    parts = [t.view(torch.uint8).numpy().data if len(t) else memoryview(b"") for t in flat]
    header = _header({**fields, "digest": _digest(fields, table, *parts)}, table)
    return b"".join((struct.pack("<Q", len(header)), header, *parts))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    require(len(keys) == len(pairs), "every key once in the header", "a key twice")
    return keys


def read(data: bytes, limits: Limits) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(fields, tensors) of a message, sizes, spelling, digest, dtypes and the place of every tensor checked.

    Raises MessageError, or what json, struct and safetensors raise, for anything else.
    """
    require(isinstance(data, (bytes, bytearray, memoryview)), "bytes", type(data).__name__)
    view = memoryview(data).cast("B")
    require(8 <= len(view) <= limits.max_bytes, f"8 to {limits.max_bytes:,} bytes", f"{len(view):,}", MessageSizeError)
    length = struct.unpack("<Q", view[:8])[0]
    require(length <= min(limits.max_header_bytes, len(view) - 8), f"a header of at most {limits.max_header_bytes:,} bytes",
            f"{length:,} in a message of {len(view):,}", MessageSizeError)
    table = json.loads(bytes(view[8:8 + length]), object_pairs_hook=_unique)
    require(isinstance(table, dict), "a JSON object as header", type(table).__name__)
    metadata = table.pop("__metadata__", None)
    require(isinstance(metadata, dict) and isinstance(metadata.get("flora"), str), "flora's fields as metadata", metadata)
    fields = json.loads(metadata["flora"], object_pairs_hook=_unique)
    version = fields.get("format") if isinstance(fields, dict) else None
    require(version == FORMAT, f"format {FORMAT}", version)
    require(_header(fields, table) == view[8:8 + length], "a header as flora writes it", "another spelling of it")
    digest = fields.pop("digest", None)
    require(_digest(fields, table, view[8 + length:]) == digest, "the sender's SHA-256 digest", "another: it changed on the way",
            MessageDigestError)
    _places(table, len(view) - 8 - length, limits)
    return fields, safetensors.torch.load(bytes(data))


def sides(shape: object) -> bool:
    """Whether this is a list of dimensions: integers from 1 up that fit in 62 bits."""
    return isinstance(shape, list) and all(type(n) is int and 1 <= n < 1 << 62 for n in shape)


def _places(table: Mapping[str, Any], length: int, limits: Limits) -> None:
    """Refuses tensors that are not a vector or matrix of an accepted dtype, one after the other, filling the body."""
    offset = 0
    for name, entry in table.items():
        require(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
                f"{name[:200]}: dtype, shape and data_offsets", entry)
        dtype, shape = entry["dtype"], entry["shape"]
        require(dtype in limits.dtypes, f"{name[:200]}: a dtype out of {', '.join(limits.dtypes)}", dtype,
                MessageDtypeError)
        require(sides(shape) and 1 <= len(shape) <= 2, f"{name[:200]}: a vector or a matrix that is not empty", shape,
                MessageShapeError)
        end = offset + math.prod(shape) * BY_NAME[dtype].itemsize
        require(entry["data_offsets"] == [offset, end], f"{name[:200]} at bytes {offset:,} to {end:,}", entry["data_offsets"])
        offset = end
    require(offset == length, f"{offset:,} bytes of tensors", f"{length:,}")


def numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """These metrics. Raises MessageValueError for one that is no finite number."""
    for name, value in metrics.items():
        require(isinstance(value, (int, float)) and not isinstance(value, bool) and -HUGE <= value <= HUGE,
                f"a finite number as metric {name[:200]}", value, MessageValueError)
    return dict(metrics)
