"""The wire: what goes in comes out bit for bit, and whatever else comes raises MessageError and nothing else."""
import json
import struct

import pytest
import safetensors.torch
import torch
from forge import join, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import adapter, same

from flora.adapter import Adapter
from flora.errors import MessageError, MessageSizeError, MessageValueError
from flora.messages import Broadcast, Limits, Update, decode, encode

QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def small_update():
    """Metrics and a name whose JSON has more than one spelling: 1e-05 and 1E-05, é as \\u00e9 and \\u00E9."""
    return Update({"a.0.q": adapter(2, (3, 4))}, 5, {"loss": 1e-05, "x": 2.0}, 3, "zoé")


SMALL = encode(small_update())


def refused(raw, match=None, **options):
    with pytest.raises(MessageError, match=match):
        decode(raw, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_update_comes_back_bit_for_bit(dtype):
    sent = Update({"m.0.q": adapter(8, (24, 16), dtype=dtype), "m.1.v": adapter(1, (8, 16), dtype=dtype)}, 17,
                  {"loss": 1 / 3, "tokens": 4096}, 9, "Zoë / 7")
    got = decode(encode(sent))
    assert isinstance(got, Update) and same(got.adapters, sent.adapters)
    assert got.adapters["m.0.q"].A.dtype == dtype and got.adapters["m.0.q"].scale.dtype == torch.float32
    assert (got.num_examples, got.metrics, got.base_version, got.client) == (17, {"loss": 1 / 3, "tokens": 4096}, 9, "Zoë / 7")


@pytest.mark.parametrize("merge", [None, {}, {"z": adapter(3, (5, 4)), "a": adapter(70, (5, 4))}])
@pytest.mark.parametrize("start", [None, {}, {"z": adapter(2, (5, 4))}])
def test_a_broadcast_comes_back_and_none_stays_none(merge, start):
    sent = Broadcast(merge, start, 4, "B", "run-1")
    got = decode(encode(sent))
    assert (got.version, got.train, got.run) == (4, "B", "run-1")
    for before, after in ((merge, got.merge), (start, got.start)):
        assert (before is None) == (after is None) and same(before or {}, after or {})


def test_the_same_message_has_the_same_bytes_whatever_its_strides():
    one = small_update()
    a = one.adapters["a.0.q"]
    strided = Adapter(torch.stack([a.A, a.A], -1)[..., 0], a.B.T.contiguous().T, a.scale)
    assert not strided.A.is_contiguous()
    assert encode(Update({"a.0.q": strided}, 5, {"x": 2, "loss": 1e-05}, 3, "zoé")) == SMALL
    assert encode(decode(SMALL)) == SMALL


def test_extreme_numbers_keep_their_bits():
    odd = torch.tensor([[-0.0, 1e-45, 3.4e38, 1.17e-38]])
    got = decode(encode(Update({"l": Adapter(odd, torch.full((1, 1), 6e-8).half(), torch.tensor([1e-30]))}, 1))).adapters["l"]
    assert got.A.view(torch.int32).tolist() == odd.view(torch.int32).tolist() and float(got.B) == float(torch.tensor(6e-8).half())


def test_plain_safetensors_reads_a_message(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(SMALL)
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    a = small_update().adapters["a.0.q"]
    assert set(tensors) == {f"adapters/a.0.q/{factor}" for factor in ("A", "B", "scale")}
    assert torch.equal(tensors["adapters/a.0.q/A"], a.A) and torch.equal(tensors["adapters/a.0.q/scale"], a.scale)


def test_join_makes_what_encode_makes():
    """The forger of these tests is right: otherwise every refusal below would be for the digest."""
    assert join(*split(SMALL)) == SMALL


DENSE = Broadcast(start={"l": adapter(1, (2, 2))}, version=5, since=2,
                  base={"a": torch.randn(2, 3), "b": torch.ones(1, 4).bfloat16()})


def test_dense_weights_and_since_come_back():
    got = decode(encode(DENSE), expected={"l": (2, 2), "a": (2, 3), "b": (1, 4)})
    assert (got.since, got.version, list(got.base)) == (2, 5, ["a", "b"])
    assert all(torch.equal(got.base[n], w) and got.base[n].dtype == w.dtype for n, w in DENSE.base.items())
    assert decode(encode(Broadcast())).base is None
    for broadcast in (Broadcast(base={}), Broadcast(base=DENSE.base, merge={"a": adapter(1, (2, 3))})):
        refused(encode(broadcast), "weights of at least one layer, and of none")


def test_dense_weights_that_lie_are_refused():
    header, fields, body = split(encode(DENSE))
    for changes in ({"since": -1}, {"since": "2"}, {"since": True}, {"base": ["a"]}, {"base": ["a", "b", "c"]},
                    {"base": ["a", "a", "b"]}, {"base": 3}, {"base": [["a"]]}):
        refused(join(header, {**fields, **changes}, body))
    refused(encode(Broadcast(base={"a": torch.ones(2)})), "a: a weight")
    for bad in (Broadcast(base={"a": torch.full((2, 3), float("inf"))}), Update({"a": adapter(1, (2, 3)) * float("inf")}, 1),
                Update({}, 1, base={"a": torch.full((2, 3), float("nan"))})):
        with pytest.raises(MessageValueError, match="finite numbers in .*/a"):
            encode(bad)
    with pytest.raises(MessageError, match=r"base/a of a dtype out of .*got torch\.int64"):
        encode(Broadcast(base={"a": torch.ones(2, 3).long()}))
    for expected in ({"b": (2, 3)}, {"a": (3, 2)}):
        with pytest.raises(MessageError, match="expected"):
            decode(encode(Broadcast(base={"a": torch.ones(2, 3)})), expected=expected)


def test_every_changed_byte_is_refused():
    """Every byte of a small message, put to every other value: 150,000 messages."""
    accepted = []
    for i, old in enumerate(SMALL):
        for value in range(256):
            if value == old:
                continue
            try:
                decode(SMALL[:i] + bytes([value]) + SMALL[i + 1:])
            except MessageError:
                continue
            accepted.append((i, old, value))
    assert accepted == []


def test_every_truncation_and_extension_is_refused():
    for stop in range(len(SMALL)):
        refused(SMALL[:stop])
        refused(SMALL[stop:] if stop else b"")
    refused(SMALL + b"\0")
    refused(SMALL + SMALL)


@QUICK
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(raw):
    refused(raw)
    refused(struct.pack("<Q", len(raw)) + raw)


WORD = st.text(max_size=4)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | WORD,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3), max_leaves=6)
ODD = st.sampled_from(["F16", "I64", "BOOL", [1 << 62, 4], [0, 8]])


@QUICK
@given(st.sampled_from(["format", "kind", "num_examples", "base_version", "metrics", "client", "parts", "digest", "new"]), JSON,
       st.booleans())
def test_fields_of_any_json_give_a_message_or_message_error(field, value, sign):
    header, fields, body = split(SMALL)
    try:
        got = decode(join(header, {**fields, field: value}, body, sign))
    except MessageError:
        return
    assert isinstance(got, Update) and type(got.num_examples) is int and got.num_examples >= 1 and isinstance(got.client, str)


@QUICK
@given(st.sampled_from(["adapters/a.0.q/A", "adapters/a.0.q/B", "adapters/a.0.q/scale", "__metadata__", "more"]),
       st.sampled_from(["dtype", "shape", "data_offsets", None]), JSON | ODD)
def test_tensor_tables_of_any_json_give_message_error_or_sound_adapters(name, key, value):
    header, fields, body = split(SMALL)
    entry = header.get(name)
    header = {**header, name: value if key is None or not isinstance(entry, dict) else {**entry, key: value}}
    try:
        got = decode(join(header, fields, body))
    except MessageError:
        return
    assert all(bool(torch.isfinite(t).all()) for a in got.adapters.values() for t in (a.A, a.B, a.scale))


def signed(**changes):
    header, fields, body = split(SMALL)
    return join(header, {**fields, **changes}, body)


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "5", None, 1 << 41, 10**400], ids=str)
def test_num_examples_that_would_sway_the_average_are_refused(count):
    refused(signed(num_examples=count), "num_examples|cannot be read")


def test_fields_that_lie_are_refused():
    refused(signed(format=2), "format 1; got 2")
    refused(signed(kind="upload"), "update or a broadcast")
    refused(signed(base_version=-1), "base_version")
    refused(signed(client=7), "client as text")
    refused(signed(metrics={"loss": float("nan")}), "metric loss")
    refused(signed(metrics={"loss": True}), "metric loss")
    refused(signed(metrics=[1]))
    refused(signed(parts={}), "adapters, which an update has")
    refused(signed(parts={"adapters": ["a.0.q", "a.0.q"]}))
    refused(signed(parts={"adapters": ["a.0.k"]}))
    refused(signed(parts={"adapters": ["a.0.q"], "more": []}), "no parts but adapters")
    header, fields, body = split(encode(Broadcast(start={"l": adapter(1, (2, 2))})))
    refused(join(header, {**fields, "train": "BA"}, body), "train")
    refused(join(header, {**fields, "version": True}, body), "version")
    refused(join(header, {**fields, "run": None}, body), "run as text")


def test_headers_that_lie_are_refused():
    size = struct.unpack("<Q", SMALL[:8])[0]
    for lie in (0, 1, size - 1, size + 1, len(SMALL), 1 << 40, (1 << 64) - 1):
        refused(struct.pack("<Q", lie) + SMALL[8:])
    text, body = SMALL[8:8 + size], SMALL[8 + size:]
    twice = text.replace(b'{"__metadata__"', b'{"__metadata__": {}, "__metadata__"', 1)
    refused(struct.pack("<Q", len(twice)) + twice + body, "a key twice")
    inner = text.replace(b'{\\"base_version\\"', b'{\\"base_version\\": 0, \\"base_version\\"', 1)
    refused(struct.pack("<Q", len(inner)) + inner + body, "a key twice")
    for deep in (b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000, b"1" * 10_000, b"null", b"[]", b"\xff\xfe"):
        refused(struct.pack("<Q", len(deep)) + deep)
    header, fields, body = split(SMALL)
    a, b = header["adapters/a.0.q/A"], header["adapters/a.0.q/B"]
    first = a["data_offsets"][0]
    refused(join({**header, "adapters/a.0.q/B": {**b, "data_offsets": [first, first + 24]}}, fields, body))    # over A's bytes
    refused(join(header, fields, body + b"\0" * 8))
    refused(join(header, fields, body[:-4]))


def with_tensors(**tensors):
    """A well signed message whose tensors are what plain safetensors writes."""
    raw = safetensors.torch.save({f"adapters/a.0.q/{name}": tensor for name, tensor in tensors.items()})
    size = struct.unpack("<Q", raw[:8])[0]
    return join(json.loads(raw[8:8 + size]), split(SMALL)[1], raw[8 + size:])


@pytest.mark.parametrize(("A", "B", "scale", "says"), [
    ((2, 4), (3, 2), (2,), None), ((0, 4), (3, 0), (0,), "not empty"), ((2, 4), (3, 1), (2,), "one rank"),
    ((2, 4), (3, 2), (1,), "one number a rank"), ((2, 4), (3, 2), (), "scale: a vector"), ((2, 4), (3, 2), (2, 1), r"\(rank,\)"),
    ((8,), (3, 2), (2,), "one rank"), ((2, 4, 1), (3, 2), (2,), "a vector or a matrix")])
def test_shapes_that_do_not_fit_are_refused(A, B, scale, says):
    raw = with_tensors(A=torch.ones(A), B=torch.ones(B), scale=torch.ones(scale))
    if says is None:
        assert decode(raw).adapters["a.0.q"].rank == 2
    else:
        refused(raw, says)


@pytest.mark.parametrize("which", ["A", "B", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(which, value):
    tensors = {"A": torch.ones(2, 4), "B": torch.ones(3, 2), "scale": torch.ones(2)}
    tensors[which].view(-1)[-1] = value
    refused(with_tensors(**tensors), f"{which} of torch.float32 with NaN or infinity")


def test_dtypes_that_are_no_factors_are_refused():
    good = {"A": torch.ones(2, 4), "B": torch.ones(3, 2), "scale": torch.ones(2)}
    for name, dtype in (("A", torch.int64), ("B", torch.bool), ("A", torch.complex64)):
        refused(with_tensors(**{**good, name: good[name].to(dtype)}), "a dtype out of")
    for dtype in (torch.float16, torch.float64):
        refused(with_tensors(**{**good, "scale": torch.ones(2, dtype=dtype)}), "scale fp32")
    refused(with_tensors(**good, extra=torch.ones(1)), "only tensors of the layers listed")
    refused(with_tensors(A=good["A"], B=good["B"]))


def test_expected_layers_and_limits_are_kept():
    assert isinstance(decode(SMALL, {"a.0.q": (3, 4), "a.0.v": (9, 9)}), Update)
    refused(SMALL, "a.0.q", expected={"a.0.v": (3, 4)})
    refused(SMALL, r"\(4, 3\)", expected={"a.0.q": (4, 3)})
    for name, at in (("max_bytes", len(SMALL)), ("max_header_bytes", struct.unpack("<Q", SMALL[:8])[0]), ("max_rank", 2),
                     ("max_examples", 5)):
        decode(SMALL, limits=Limits(**{name: at}))
        refused(SMALL, limits=Limits(**{name: at - 1}))


@pytest.mark.parametrize("junk", [None, 7, "text", [1, 2], {}, object()], ids=str)
def test_what_is_not_bytes_is_refused(junk):
    refused(junk, "expected bytes; got")
    with pytest.raises(MessageSizeError):
        decode(b"\0" * 7)


def test_other_byte_containers_are_read():
    assert encode(decode(bytearray(SMALL))) == encode(decode(memoryview(SMALL))) == SMALL
