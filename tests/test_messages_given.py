"""What does not travel, because the receiver can make it: zeros, factors that both ends hold, and Fed-SB's frame."""
import json
import struct
from dataclasses import replace

import pytest
import torch
from forge import join, split
from tiny import adapter, same

from flora.adapter import Adapter, fresh_adapters
from flora.errors import MessageError
from flora.frames import frame
from flora.messages import Broadcast, Limits, Update, decode, encode, size
from flora.strategies import strategy_named

SHAPES = {"a.q": (13, 7), "a.v": (5, 11)}


def numbers(raw):
    """How many numbers a message carries as tensors, scale aside."""
    header, _, _ = split(raw)
    return sum(torch.Size(entry["shape"]).numel() for name, entry in header.items()
               if name != "__metadata__" and not name.endswith("/scale"))


def trained(a, which):
    return Adapter(a.A + 1 if "A" in which else a.A, a.B + 1 if "B" in which else a.B, a.scale)


@pytest.mark.parametrize("which", ["A", "B", "AB"])
def test_a_factor_that_did_not_change_does_not_travel(which):
    given = Broadcast(start={n: adapter(4, shape) for n, shape in SHAPES.items()}, version=3, run="r")
    update = Update({n: trained(a, which) for n, a in given.start.items()}, 5, base_version=3)
    raw = encode(update, given)
    assert numbers(raw) == sum(4 * (i * ("A" in which) + o * ("B" in which)) for o, i in SHAPES.values())
    assert len(raw) == size(update, given) and same(decode(raw, given=given).adapters, update.adapters)
    smaller = Update({n: Adapter(a.A[:2], a.B[:, :2] + 1, a.scale[:2]) for n, a in given.start.items()}, 5, base_version=3)
    assert same(decode(encode(smaller, given), given=given).adapters, smaller.adapters)
    assert numbers(encode(smaller, given)) == sum(2 * o for o, _ in SHAPES.values())
    following = Broadcast(start=update.adapters, version=4, run="r")
    assert numbers(encode(following, given)) == numbers(raw)
    assert same(decode(encode(following, given), given=given).start, following.start)
    assert numbers(encode(Broadcast(merge=given.start, version=4), given)) == sum(4 * (o + i) for o, i in SHAPES.values())


def test_a_message_says_what_it_was_encoded_with():
    given = Broadcast(start={"l": adapter(2, (5, 3))}, version=3, run="r")
    raw = encode(Update({"l": trained(given.start["l"], "B")}, 5, base_version=3), given)
    for other in (None, replace(given, version=4), replace(given, run="other"), replace(given, start=None),
                  replace(given, start={"l": adapter(1, (5, 3))})):
        with pytest.raises(MessageError):
            decode(raw, given=other)
    header, fields, body = split(raw)
    for lie in ({"held": ["adapters/l/A", "adapters/l/B"]}, {"held": ["adapters/x/A"]}, {"held": 3}, {"cores": ["adapters/l/"]}):
        with pytest.raises(MessageError):
            decode(join(header, {**fields, **lie}, body), given=given)


def test_zeros_travel_as_their_shape_and_nothing_is_allocated_for_them():
    update = Update(fresh_adapters(SHAPES, 3, 6.0, 0), 5)
    raw = encode(update)
    assert numbers(raw) == sum(3 * i for _, i in SHAPES.values()) and len(raw) == size(update)
    assert same(decode(raw, SHAPES).adapters, update.adapters)
    header, fields, body = split(raw)
    for shape, limits in (([1 << 40, 3], Limits()), ([-1, 3], Limits()), ([13, True], Limits()), ([13], Limits()),
                          ([13, 3], Limits(max_bytes=len(raw) + 8)), ("x", Limits())):
        huge = {**fields, "zeros": {**fields["zeros"], "adapters/a.q/B": [*shape, "F32"] if shape != "x" else "x"}}
        if shape == [13, 3]:
            decode(join(header, huge, body), limits=limits)
        else:
            with pytest.raises(MessageError):
                decode(join(header, huge, body), limits=limits)
    many = {**fields, "zeros": {**fields["zeros"], "adapters/a.q/B": [1 << 29, 3, "F32"]}}
    got = decode(join(header, many, body)).adapters["a.q"]
    assert got.shape == (1 << 29, 7) and got.B.untyped_storage().nbytes() == 4


def test_of_fedsb_the_core_travels():
    first = replace(strategy_named("fedsb").begin(SHAPES, [4], 9), run="r")
    assert numbers(encode(first)) == 0 and same(decode(encode(first), SHAPES).start, first.start)
    draw = torch.Generator().manual_seed(1)
    cores = {n: torch.randn(4, 4, generator=draw) for n in SHAPES}
    update = Update({n: Adapter(cores[n] @ frame(s, 4, 9, n)[0], first.start[n].B, first.start[n].scale)
                     for n, s in SHAPES.items()}, 5)
    raw = encode(update, first)
    got = decode(raw, SHAPES, given=first)
    assert numbers(raw) == 16 * len(SHAPES) and len(raw) == size(update, first)
    for n, a in update.adapters.items():
        assert torch.allclose(got.adapters[n].A, a.A, atol=1e-6) and torch.equal(got.adapters[n].B, a.B)
    assert numbers(encode(update)) == sum(4 * (o + i) for o, i in SHAPES.values())
    elsewhere = Update({n: trained(a, "A") for n, a in update.adapters.items()}, 5)      # outside the frame: travels whole
    assert same(decode(encode(elsewhere, first), SHAPES, given=first).adapters, elsewhere.adapters)
    following = Broadcast(start=update.adapters, version=1, run="r", train="core", frame=9)
    assert numbers(encode(following)) == 16 * len(SHAPES)
    assert len(decode(encode(following)).start) == 2                   # stands alone
    assert same(decode(encode(following, whole=True)).start, following.start)
    header, fields, body = split(encode(following))
    huge = {"start/a.q/": [1 << 40, 3], "start/a.v/": [5, 11]}
    small = {**fields["cores"], "start/a.q/": [2, 2]}
    for lie in ({"frame": 1 << 70}, {"cores": []}, {"cores": {}}, {"cores": huge}, {"cores": small}):
        with pytest.raises(MessageError):
            decode(join(header, {**fields, **lie}, body), SHAPES)


def test_frames_are_bounded_before_they_are_made():
    first = replace(strategy_named("fedsb").begin({"l": (64, 64)}, [8], 9), run="r")
    raw = encode(first)
    assert len(decode(raw).start) == 1
    with pytest.raises(MessageError, match="frames take 4,000 bytes at most"):
        decode(raw, limits=Limits(max_frame_bytes=4_000))
    before = frame.cache_info().currsize
    for seed in range(20):
        decode(encode(replace(strategy_named("fedsb").begin({"l": (64, 64)}, [8], seed), run="r"), whole=False))
    assert frame.cache_info().currsize <= before + 20                    # begin's own; decode adds none


def test_8_bit_factors_and_metrics_that_are_no_numbers():
    a = adapter(2, (4, 8))
    eight = Adapter(a.A.to(torch.float8_e4m3fn), a.B.to(torch.float8_e5m2), a.scale)
    got = decode(encode(Update({"l": eight}, 3))).adapters["l"]
    assert got.A.dtype == torch.float8_e4m3fn and torch.equal(got.B.float(), eight.B.float())
    with pytest.raises(MessageError, match="a finite number as metric loss"):
        encode(Update({"l": a}, 3, {"loss": float("nan")}))


def test_size_is_the_length_for_every_dtype_and_kind():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        update = Update({n: adapter(3, shape, dtype=dtype) for n, shape in SHAPES.items()}, 5, {"loss": 1.5}, 2, "zoé")
        raw = encode(update)
        assert len(raw) == size(update) and struct.unpack("<Q", raw[:8])[0] % 8 == 0
        offsets = [e["data_offsets"][0] % 4 for n, e in json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]]).items()
                   if n.endswith("/scale")]
        assert set(offsets) == {0}
    thin = Update({"l": Adapter(torch.ones(1, 3), torch.ones(1, 5).T.expand(5, 1), 1.0),
                   "m": Adapter(torch.ones(3, 1).T, torch.ones(8, 5)[::8].T, 1.0)}, 5)      # strides that contiguous() leaves
    assert same(decode(encode(thin)).adapters, thin.adapters) and size(thin) == len(encode(thin))
    for broadcast in (Broadcast(), Broadcast(base={"l": torch.ones(2, 3)}, merge={"m": adapter(2, (3, 4))}, version=2)):
        assert len(encode(broadcast)) == size(broadcast)
