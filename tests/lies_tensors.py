"""Malformed messages, by their tensors: each function takes a random source and a sound message in parts (forge.py), and gives
bytes that no receiver may accept, or None where it has nothing to say of that kind of message."""
import math
import struct
from dataclasses import replace

from forge import LIMITS, NOT_FINITE, SHAPES, WIDTH, join, number_at


def some(rng, m, *endings):
    """The name of a tensor, of these factors where they are given; None where the message has none."""
    names = [n for n in m.tensors if not endings or n.rsplit("/", 1)[-1] in endings]
    return rng.choice(names) if names else None


def dtype_lie(rng, m):
    header, fields, body = m.parts()
    name = some(rng, m)
    if name is None:
        return None
    header[name]["dtype"] = rng.choice(["I64", "I32", "I8", "U8", "BOOL", "C64", "F4", "f32", "float32", "", None, 4, ["F32"], {}])
    return join(header, fields, body)


def dtype_of_scale(rng, m):
    """A scale or core of a dtype that factors may have, and it may not."""
    name = some(rng, m, "scale", "core")
    if name is None:
        return None
    _, shape, data = m.tensors[name]
    dtype = rng.choice([d for d in WIDTH if d != "F32"])
    m.tensors[name] = [dtype, shape, bytes(len(data) // 4 * WIDTH[dtype])]
    return m.raw()


def dtype_refused(rng, m):
    """A dtype that this receiver does not take, of a tensor or of zeros."""
    used = sorted({d for d, _, _ in m.tensors.values()} | {claim[2] for claim in m.fields["zeros"].values()})
    if not used:
        return None
    out = rng.choice(used)
    m.options["limits"] = replace(LIMITS, dtypes=tuple(d for d in WIDTH if d != out))
    return m.raw()


def shape_lie(rng, m):
    """A shape that is none, with the bytes as they are."""
    name = some(rng, m)
    if name is None:
        return None
    header, fields, body = m.parts()
    n = header[name]["shape"][0]
    header[name]["shape"] = rng.choice([[1 << 62, 4], [1 << 33, 1 << 33], [1 << 31, 1 << 32, 2], [-n, -1], [0, n], [0], [],
                                        [n, True], [float(n)], None, "nn", [[n]], [1 << 64], [10**300, 10**300], [n, 1, 1], {}])
    return join(header, fields, body)


def shape_of_layer(rng, m):
    """A factor, core or weight with a row, a column or a rank too many or too few, well formed otherwise."""
    name = some(rng, m)
    if name is None:
        return None
    dtype, shape, data = m.tensors[name]
    shape = list(shape)
    at = rng.randrange(len(shape))
    shape[at] += rng.choice([1, -1]) if shape[at] > 1 else 1
    if rng.random() < 0.3 and len(shape) == 2 and shape[0] != shape[1] and name.endswith(("/A", "/B")):
        shape = m.tensors[name][1][::-1]
    m.tensors[name] = [dtype, shape, (data * 2)[:math.prod(shape) * WIDTH[dtype]]]
    return m.raw()


def three_dimensions(rng, m):
    name = some(rng, m)
    if name is None:
        return None
    m.tensors[name][1] = rng.choice([[*m.tensors[name][1], 1], [1, 1, *m.tensors[name][1]], [1, *m.tensors[name][1]]])
    return m.raw()


def flat(rng, m):
    """A matrix as a vector."""
    name = some(rng, m, "A", "B", "core") or next((n for n in m.tensors if n.startswith("base/")), None)
    if name is None:
        return None
    m.tensors[name][1] = [math.prod(m.tensors[name][1])]
    return m.raw()


def not_finite(rng, m):
    name = some(rng, m)
    if name is None:
        return None
    dtype, _, data = m.tensors[name]
    m.tensors[name][2] = number_at(data, dtype, rng.randrange(1 << 20), rng.choice(NOT_FINITE[dtype]))
    return m.raw()


def product_overflows(rng, m):
    """Finite numbers of which ΔW is not finite in fp32, or fp64 weights above it."""
    big = {"F32": "ffff7f7f", "BF16": "7f7f", "F64": "ffffffffffffef7f"}
    names = [n for n in m.tensors if m.tensors[n][0] in big and not n.endswith("scale")]
    if not names:
        return None
    name = rng.choice(names)
    dtype, shape, data = m.tensors[name]
    if name.startswith("base/"):
        m.tensors[name] = ["F64", shape, bytes.fromhex(big["F64"]) * (len(data) // WIDTH[dtype])]
        return m.raw()
    layer = name.rsplit("/", 1)[0]
    if any(z.startswith(layer + "/") for z in m.fields["zeros"]):
        return None
    for other in (name, layer + "/scale"):
        dtype, shape, data = m.tensors[other]
        m.tensors[other][2] = bytes.fromhex(big[dtype]) * (len(data) // WIDTH[dtype])
    return m.raw()


def unexpected(rng, m):
    """Layers that are not the model's: unknown, or names that look like them."""
    layer = rng.choice([*SHAPES])
    if not any(layer in layers for layers in [*m.fields["parts"].values(), m.fields.get("base") or []]):
        return None
    trick = rng.choice(["a.k", "а" + layer[1:], layer + "\u200b", layer.upper(), "\ufeff" + layer, layer + "/", "", " " + layer,
                        layer.replace(".", "\u2024"), layer + "\u0301"])
    def renamed(name):
        return trick if name == layer else "/".join(trick if p == layer else p for p in name.split("/"))
    m.tensors = {renamed(n): t for n, t in m.tensors.items()}
    f = m.fields
    f["parts"] = {part: [renamed(n) for n in layers] for part, layers in f["parts"].items()}
    f["zeros"], f["cores"] = ({renamed(n): v for n, v in f[k].items()} for k in ("zeros", "cores"))
    f["held"] = [renamed(n) for n in f["held"]]
    if f.get("base"):
        f["base"] = [renamed(n) for n in f["base"]]
    return m.raw()


def listed_wrong(rng, m):
    """The list of layers and the tensors do not agree."""
    f, names = m.fields, [*m.tensors]
    how = rng.choice(["twice", "unlisted", "lacking", "extra", "nobody"])
    lists = [layers for layers in [*f["parts"].values(), f.get("base")] if layers]
    if how == "extra" or not lists or not names:
        m.tensors[rng.choice(["adapters/a.q/C", "merge/x/A", "x", "base/z", "adapters/a.q/A "])] = ["F32", [1], b"\0" * 4]
    elif how == "twice":
        layers = rng.choice(lists)
        layers.append(rng.choice(layers))
    elif how == "unlisted":
        layers = rng.choice(lists)
        layers.pop(rng.randrange(len(layers)))
    elif how == "lacking":
        del m.tensors[rng.choice([n for n in names if not n.endswith("/core")])]        # without one, the core is zeros
    else:
        for layers in lists:
            layers[:] = []
    return m.raw()


def core_of_another_rank(rng, m):
    """A core well formed for a rank that nobody sent, or whose scale has that rank."""
    where = next(iter(m.fields["cores"]), None)
    if where is None:
        return None
    rank = rng.choice([1, 2, 3, 5, 6, 15])
    m.tensors[where + "scale"] = ["F32", [rank], struct.pack("<f", 1.0) * rank]
    if m.fields["kind"] == "update":
        m.tensors[where + "core"] = ["F32", [rank, rank], struct.pack("<f", 1.0) * rank**2]
    else:
        m.tensors[where + "core"] = ["F32", [4, 4], struct.pack("<f", 1.0) * 16]
    return m.raw()


def base_lie(rng, m):
    """Dense weights: none, of a layer that is merged too, not a list, not there."""
    if m.fields.get("base") is None:
        return None
    had = m.fields["base"]
    m.fields["base"] = rng.choice([[], [*had, "a.q", "a.v"], "a.v", {}, 3, [had], [*had, had[0]], had[:-1], [*had, None]])
    return m.raw()


def ranks_over(rng, m):
    """Sound adapters of more ranks than the limits allow, in one layer or in all."""
    part = "adapters" if m.fields["kind"] == "update" else "merge"
    total = rng.random() < 0.5
    ranks = {"a.q": 13, "a.v": 12} if total else {rng.choice([*SHAPES]): LIMITS.max_rank + rng.randrange(1, 9)}
    tensors = {}
    for layer, rank in ranks.items():
        out, inn = SHAPES[layer]
        for name, shape in (("scale", [rank]), ("A", [rank, inn]), ("B", [out, rank])):
            tensors[f"{part}/{layer}/{name}"] = ["F32", shape, struct.pack("<f", 1.0) * math.prod(shape)]
    m.tensors = tensors
    m.fields = {**m.fields, "parts": {part: [*ranks]}, "zeros": {}, "held": [], "cores": {}, "given": None}
    if "base" in m.fields:
        m.fields["base"] = None
        if m.fields["kind"] == "update":
            del m.fields["base"]
    return m.raw()


def entry_lie(rng, m):
    """An entry of the table with something more, with something less, or that is none."""
    name = some(rng, m)
    if name is None:
        return None
    header, fields, body = m.parts()
    how = rng.choice(["more", "less", "none"])
    if how == "more":
        header[name][rng.choice(["x", "", "offset"])] = rng.choice([None, 1, []])
    elif how == "less":
        del header[name][rng.choice([*header[name]])]
    else:
        header[name] = rng.choice([None, 1, [], "F32", [["dtype", "F32"]]])
    return join(header, fields, body)


def out_of_order(rng, m):
    """The tensors where they are, the table in another order."""
    header, fields, body = m.parts()
    names = [*header]
    rng.shuffle(names)
    return None if names == [*header] else join({n: header[n] for n in names}, fields, body)
