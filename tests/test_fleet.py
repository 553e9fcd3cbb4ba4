"""The simulated clock against rounds counted by hand; memory against its own formula."""
import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora import capacity
from flora.capacity import Memory
from flora.errors import ConfigError
from flora.fleet import Device, DeviceClass, Fleet, GroupWork, Work, assign, devices, phases

FAST = DeviceClass("fast", 2, 1.0, 1000, up_mbps=8, down_mbps=8)                # 8 Mbit/s: a second a megabyte
SLOW = DeviceClass("slow", 1, 3.0, 500, up_mbps=4, down_mbps=8)
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in (("q", (30, 20)), ("v", (10, 20)))}


def fleet(backhaul=None, seed=0, **kinds):
    return Fleet({name: Device(f"device-of-{name}", kind) for name, kind in kinds.items()}, seed, backhaul)


def test_one_inner_round_by_hand():
    """a: 1 down, 2 steps of 3 blocks, 2 up = 9 s. b: 1 + 18 + 4 = 23 s. a waits 14 s."""
    work = Work(2, 3, 1e6, 2e6)
    got = fleet(a=FAST, b=SLOW).round(0, {"g": GroupWork({"a": work, "b": work})})
    assert got.seconds == 23 and got.groups == {"g": 23} and got.stragglers == {"g": "b"} and got.lost == {}
    a, b = got.clients["a"], got.clients["b"]
    assert (a.train, a.transfer, a.wait, a.start, a.finish) == (6, 3, 14, 0, 9)
    assert (b.train, b.transfer, b.wait, b.finish) == (18, 5, 0, 23)


def test_inner_rounds_wait_for_the_group_and_the_round_for_the_slowest_group():
    """g: inner rounds of 9 s (b's; a's take 3), twice, and 1 s of backhaul each way. h: one of 3 s, between 2 s and 4 s."""
    one, nine = Work(1, 1, 1e6, 1e6), Work(2, 1, 1e6, 1e6)
    groups = {"g": GroupWork({"a": one, "b": nine}, 2, 2e6, 2e6), "h": GroupWork({"c": one}, 1, 4e6, 8e6)}
    got = fleet(16.0, a=FAST, b=SLOW, c=FAST).round(0, groups)
    assert got.groups == {"g": 20, "h": 9} and got.seconds == 20 and got.stragglers == {"g": "b", "h": "c"}
    a, c = got.clients["a"], got.clients["c"]
    assert (a.train, a.transfer, a.wait, a.start, a.finish) == (2, 4, 14, 1, 13)
    assert (c.train, c.transfer, c.wait, c.start, c.finish) == (1, 2, 17, 2, 5)


def test_frozen_blocks_cost_half():
    assert phases(FAST, Work(4, 2, frozen=6)) == (0, 20, 0) and phases(SLOW, Work(4, 8)) == (0, 96, 0)


def test_a_long_broadcast_is_no_reason_to_be_late():
    """8 s of broadcast, then 3 inner rounds of 4 s: in time under 20 s, though the first ends after 12 of them."""
    link = dataclasses.replace(FAST, seconds_per_layer_step=1.0, down_mbps=1.0)
    work = GroupWork({"a": Work(4, 1, first_down=1e6)}, 3)
    assert not fleet(a=link).round(0, {"g": work}, 20.5).lost and fleet(a=link).round(0, {"g": work}, 20.5).seconds == 20
    slow = GroupWork({"a": Work(4, 1, first_down=1e6), "b": Work(4, 1)}, 3)
    assert fleet(a=link, b=link).round(0, {"g": slow}, 20.5).lost == {}           # b has no broadcast to wait for
    slower = GroupWork({"a": Work(4, 1, first_down=1e6), "b": Work(13, 1)}, 3)
    assert fleet(a=link, b=link).round(0, {"g": slower}, 20.5).lost == {"b": "late"}


def test_the_first_inner_round_takes_the_broadcast():
    work = GroupWork({"a": Work(2, 3, 1e6, 2e6, first_down=9e6)}, 3)
    plain = GroupWork({"a": Work(2, 3, 1e6, 2e6)}, 3)
    more = phases(FAST, Work(0, 1, 9e6))[0] - phases(FAST, Work(0, 1, 1e6))[0]
    first, later = (fleet(a=FAST).round(0, {"g": w}) for w in (work, plain))
    assert first.seconds == pytest.approx(later.seconds + more) and first.clients["a"].transfer == pytest.approx(
        later.clients["a"].transfer + more)
    assert fleet(a=FAST).expected(work) == pytest.approx(first.seconds)


def test_a_deadline_drops_the_late_and_the_group_goes_on():
    """Two inner rounds under 20 s: b (9 s) is back before 10 s, c (14 s) is not; then a and b are done at 10 + 9."""
    groups = {"g": GroupWork({"a": Work(1, 1, 1e6, 1e6), "b": Work(2, 1, 1e6, 1e6), "c": Work(12, 1, 1e6, 1e6)}, 2)}
    got = fleet(a=FAST, b=SLOW, c=FAST).round(0, groups, 20)
    assert got.lost == {"c": "late"} and got.seconds == 19 and got.stragglers == {"g": "b"}
    c = got.clients["c"]
    assert (c.train, c.transfer, c.wait, c.finish) == (9, 1, 0, 10)
    assert fleet(a=FAST, b=SLOW, c=FAST).round(0, groups).seconds == 28
    early = fleet(a=FAST, b=SLOW, c=FAST).round(0, groups, 28)
    assert early.lost == {} and early.seconds == 28            # back at the very limit is in time


def test_time_saved_in_one_inner_round_is_kept_for_the_next():
    """Limits are 1/2 and 2/2 of the deadline, not a half each anew: whoever is early goes on at once."""
    got = fleet(a=FAST, b=FAST).round(0, {"g": GroupWork({"a": Work(7, 1), "b": Work(3, 1)}, 2)}, 20)
    assert got.seconds == 14
    late = fleet(a=FAST, b=FAST).round(0, {"g": GroupWork({"a": Work(12, 1), "b": Work(3, 1)}, 2)}, 20)
    assert late.lost == {"a": "late"} and late.seconds == 13 and late.clients["a"].finish == 10


def test_the_deadline_leaves_time_for_the_backhaul():
    """1 s down and 3 s up of 20 s: an inner round has to end at 1 + 8 s, so 8 s of work is in time and 9 s is not."""
    groups = {"g": GroupWork({"a": Work(8, 1), "b": Work(9, 1)}, 2, 1e6, 3e6)}
    got = fleet(8.0, a=FAST, b=FAST).round(0, groups, 20)
    assert got.lost == {"b": "late"} and got.clients["b"].finish == 9 and got.seconds == got.groups["g"] == 20


def test_a_late_group_leaves_the_round():
    got = fleet(a=FAST, b=FAST).round(0, {"g": GroupWork({"a": Work(50, 1)}), "h": GroupWork({"b": Work(3, 1)})}, 20)
    assert got.groups == {"h": 3} and got.lost == {"a": "late"} and got.seconds == 3 and got.clients["a"].finish == 20


def test_a_device_vanishes_as_often_as_its_class_says_and_nobody_waits_for_it():
    shaky = dataclasses.replace(FAST, availability=0.7)
    of = fleet(a=shaky, b=FAST)
    groups = {"g": GroupWork({"a": Work(8, 1, 1e6, 1e6), "b": Work(1, 1)}, 2)}
    rounds = [of.round(number, groups) for number in range(600)]
    gone = [got for got in rounds if got.lost]
    assert 0.24 < len(gone) / 600 < 0.36 and all(got.lost == {"a": "vanished"} for got in gone)
    whole = [got.clients["a"].finish for got in gone]
    assert 0 <= min(whole) < 2 and 18 < max(whole) < 20 and 9 < sum(whole) / len(whole) < 11
    for got in gone:
        a = got.clients["a"]
        assert a.train + a.transfer + a.wait == pytest.approx(a.finish) and a.wait == pytest.approx(0)
        later = 1.0 if a.finish >= 10 else 0.0                  # inner rounds of 10 s with a, of 1 s after it is gone
        assert got.seconds == pytest.approx(max(a.finish, 10 * later + 1) + (1 - later))
    assert all(got.seconds == 20 for got in rounds if not got.lost)


def test_everybody_lost_is_a_round_without_groups():
    shaky = dataclasses.replace(FAST, availability=1e-9)
    got = fleet(a=shaky).round(0, {"g": GroupWork({"a": Work(8, 1)})})
    assert got.groups == {} and got.stragglers == {} and got.lost == {"a": "vanished"}
    assert got.seconds == got.clients["a"].finish < 8


def test_jitter_is_log_normal_and_new_in_every_round():
    noisy = dataclasses.replace(FAST, jitter=0.5)
    of = fleet(a=noisy)
    seen = [of.round(number, {"g": GroupWork({"a": Work(1, 1, 5e5, 5e5)}, 3)}).clients["a"] for number in range(400)]
    for logs in ([math.log(spent.train / 3) for spent in seen], [math.log(spent.transfer / 3) for spent in seen]):
        mean = sum(logs) / 400
        assert abs(mean) < 0.08 and abs((sum((x - mean) ** 2 for x in logs) / 399) ** 0.5 - 0.5) < 0.06
    both = [math.log(spent.train / 3) * math.log(spent.transfer / 3) for spent in seen]
    assert abs(sum(both) / 400) < 0.05                          # training and link are slow on days of their own
    assert fleet(seed=1, a=noisy).round(0, {"g": GroupWork({"a": Work(1, 1)})}).seconds != fleet(a=noisy).round(
        0, {"g": GroupWork({"a": Work(1, 1)})}).seconds


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from([None, 40.0, 90.0]))
def test_seconds_add_up_and_order_does_not_matter(seed, draw, inner, deadline):
    kinds = [dataclasses.replace(kind, jitter=0.3, availability=0.8) for kind in (FAST, SLOW)]
    names = [f"c{k}" for k in range(7)]
    found = {name: Device(name, kinds[k % 2]) for k, name in enumerate(names)}
    members = {name: Work(1 + k % 3, 2, 1e5 * k, 1e5) for k, name in enumerate(names)}
    groups = {"g": GroupWork({n: members[n] for n in names[:4]}, inner, 1e6), "h": GroupWork({n: members[n] for n in names[4:]}, 1)}
    got = Fleet(found, seed, 8.0).round(3, groups, deadline)
    draw.shuffle(names)
    turned = {key: GroupWork({n: members[n] for n in names if n in groups[key].members}, groups[key].inner_rounds,
                             groups[key].bytes_down) for key in ("h", "g")}
    assert Fleet({name: found[name] for name in names}, seed, 8.0).round(3, turned, deadline) == got
    for name, spent in got.clients.items():
        assert spent.train + spent.transfer + spent.wait == pytest.approx(spent.finish if name in got.lost else got.seconds)
        assert min(spent.train, spent.transfer) >= 0 and spent.wait >= -1e-9
    alone = Fleet(found, seed, 8.0).round(3, {"h": groups["h"]}, deadline)
    assert all(alone.clients[name].train == got.clients[name].train for name in alone.clients)
    assert got.seconds <= (deadline or math.inf) + 1e-9


def test_devices_are_of_their_classes_in_an_order_of_the_seed():
    classes = [DeviceClass("a", 40, 1, 1, 1, 1), DeviceClass("b", 25, 1, 1, 1, 1), DeviceClass("c", 15, 1, 1, 1, 1)]
    found = devices(classes, 3)
    assert [sum(device.kind is kind for device in found) for kind in classes] == [40, 25, 15]
    assert [device.name for device in found] == [f"device-{k:02d}" for k in range(80)]
    assert found == devices(classes, 3) != devices(classes, 4) and len({device.kind.name for device in found[:15]}) > 1
    assert list(assign([f"c{k}" for k in range(80)], found).values()) == found


def test_memory_bounds_rank_and_depth():
    """A block has 80 numbers a rank: q (30 + 20), v (10 + 20). 16 bytes each, two blocks: 2,560 bytes a rank."""
    memory = Memory(base_mb=10, activation_mb=2)
    assert capacity.needed_mb(SHAPES, 5, 2, memory) == pytest.approx(14 + 5 * 2560e-6)
    assert capacity.needed_mb(SHAPES, 5, 9, memory) == capacity.needed_mb(SHAPES, 5, 4, memory)
    for spare, rank in ((0.0, 0), (2559e-6, 0), (2561e-6, 1), (7.5 * 2560e-6, 7), (1.0, 64)):
        device = Device("d", dataclasses.replace(FAST, memory_mb=14 + spare))
        assert capacity.most_rank(device, SHAPES, 2, memory) == rank
    for mb, depth in ((9, 0), (11.9, 0), (12.1, 1), (16.5, 3), (99, 4)):
        assert capacity.most_depth(Device("d", dataclasses.replace(FAST, memory_mb=mb)), SHAPES, 8, memory) == depth
    half = Memory(10, 2, bytes_a_number=8)
    assert capacity.needed_mb(SHAPES, 6, 2, half) - 14 == pytest.approx((capacity.needed_mb(SHAPES, 6, 2, memory) - 14) / 2)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.1, 50), st.integers(1, 4), st.integers(1, 40))
def test_the_largest_rank_and_depth_fit_and_the_next_do_not(mb, depth, rank):
    memory, device = Memory(3, 1.5, 1e4), Device("d", dataclasses.replace(FAST, memory_mb=mb))
    most, deepest = capacity.most_rank(device, SHAPES, depth, memory), capacity.most_depth(device, SHAPES, rank, memory)
    assert most == 0 or capacity.needed_mb(SHAPES, most, depth, memory) <= mb
    assert most == 64 or capacity.needed_mb(SHAPES, most + 1, depth, memory) > mb
    assert deepest == 0 or capacity.needed_mb(SHAPES, rank, deepest, memory) <= mb
    assert deepest == 4 or capacity.needed_mb(SHAPES, rank, deepest + 1, memory) > mb


def test_a_device_that_cannot_hold_rank_1_is_left_out_and_named():
    found = {"a": Device("d0", FAST), "b": Device("d1", SLOW)}
    fit, out = capacity.ranks(found, SHAPES, 2, Memory(600, 10), 16)
    assert fit == {"a": 16} and list(out) == ["b"] and "d1 (slow) has 500 MB; rank 1 in 2 blocks takes 620.0 MB" in out["b"]
    with pytest.raises(ConfigError, match="rank 1 on some device.*d0 \\(fast\\)"):
        capacity.ranks(found, SHAPES, 2, Memory(6000), 16)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: dataclasses.replace(FAST, up_mbps=-1), "'fast': up_mbps: expected a positive number; got -1"),
    (lambda: dataclasses.replace(FAST, down_mbps=math.inf), "down_mbps"), (lambda: dataclasses.replace(FAST, count=0), "count"),
    (lambda: dataclasses.replace(FAST, availability=0), "availability"), (lambda: dataclasses.replace(FAST, jitter=-1), "jitter"),
    (lambda: dataclasses.replace(FAST, seconds_per_layer_step=math.nan), "seconds_per_layer_step"),
    (lambda: dataclasses.replace(FAST, memory_mb=0), "memory_mb"), (lambda: devices([]), "at least one class.*got none"),
    (lambda: devices([FAST, FAST]), "own name; got fast, fast"), (lambda: Fleet({}), "at least one device; got none"),
    (lambda: assign(["a"], devices([FAST])), "one device a client \\(1\\); got 2"), (lambda: fleet(-1.0, a=FAST), "backhaul_mbps"),
    (lambda: Work(1, 0), "depth of at least 1"), (lambda: Work(1, 1, -1), "bytes"), (lambda: GroupWork({}), "expected members"),
    (lambda: Memory(-1), "base_mb"), (lambda: capacity.blocks({"lm_head": (3, 4)}), "numbered blocks"),
    (lambda: fleet(a=FAST).round(0, {"g": GroupWork({"b": Work(1, 1)})}), "a device for client 'b'; got devices for a"),
    (lambda: capacity.most_rank(Device("d", FAST), SHAPES, 0, Memory(1)), "depth and a limit of at least 1; got 0 and 64"),
    (lambda: fleet(a=FAST).round(0, {}), "each in one group; got none"),
    (lambda: fleet(a=FAST).round(0, {k: GroupWork({"a": Work(1, 1)}) for k in "gh"}), "each in one group; got a, a"),
    (lambda: fleet(a=FAST, b=SLOW).round(0, {"g": GroupWork({"a": Work(5, 1), "b": Work(5, 1)}, 2)}, 9), "at least 10 s.*got 9"),
], ids=str)
def test_refusals_say_what_came(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
