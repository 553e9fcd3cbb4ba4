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

import safetensors.torch
import torch

from flora.errors import MessageError

FORMAT = 1
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
NO_DIGEST = "0" * 64


def require(good: bool, expected: str, got: object) -> None:
    """Raises MessageError unless good."""
    if not good:
        raise MessageError(f"expected {expected}; got {str(got)[:200]}. The message is refused.")


def ordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as they lie in a message. Raises MessageError for a dtype that safetensors has no name for."""
    for name, tensor in tensors.items():
        require(tensor.dtype in DTYPES, f"{name} of a dtype out of {', '.join(map(str, DTYPES))}", tensor.dtype)
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _table(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    out, offset = {}, 0
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
    parts = [memoryview(t.view(torch.uint8).numpy()) if len(t) else memoryview(b"") for t in flat]
    header = _header({**fields, "digest": _digest(fields, table, *parts)}, table)
    return b"".join((struct.pack("<Q", len(header)), header, *parts))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    require(len(keys) == len(pairs), "every key once in the header", "a key twice")
    return keys


def read(data: bytes, max_bytes: int, max_header_bytes: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """(fields, tensors) of a message, sizes, spelling and digest checked.

    Raises MessageError, or what json, struct and safetensors raise, for anything else.
    """
    require(isinstance(data, (bytes, bytearray, memoryview)), "bytes", type(data).__name__)
    view = memoryview(data).cast("B")
    require(8 <= len(view) <= max_bytes, f"8 to {max_bytes:,} bytes", f"{len(view):,}")
    length = struct.unpack("<Q", view[:8])[0]
    require(length <= min(max_header_bytes, len(view) - 8), f"a header of at most {max_header_bytes:,} bytes",
            f"{length:,} in a message of {len(view):,}")
    table = json.loads(bytes(view[8:8 + length]), object_pairs_hook=_unique)
    require(isinstance(table, dict), "a JSON object as header", type(table).__name__)
    fields = json.loads(table.pop("__metadata__")["flora"], object_pairs_hook=_unique)
    require(fields.get("format") == FORMAT, f"format {FORMAT}", fields.get("format"))
    require(_header(fields, table) == view[8:8 + length], "a header as flora writes it", "another spelling of it")
    digest = fields.pop("digest")
    require(_digest(fields, table, view[8 + length:]) == digest, "the sender's SHA-256 digest", "another: it changed on the way")
    return fields, safetensors.torch.load(bytes(data))


def numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """These metrics. Raises MessageError for one that is no finite number."""
    for name, value in metrics.items():
        require(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                f"a finite number as metric {name}", value)
    return dict(metrics)
