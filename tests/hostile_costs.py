"""Hostile messages, each decoded in a process of its own whose memory may grow by so much: prints a line of JSON for each.

A fork starts with the high-water mark at what it holds, so the growth of the mark is what this one message cost.
"""
import json
import os
import resource
import struct
import sys

import torch
from forge import Forged, framed, join, split
from tiny import adapter

from flora.errors import MessageError
from flora.frames import frame
from flora.messages import Broadcast, Limits, Update, decode, encode

MB = 1_000_000
SECONDS = 25                                                     # of the processor: a quadratic reader takes minutes for these


def sound_update(shape=(3, 4), rank=2):
    return encode(Update({"l": adapter(rank, shape)}, 5))


def header_of(unit, last, size):
    """A header of one JSON list of this element, of about so many bytes."""
    text = b"[" + unit * (size // len(unit)) + last + b"]"
    return framed(text + b" " * (-len(text) % 8), b"")


def field_of(name, value):
    header, fields, body = split(sound_update())
    return join(header, {**fields, name: value}, body)


def many(count, held):
    """An update of so many layers, of which factors are zeros or held."""
    m = Forged.of(sound_update((1, 1), 1), {})
    layers = [f"layer{i:06}" for i in range(count)]
    m.tensors = {f"adapters/{n}/scale": ["F32", [1], struct.pack("<f", 1)] for n in layers}
    names = [f"adapters/{n}/{f}" for n in layers for f in "AB"]
    m.fields |= {"parts": {"adapters": layers}, "held": names[::-1] if held else [],
                 "zeros": {} if held else {n: [1, 1, "F32"] for n in names}, "given": ["r", 0] if held else None}
    return m.raw()


def eight_bits(size):
    """One 8-bit factor of so many bytes, its last number NaN."""
    m = Forged.of(sound_update(), {})
    m.tensors["adapters/l/A"] = ["F8_E4M3", [2, size // 2], bytes(size - 1) + b"\x7f"]
    return m.raw()


def zeros(rows, columns):
    m = Forged.of(sound_update(), {})
    del m.tensors["adapters/l/B"]
    m.fields["zeros"] = {"adapters/l/B": [rows, columns, "F32"]}
    return m.raw()


def cores(rank, sides):
    """A broadcast of one core of zeros, of this rank, for a layer of these sides."""
    m = Forged.of(encode(Broadcast(start={"l": adapter(rank, (rank, rank))}, train="core", frame=7), whole=True), {})
    m.tensors = {"start/l/scale": ["F32", [rank], struct.pack("<f", 1) * rank]}
    m.fields["cores"] = {"start/l/": list(sides)}
    return m.raw()


def messages():
    """(name, bytes, options of decode)."""
    small = Limits(max_decoded_bytes=MB, max_frame_bytes=MB)
    one = adapter(1, (1, 1))
    held = Broadcast(start={f"layer{i:06}": one for i in range(40_000)}, run="r")
    return [
        ("brackets", header_of(b"[],", b"[]", 2 * MB), {}),
        ("objects", header_of(b"{},", b"{}", 2 * MB), {}),
        ("numbers", header_of(b"1.5,", b"1.5", 2 * MB), {}),
        ("nested", framed(b"[" * (4 * MB), b""), {}),
        ("nested fields", framed(b'{"__metadata__":{"flora":"' + b"[" * (4 * MB) + b'"}}', b""), {}),
        ("metrics", field_of("metrics", {f"m{i}": 1 for i in range(200_000)}), {}),
        ("held", field_of("held", [f"m{i}" for i in range(200_000)]), {}),
        ("held often", field_of("held", ["adapters/l/A"] * 200_000), {}),
        ("layers", field_of("parts", {"adapters": [f"m{i}" for i in range(200_000)]}), {}),
        ("long name", field_of("client", "x" * (4 * MB)), {}),
        ("digits", field_of("num_examples", 10**4200), {}),
        ("length", struct.pack("<Q", 1 << 62) + b"{}", {}),
        ("header of 16 MB", framed(b" " * (20 * MB), b""), {}),
        ("all zeros, sound", many(10_000, False), {}),
        ("all held, sound", many(40_000, True), {"given": held}),
        ("8 bits and a NaN", eight_bits(32 * MB), {}),
        ("zeros of terabytes", zeros(1 << 40, 2), {}),
        ("zeros of a gigabyte", zeros(1 << 27, 2), {"limits": small}),
        ("zeros of a gigabyte, within", zeros(1 << 27, 2), {}),
        ("frames of gigabytes", cores(1000, (1 << 20, 1 << 20)), {}),
        ("frames of minutes", cores(11_000, (11_000, 11_000)), {}),
        ("frames over a small limit", cores(64, (4096, 4096)), {"limits": small}),
        ("dimensions", join(*with_shape([1 << 62, 1 << 62])), {})]


def with_shape(shape):
    header, fields, body = split(sound_update())
    header["adapters/l/A"]["shape"] = shape
    return header, fields, body


def cost(raw, options, out):
    """Decodes in this process, which then ends; writes what happened, in bytes and in seconds of the processor."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        decode(raw, **options)
        said = "accepted"
    except MessageError as error:
        said = type(error).__name__
    after = resource.getrusage(resource.RUSAGE_SELF)
    os.write(out, json.dumps([said, (after.ru_maxrss - before.ru_maxrss) * 1024, after.ru_utime - before.ru_utime]).encode())


def main():
    torch.set_num_threads(1)
    frame((3, 4), 2, 0, "warm")
    decode(sound_update())
    for name, raw, *options in messages():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                cost(raw, options[0] if options else {}, write)
            finally:
                os._exit(0)
        os.close(write)
        said = os.read(read, 1 << 16)
        os.close(read)
        _, status = os.waitpid(child, 0)
        length = struct.unpack("<Q", raw[:8])[0]
        header = length if length < len(raw) else 0
        print(json.dumps([name, len(raw), header, status, *(json.loads(said) if said else ("died", 0, 0))]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
