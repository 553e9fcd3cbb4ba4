"""Coverage-guided fuzzing of flora.messages.decode: `make fuzz`, or python tests/fuzz/fuzz_messages.py [corpus] [-runs=N ...].

The corpus starts from what encode makes. Three of four inputs are signed again after they are changed, so that they get past the
digest; half of these are changed in their parts (a field, a tensor's entry), where a bit flip would only break the spelling.
A run fails where decode raises anything but MessageError, or where what it accepts is not what its limits promise, by a check of
its own that shares no code with the reader.
"""
import json
import random
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

with atheris.instrument_imports(include=["flora.messages", "flora.wire", "flora.reading", "flora.exchange"]):
    from flora.errors import MessageError
    from flora.messages import Broadcast, Update, decode, encode

from forge import LIMITS, SHAPES, forged_seeds, join, signed, split  # noqa: E402

VALUES = [None, True, False, 0, 1, -1, 2, 4, 7, 13, 1 << 31, 1 << 62, 1 << 64, 1.0, -0.0, float("nan"), float("inf"), 10**400, "",
          "A", "F32", "F16", "I8", "a.q", "a.v", "update", "broadcast", "core", "\ud800", "\u202e", [], {}, [[]], [13, 7],
          [13, 4, "F32"], [1 << 40, 3, "F32"], ["r", 3], ["a.q"], ["a.q", "a.v"], {"adapters": ["a.q"]}, ["adapters/a.q/A"],
          {"start/a.q/": [13, 7]},
          {"adapters/a.q/B": [13, 4, "F32"]}, {"merge": ["a.q"], "start": ["a.v"]}]
COUNT = {"runs": 0, "accepted": 0}
OPTIONS = [{}]


def nodes(value, at=()):
    """The paths to every value within."""
    found = [at]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += nodes(inner, (*at, key))
    return found


def changed(tree, rng):
    """The tree with one value replaced, removed, or repeated."""
    path = rng.choice(nodes(tree)[1:] or [()])
    if not path:
        return tree
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    how, key = rng.random(), path[-1]
    if how < 0.6:
        holder[key] = rng.choice(VALUES)
    elif how < 0.75:
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[rng.choice(["x", "base", "a.q", "merge/a.q/A", f"{key}2"])] = holder[key]
    return tree


def mutate(data, max_size, seed):
    """A message whose bytes, or whose parts, are changed, and which is signed again."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return atheris.Mutate(data, len(data))
    try:
        header, fields, body = split(data)
        header.pop("__metadata__")
        how = rng.random()
        if how < 0.4:
            fields = changed(fields, rng)
        elif how < 0.7:
            header = changed(header, rng)
        else:
            body = atheris.Mutate(body, max(len(body), 1))
        out = join(header, signed(header, fields, body), body, sign=False)
        return out if len(out) <= max_size else data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError, UnicodeError, OverflowError, OSError):
        return atheris.Mutate(data, len(data))
    except Exception:                                            # struct.error: fewer than eight bytes
        return atheris.Mutate(data, len(data))


def sound(message):
    """Whether an accepted message keeps every promise. It shares no code with the reader."""
    limits, total = LIMITS, 0
    parts = [message.adapters] if isinstance(message, Update) else [message.merge or {}, message.start or {}]
    for adapters in parts:
        assert len(adapters) <= limits.max_layers and sum(len(a.scale) for a in adapters.values()) <= limits.max_total_rank
        for layer, a in adapters.items():
            out, inn = SHAPES[layer]
            rank = len(a.scale)
            assert 1 <= rank <= limits.max_rank and tuple(a.A.shape) == (rank, inn) and tuple(a.B.shape) == (out, rank)
            assert all(bool((t.double().abs() < float("inf")).all()) for t in (a.A, a.B, a.scale))
            assert a.scale.dtype == torch.float32
            assert bool((a.delta().abs() < 3.4e38).all())
            total += sum(t.numel() * t.element_size() for t in (a.A, a.B, a.scale))
    for layer, w in (message.base or {}).items():
        assert tuple(w.shape) == SHAPES[layer] and bool((w.double().abs() < 3.4e38).all())
        total += w.numel() * w.element_size()
    assert total <= limits.max_decoded_bytes
    name = message.client if isinstance(message, Update) else message.run
    assert isinstance(name, str) and len(name) <= limits.max_name and name.encode() is not None
    if isinstance(message, Update):
        assert type(message.num_examples) is int and 1 <= message.num_examples <= limits.max_examples and message.base_version == 3
        assert all(abs(float(v)) < float("inf") and k.encode() is not None for k, v in message.metrics.items())
        assert len(message.metrics) <= limits.max_metrics
    else:
        assert message.version == 4 and message.train in ("AB", "A", "B", "core", "weight")
        assert -(1 << 63) <= message.frame <= 1 << 63
        assert message.since is None or 0 <= message.since < 4


def one(data):
    """Decodes as every seed of this kind is decoded: with nothing given, and with either of the broadcasts that are known."""
    COUNT["runs"] += 1
    if COUNT["runs"] % 20_000 == 0:
        print(json.dumps(COUNT), file=sys.stderr)
    for options in OPTIONS:
        try:
            message = decode(data, **options)
        except MessageError as error:
            COUNT[type(error).__name__] = COUNT.get(type(error).__name__, 0) + 1
            continue
        assert isinstance(message, (Update, Broadcast))
        COUNT["accepted"] += 1
        sound(message)
        encode(message)                                          # whatever is accepted can be sent on


def main():
    """Writes the corpus, fuzzes, and says how many messages were accepted."""
    torch.set_num_threads(1)
    seeds = forged_seeds()
    seen = []
    for _, _, options in seeds:                                  # an update is decoded as an update, a broadcast as a broadcast
        if not any(options["given"] is o["given"] and options["kind"] == o["kind"] for o in seen):
            seen.append(options)
    OPTIONS[:] = seen
    given = [a for a in sys.argv[1:] if not a.startswith("-")]
    corpus = Path(given[0] if given else tempfile.mkdtemp(prefix="flora-fuzz-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for name, raw, _ in seeds:
        (corpus / name).write_bytes(raw)
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    bounds = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], str(corpus), *bounds, *flags], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
