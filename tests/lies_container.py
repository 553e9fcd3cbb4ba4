"""Malformed messages, by their container: each function takes a random source and a sound message in parts (forge.py), and gives
bytes that no receiver may accept, or None where it has nothing to say of that kind of message."""
import json
import struct

from forge import LIMITS, framed, join, signed, text_of


def truncated(rng, m):
    raw = m.raw()
    return raw[:rng.randrange(len(raw))] if rng.random() < 0.5 else raw[rng.randrange(1, len(raw)):]


def extended(rng, m):
    return m.raw() + rng.randbytes(rng.randrange(1, 64))


def flipped(rng, m):
    raw = bytearray(m.raw())
    for at in rng.sample(range(8 * len(raw)), rng.randrange(1, 4)):
        raw[at // 8] ^= 1 << at % 8
    return bytes(raw)


def moved(rng, m):
    """Two different blocks of the tensors change places."""
    header, fields, body = m.parts()
    a, b = sorted(rng.sample(range(len(body) // 4), 2)) if len(body) > 8 else (0, 0)
    other = bytearray(body)
    other[4 * a:4 * a + 4], other[4 * b:4 * b + 4] = body[4 * b:4 * b + 4], body[4 * a:4 * a + 4]
    return None if bytes(other) == body else join(header, signed(header, fields, body), bytes(other), sign=False)


def random_bytes(rng, m):
    raw = rng.randbytes(rng.randrange(400))
    return rng.choice([raw, struct.pack("<Q", len(raw)) + raw, m.raw()[:8] + raw, framed(text_of({"__metadata__": {}}), raw)])


def header_length(rng, m):
    raw = m.raw()
    lie = rng.choice([0, 1, len(raw), len(raw) - 7, 1 << 40, (1 << 63) + 8, (1 << 64) - 1, rng.randrange(1 << 64)])
    return None if lie == struct.unpack("<Q", raw[:8])[0] else struct.pack("<Q", lie) + raw[8:]


def too_many_bytes(rng, m):
    return bytes(LIMITS.max_bytes + 1) if rng.random() < 0.1 else framed(b" " * (LIMITS.max_header_bytes + 8), b"")


def digest_lie(rng, m):
    header, fields, body = m.parts()
    lie = rng.choice(["", "0" * 64, signed(header, fields, body)["digest"].upper(), 0, None, ["a"], {}])
    return join(header, {**fields, "digest": lie}, body, sign=False)


def spelt_otherwise(rng, m):
    """The same values and the right digest, other characters."""
    header, fields, body = m.parts()
    own = signed(header, fields, body)
    inner = rng.choice([json.dumps(own), json.dumps(own, sort_keys=True, indent=0), json.dumps(own, sort_keys=True) + " ",
                        json.dumps(own, sort_keys=True, separators=(",", ":")), json.dumps(own, sort_keys=True)])
    outer = {"__metadata__": {"flora": inner}, **header}
    text = rng.choice([json.dumps(outer), json.dumps(outer, separators=(",", ":")), json.dumps(outer, ensure_ascii=False),
                       json.dumps({**header, "__metadata__": outer["__metadata__"]}),
                       json.dumps({**outer, "__metadata__": {**outer["__metadata__"], "format": "pt"}})]).encode()
    text = rng.choice([text, b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b" " + text])
    text += b" " * (-len(text) % 8 + rng.choice([0, 8, 4096]))
    right = text_of({"__metadata__": {"flora": json.dumps(own, sort_keys=True)}, **header})
    return None if text == right else framed(text, body)


def twice(rng, m):
    """A key that comes twice in the header, in an entry or in the fields."""
    header, fields, body = m.parts()
    text = text_of({"__metadata__": {"flora": json.dumps(signed(header, fields, body), sort_keys=True)}, **header}).rstrip()
    where = [b'"__metadata__": {', b'"dtype": "', b'{\\"client\\": ', b'{\\"base\\": ', b'\\"parts\\": {']
    at = rng.choice([w for w in where if w in text])
    key = {where[0]: b'"__metadata__": 0, ', where[1]: b'"dtype": "F32", ', where[2]: b'{\\"client\\": 1, \\"client\\": ',
           where[3]: b'{\\"base\\": 1, \\"base\\": ', where[4]: b'\\"parts\\": 1, '}[at]
    text = text.replace(at, key if at in where[2:4] else key + at, 1)
    return framed(text + b" " * (-len(text) % 8), body)


def offsets_lie(rng, m):
    header, fields, body = m.parts()
    if not header:
        return None
    entry = header[rng.choice([*header])]
    start, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice([
        [start + 4, end + 4], [start - 4, end], [start, end + 8], [start, end - 1], [end, start], [-8, end], [start], [], None,
        "ab", [start, end, end], [1 << 64, 1 << 65], [start, start], [str(start), str(end)]])
    return join(header, fields, body)


def gap(rng, m):
    """Bytes of no tensor: between two, or at the end."""
    header, fields, body = m.parts()
    entries = [*header.values()]
    at = rng.randrange(len(entries) + 1)
    cut = entries[at]["data_offsets"][0] if at < len(entries) else len(body)
    for entry in entries[at:]:
        entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]
    return join(header, fields, body[:cut] + b"\0" * 8 + body[cut:])


def header_lie(rng, m):
    """A header that is no object, or has no fields of ours."""
    header, fields, body = m.parts()
    own = json.dumps(signed(header, fields, body), sort_keys=True)
    meta = rng.choice([None, [], "x", {}, {"flora": None}, {"flora": fields}, {"Flora": own}, {"flora": [own]}])
    return framed(text_of(rng.choice([[], "x", None, 1, header, {**header, "__metadata__": meta}])), body)
