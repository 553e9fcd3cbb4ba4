"""Messages taken apart and put together again by the format's description alone, and lies about them that are malformed by
construction. A liar signs what it forges, so that its message gets past the digest."""
import copy
import hashlib
import json
import random
import struct
from dataclasses import dataclass, replace

import torch
from tiny import adapter

from flora.adapter import Adapter, fresh_adapters
from flora.frames import frame
from flora.messages import Broadcast, Limits, Update, encode

WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
NOT_FINITE = {"F64": ["000000000000f07f", "000000000000f0ff", "010000000000f87f"], "F32": ["0000807f", "000080ff", "0000c07f"],
              "BF16": ["807f", "80ff", "c07f"], "F16": ["007c", "00fc", "007e"], "F8_E4M3": ["7f", "ff"],
              "F8_E5M2": ["7c", "fc", "7e"]}
SHAPES = {"a.q": (13, 7), "a.v": (5, 11)}
LIMITS = Limits(max_bytes=1 << 20, max_header_bytes=1 << 16, max_decoded_bytes=1 << 16, max_layers=4, max_rank=16,
                max_total_rank=24, max_examples=1000, max_metrics=4, max_name=40, max_frame_bytes=1 << 16, max_frame_work=1 << 20)


def split(raw):
    """(header as a dict, flora's fields as a dict, tensor bytes)."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    return header, json.loads(header["__metadata__"]["flora"]), raw[8 + size:]


def text_of(header):
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def framed(text, body):
    return struct.pack("<Q", len(text)) + text + body


def signed(header, fields, body):
    """The fields with the digest that a liar would compute."""
    table = {name: entry for name, entry in header.items() if name != "__metadata__"}
    fields = {k: v for k, v in fields.items() if k != "digest"}
    return {**fields, "digest": hashlib.sha256(json.dumps([fields, table], sort_keys=True).encode() + body).hexdigest()}


def join(header, fields, body, sign=True):
    """A message of these parts; sign: with the digest that a liar would compute."""
    table = {name: entry for name, entry in header.items() if name != "__metadata__"}
    fields = signed(header, fields, body) if sign else fields
    return framed(text_of({"__metadata__": {"flora": json.dumps(fields, sort_keys=True)}, **table}), body)


@dataclass
class Forged:
    """A message in parts that may be changed: fields, tensors as [dtype, shape, bytes] by name, and how it is decoded."""
    fields: dict
    tensors: dict
    options: dict

    @classmethod
    def of(cls, raw, options):
        header, fields, body = split(raw)
        header.pop("__metadata__")
        fields.pop("digest")
        return cls(fields, {name: [e["dtype"], e["shape"], body[slice(*e["data_offsets"])]] for name, e in header.items()},
                   dict(options))

    def parts(self):
        """(header, fields, body), every tensor after the one before."""
        header, offset = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        return header, self.fields, b"".join(data for _, _, data in self.tensors.values())

    def raw(self):
        return join(*self.parts())

    def copy(self):
        return Forged(copy.deepcopy(self.fields), copy.deepcopy(self.tensors), dict(self.options))


def forged_seeds():
    """(name, bytes, how they are decoded): every kind of message that encode makes, small."""
    start = {n: adapter(4, s) for n, s in SHAPES.items()}
    given = Broadcast(start=start, version=3, run="r")
    learnt = {n: Adapter(a.A, a.B + 1, a.scale) for n, a in start.items()}
    seed = {n: Adapter(torch.zeros(4, s[1]), frame(s, 4, 9, n)[1], 1.0) for n, s in SHAPES.items()}
    cores = Broadcast(start=seed, version=3, run="r", train="core", frame=9)
    draw = torch.Generator().manual_seed(1)
    moved = {n: Adapter(torch.randn(4, 4, generator=draw) @ frame(s, 4, 9, n)[0], seed[n].B, seed[n].scale)
             for n, s in SHAPES.items()}
    eight = {n: Adapter(a.A.to(torch.float8_e4m3fn), a.B.to(torch.float8_e5m2), a.scale) for n, a in start.items()}
    half = {n: Adapter(a.A.bfloat16(), a.B.half(), a.scale) for n, a in start.items()}
    dense = {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}
    one = {"a.q": start["a.q"]}
    up = {"version": 3, "kind": "update"}
    down = {"version": 4, "kind": "broadcast"}
    facts = (7, {"loss": 0.5, "tokens": 3}, 3, "zoé")
    made = [("update", Update(start, *facts), None, up), ("fresh", Update(fresh_adapters(SHAPES, 3, 6.0, 0), *facts), None, up),
            ("held", Update(learnt, *facts), given, up), ("cores", Update(moved, *facts), cores, up),
            ("eight", Update(eight, *facts), None, up), ("half", Update(half, *facts), None, up),
            ("double", Update({n: a.to(torch.float64) for n, a in start.items()}, *facts), None, up),
            ("full", Update({}, *facts, dense), None, up),
            ("both", Broadcast({n: adapter(6, s) for n, s in SHAPES.items()}, start, 4, "B", "r", 2), None, down),
            ("next", Broadcast(start=learnt, version=4, run="r"), given, down),
            ("framed", replace(cores, start=moved, version=4), None, down),
            ("dense", Broadcast(one, start, 4, base={"a.v": dense["a.v"]}), None, down),
            ("empty", Broadcast(version=4), None, down)]
    return [(name, encode(message, before), {"expected": SHAPES, "limits": LIMITS, "given": before, **how})
            for name, message, before, how in made]


def number_at(data, dtype, index, hexed):
    """The bytes with one number replaced."""
    width = WIDTH[dtype]
    at = index % (len(data) // width) * width
    return data[:at] + bytes.fromhex(hexed) + data[at + width:]


def bomb(rng):
    """Brackets in brackets, up to what the header may hold."""
    depth, out = rng.choice([4, 60, 900, 3000]), []
    for _ in range(depth):
        out = [out] if rng.random() < 0.9 or depth > 60 else {"a": out}
    return out


def spelt(value):
    """JSON of a value however deep, which json.dumps would refuse."""
    try:
        return json.dumps(value)
    except RecursionError:
        depth = 0
        while value:
            value, depth = value[0], depth + 1
        return "[" * (depth + 1) + "]" * (depth + 1)


def rng_of(*parts):
    return random.Random(repr(parts))
