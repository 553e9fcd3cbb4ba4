"""What a hostile message costs, what decoded tensors may be used for, and the limits that a config sets."""
import json
from dataclasses import fields, replace

import pytest
import torch
from forge import LIMITS, Forged, forged_seeds
from pydantic import ValidationError
from tiny import ROOT, adapter, python

from flora.adapter import Adapter, fresh_adapters
from flora.errors import (
    MessageError,
    MessageFormatError,
    MessageRankError,
    MessageSizeError,
    MessageValueError,
    MessageVersionError,
)
from flora.frames import frame
from flora.limits import DTYPES, UNLIMITED, Limits
from flora.messages import Broadcast, Update, decode, encode
from flora.sections import LimitsConfig
from flora.strategies import strategy_named
from flora.wire import BY_NAME, largest

MB = 1_000_000
ACCEPTED = {"all zeros, sound", "all held, sound", "zeros of a gigabyte, within"}


def test_a_hostile_message_costs_memory_in_proportion_to_its_bytes_and_no_more():
    """Each in a process of its own, which dies of a reader that takes minutes, and whose memory is measured from outside."""
    done = python(str(ROOT / "tests" / "hostile_costs.py"), timeout=500)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) > 20, done.stderr[-2000:]
    for name, size, header, status, said, grown, _ in rows:
        assert status == 0 and said != "died", name
        assert (said == "accepted") == (name in ACCEPTED) and (said == "accepted" or said.startswith("Message")), (name, said)
        assert grown <= 3 * size + 30 * header + 16 * MB, (name, grown)


def test_zeros_are_one_number_and_torch_refuses_to_write_into_them():
    got = decode(encode(Update(fresh_adapters({"l": (5, 3)}, 2, 4.0, 0), 5))).adapters["l"]
    assert got.B.untyped_storage().nbytes() == 4 and got.B.shape == (5, 2)
    with pytest.raises(RuntimeError, match="single memory location"):
        got.B.add_(1)
    assert torch.equal(got.B.clone().add_(1), torch.ones(5, 2)) and bool((got.A.add_(1) != 0).any())


def test_the_largest_number_of_any_layout_is_found():
    draw = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    draw[3, 5] = -9.0
    for dtype in BY_NAME.values():
        for t in (draw.to(dtype), draw.to(dtype).T, draw.to(dtype)[::2].T, draw.to(dtype)[3].expand(4, 8), draw.to(dtype)[:, :0]):
            assert largest("t", t) == (float(t.double().abs().max()) if t.numel() else 0.0)
    with pytest.raises(MessageValueError, match="finite numbers in t"):
        largest("t", torch.full((3, 1), float("nan")).expand(3, 1 << 40))


def test_an_update_of_another_version_or_kind_is_refused():
    raw = encode(Update({"l": adapter(2, (3, 4))}, 5, {}, 3))
    assert decode(raw, version=3, kind="update").base_version == 3
    with pytest.raises(MessageVersionError, match="version 4 of the base; got 3"):
        decode(raw, version=4)
    with pytest.raises(MessageFormatError, match="of kind broadcast; got update"):
        decode(raw, kind="broadcast")
    with pytest.raises(MessageFormatError, match="of kind update; got broadcast"):
        decode(encode(Broadcast()), kind="update")


def test_cores_are_of_the_rank_that_was_sent_so_that_no_stranger_fills_the_cache_of_frames():
    sent = replace(strategy_named("fedsb").begin({"l": (64, 64)}, [8], 9), run="r")
    other = replace(strategy_named("fedsb").begin({"l": (64, 64)}, [7], 9), run="r")
    raw = encode(Update(other.start, 5), other)
    decode(raw, given=other)
    held = frame.cache_info().currsize
    with pytest.raises(MessageRankError, match="rank and shape that were sent"):
        decode(raw, given=sent)
    assert frame.cache_info().currsize == held
    with pytest.raises(MessageSizeError, match="1,000 multiply-adds at most"):
        decode(encode(sent), limits=Limits(max_frame_work=1000))


def test_a_core_whose_product_with_its_frame_overflows_is_refused():
    frame_A, B = frame((9, 9), 8, 9, "l")
    sent = Adapter(torch.eye(8) @ frame_A, B, torch.full((8,), 1e-30))
    m = Forged.of(encode(Broadcast(start={"l": sent}, train="core", frame=9)), {})
    core = 3.4e38 * frame_A[:, frame_A.abs().sum(0).argmax()].sign().expand(8, 8).contiguous()
    assert bool(torch.isfinite(core).all()) and not bool(torch.isfinite(core @ frame_A).all())
    decode(m.raw())
    m.tensors["start/l/core"][2] = core.numpy().tobytes()
    with pytest.raises(MessageValueError, match="start/l/A"):
        decode(m.raw())


@pytest.mark.parametrize("limit", [f.name for f in fields(Limits)])
def test_every_limit_refuses_something_that_is_sound_without_it(limit):
    tight = {"max_bytes": 100, "max_header_bytes": 100, "max_decoded_bytes": 100, "max_layers": 1, "max_rank": 3,
             "max_total_rank": 7, "max_examples": 6, "max_metrics": 1, "max_name": 3, "max_frame_bytes": 100, "max_frame_work": 100,
             "max_change": 1e-9, "dtypes": ("F16",), "plain_names": True}
    refused = 0
    for _, raw, options in forged_seeds():
        decode(raw, **{**options, "limits": UNLIMITED})
        try:
            decode(raw, **{**options, "limits": replace(UNLIMITED, **{limit: tight[limit]})})
        except MessageError:
            refused += 1
    odd = encode(Update({"a\nb": adapter(2, (3, 4))}, 5, {}, 3))
    decode(odd, limits=UNLIMITED)
    with pytest.raises(MessageFormatError, match="plain text"):
        decode(odd)
    assert refused > 0 or limit == "plain_names"


def test_the_section_of_a_config_makes_the_limits():
    assert LimitsConfig().limits() == Limits()
    own = LimitsConfig(max_message_mb=1.5, max_header_mb=0.5, max_decoded_mb=2, max_layers=3, max_rank=4, max_total_rank=5,
                       max_examples=6, max_metrics=0, max_name=8, max_frame_mb=9, max_frame_gmac=10, dtypes=("BF16",)).limits()
    assert own == Limits(1_500_000, 500_000, 2_000_000, 3, 4, 5, 6, 0, 8, True, 9_000_000, 10_000_000_000, dtypes=("BF16",))
    assert set(DTYPES) == set(BY_NAME) and Limits() != LIMITS
    for bad in ({"max_rank": 0}, {"max_message_mb": -1}, {"max_examples": 1.5}, {"dtypes": ("I8",)}, {"more": 1}):
        with pytest.raises(ValidationError):
            LimitsConfig(**bad)
