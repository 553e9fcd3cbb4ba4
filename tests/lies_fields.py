"""Malformed messages, by their fields: each function takes a random source and a sound message in parts (forge.py), and gives
bytes that no receiver may accept, or None where it has nothing to say of that kind of message."""
import json

from forge import LIMITS, bomb, framed, join, spelt

ODD_NAMES = ["\x00", "a\nb", "\x1b[2J", "\ud800", "x\udfff", "safe\u202etxt", "\u2066a", "\u2028", "\x7f", "\u0085"]
NOT_INTEGERS = [True, False, 1.0, "1", None, [], {}, [1]]


def nested(rng, m):
    header, fields, body = m.parts()
    deep = spelt(bomb(rng))
    if rng.random() < 0.3:
        whole = [deep.encode(), b"[" * 60_000, b'{"a":' * 10_000, b'{"__metadata__":' + deep.encode() + b"}"]
        return framed(rng.choice(whole), body)
    if rng.random() < 0.5 and header:
        header[rng.choice([*header])][rng.choice(["dtype", "shape", "data_offsets"])] = bomb(rng)
    else:
        fields[rng.choice([*fields])] = bomb(rng)
    try:
        return join(header, fields, body)
    except RecursionError:
        inner = json.dumps('{"format": 1, "x": ' + deep + "}")
        return framed(('{"__metadata__": {"flora": ' + inner + "}}").encode(), body)


def fields_lie(rng, m):
    """A field that is missing, unknown, or of another type."""
    name = rng.choice([*m.fields])
    how = rng.choice(["missing", "unknown", "type", "swap"])
    if how == "missing" and not (name == "base" and m.fields["kind"] == "update"):
        del m.fields[name]
    elif how in ("unknown", "missing"):
        m.fields[rng.choice(["more", "Format", "pаrts", "", "__class__"])] = rng.choice([None, 1, [], "x"])
    elif how == "type":
        m.fields[name] = 1.5
    else:
        others = ["broadcast", "Update", "", 1, None, ["update"]] if m.fields["kind"] == "update" else ["update"]
        m.fields["kind"] = rng.choice(others)
    return m.raw()


def format_lie(rng, m):
    m.fields["format"] = rng.choice([0, 2, -1, True, 1.0, "1", None, [1], 10**30])
    return m.raw()


def parts_lie(rng, m):
    m.fields["parts"] = rng.choice([
        {**m.fields["parts"], "more": []}, {"base": []}, {"": []}, [], {"adapters": "a.q"}, {"merge": 3}, {"adapters": [["a.q"]]},
        {"start": None, "merge": {}}, {"adapters": [None]}, {"merge": [1]}])
    return m.raw()


def names_lie(rng, m):
    odd = rng.choice(ODD_NAMES)
    if m.fields["kind"] == "update" and rng.random() < 0.5:
        m.fields["metrics"] = {odd: 1.0}
    else:
        m.fields["client" if m.fields["kind"] == "update" else "run"] = odd
    return m.raw()


def long_names(rng, m):
    long = rng.choice("aé漢") * (LIMITS.max_name + rng.randrange(1, 100))
    if m.fields["kind"] == "update" and rng.random() < 0.5:
        m.fields["metrics"] = {long: 1.0}
    else:
        m.fields["client" if m.fields["kind"] == "update" else "run"] = long
    return m.raw()


def counts_lie(rng, m):
    if m.fields["kind"] != "update":
        return None
    m.fields["num_examples"] = rng.choice([0, -1, True, 1.0, "5", None, LIMITS.max_examples + 1, 10**400, -(10**4000), [], {}, [5],
                                           float("nan"), float("inf"), 1e300, -0.0, False])
    return m.raw()


def versions_lie(rng, m):
    """Another version than the receiver's."""
    m.fields["base_version" if m.fields["kind"] == "update" else "version"] = rng.choice([0, 2, 5, 1 << 40])
    if m.fields.get("since"):
        m.fields["since"] = None
    return m.raw()


def integers_lie(rng, m):
    name = rng.choice(["base_version"] if m.fields["kind"] == "update" else ["version", "since", "frame"])
    lies = [-1, -(1 << 62), (1 << 62) + 1, 10**4000, *NOT_INTEGERS]
    lies = [1 << 63 | 1, -(1 << 64), *NOT_INTEGERS] if name == "frame" else lies
    m.fields[name] = rng.choice([lie for lie in lies if not (name == "since" and lie is None)])
    return m.raw()


def since_lie(rng, m):
    if m.fields["kind"] == "update":
        return None
    m.fields["since"] = m.fields["version"] + rng.choice([0, 1, 100])
    return m.raw()


def given_lie(rng, m):
    """A broadcast that the receiver does not hold, or none where one is needed."""
    if m.fields["given"] is not None and rng.random() < 0.5:
        m.options["given"] = None
    else:
        m.fields["given"] = rng.choice([["r", 2], ["s", 3], [], ["r"], ["r", 3, 0], [3, "r"], [None, None]])
    return m.raw()


def metrics_lie(rng, m):
    if m.fields["kind"] != "update":
        return None
    m.fields["metrics"] = {"loss": rng.choice([float("nan"), float("inf"), -float("inf"), True, None, "1", [], {}, [1.0], 10**400])}
    return m.raw()


def many_metrics(rng, m):
    if m.fields["kind"] != "update":
        return None
    m.fields["metrics"] = {f"m{i}": i for i in range(LIMITS.max_metrics + rng.randrange(1, 300))}
    return m.raw()


def train_lie(rng, m):
    if m.fields["kind"] == "update":
        return None
    m.fields["train"] = rng.choice(["BA", "", "ab", "weights", "A\u200b", 1, None, ["AB"]])
    return m.raw()


def many_layers(rng, m):
    part = rng.choice(["adapters"] if m.fields["kind"] == "update" else ["merge", "start"])
    m.fields["parts"][part] = [f"l{i}" for i in range(LIMITS.max_layers + rng.randrange(1, 200))]
    return m.raw()
