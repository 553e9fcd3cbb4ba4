"""Malformed messages, by what they say of factors that do not travel: each function takes a random source and a sound message
in parts (forge.py), and gives bytes that no receiver may accept, or None where it has nothing to say of that kind of message."""
from dataclasses import replace

from flora.adapter import truncate


def first(m):
    """Where the factors of a.q are that travel as such: "part/a.q/"; None where there are none."""
    return next((f"{part}/a.q/" for part, layers in m.fields["parts"].items() if "a.q" in layers and not m.fields["cores"]), None)


def claimed(rng, m, claims):
    """A claim of zeros in the place of a factor."""
    if first(m) is None:
        return None
    m.fields["zeros"][first(m) + rng.choice("AB")] = rng.choice(claims)
    return m.raw()


def zeros_malformed(rng, m):
    return claimed(rng, m, [[13, 3], [13, 3, "F32", 1], "x", "abc", None, 0, {}, []])


def zeros_of_no_dtype(rng, m):
    return claimed(rng, m, [[13, 3, "I8"], [13, 3, None], [13, 3, ["F32"]], [13, 3, {}], [1 << 62, 3, 0]])


def zeros_of_no_shape(rng, m):
    return claimed(rng, m, [[0, 3, "F32"], [0, 1 << 70, "F32"], [-13, -3, "F32"], [13, True, "F32"], [13.0, 3.0, "F32"],
                            [[13], [3], "F32"], [10**300, 1, "F32"], [1 << 70, 1, "F32"], [None, 4, "F32"], ["13", 4, "F32"]])


def zeros_too_large(rng, m):
    return claimed(rng, m, [[1 << 40, 3, "F32"], [1 << 61, 1 << 61, "F64"], [1 << 14, 3, "F32"], [3, 1 << 16, "F8_E5M2"]])


def not_listed(rng, m):
    """Zeros, held factors and cores of what no part lists, or of what travels in another way."""
    where = rng.choice(["adapters/x/A", "start/a.q", "", "base/a.q", "merge/a.k/B"])
    how = rng.choice(["zeros", "held", "cores"])
    if how == "held":
        held = m.fields["held"]
        held += rng.choice([[where], held[:1] or ["x", "x"], ["start/a.q/scale"]])
    else:
        m.fields[how][where] = [13, 4, "F32"] if how == "zeros" else [13, 7]
    return m.raw()


def held_twice(rng, m):
    held = m.fields["held"]
    held += [rng.choice(held)] if held else ["x", "x"]
    return m.raw()


def held_malformed(rng, m):
    m.fields["held"] += rng.choice([[3], [["adapters/a.q/A"]], [None], [{}], [1.5], [True]])
    return m.raw()


def held_by_nobody(rng, m):
    """A factor said to be held, of a receiver that was given nothing, or less."""
    where = first(m)
    if where is None:
        return None
    name = where + rng.choice("AB")
    m.tensors.pop(name, None)
    m.fields["zeros"].pop(name, None)
    m.fields["held"] = [n for n in m.fields["held"] if n != name] + [name]
    given = m.options["given"]
    shorter = given and {layer: truncate(a, 2) for layer, a in given.start.items()}
    m.options["given"] = rng.choice([None, *(given and replace(given, start=start) for start in (None, {}, shorter))])
    return m.raw()


def cores_malformed(rng, m):
    where = first(m) or next(iter(m.fields["cores"]), None)
    if where is None:
        return None
    m.fields["cores"][where] = rng.choice([[13], [13, 7, 1], [-13, -7], [0, 7], [13, True], [1 << 70, 1], None, "13", 13, {},
                                           [13.0, 7.0], [[13], 7], []])
    return m.raw()


def cores_of_another_shape(rng, m):
    where = next(iter(m.fields["cores"]), None)
    if where is None:
        return None
    m.fields["cores"][where] = rng.choice([[1 << 40, 3], [2, 2], [7, 13], [13, 8]])
    return m.raw()


def cores_of_no_frame(rng, m):
    """An update's cores, of a receiver that was not told the frame."""
    if m.fields["kind"] != "update" or not m.fields["cores"]:
        return None
    m.fields["given"] = m.options["given"] = None
    return m.raw()
