"""Frequency and depth together: within the budget, the best estimate, and an estimate that learns."""
import dataclasses
import logging
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT

from flora.chooser import Benefit, Budget, Cost, choose, frontier, left_out
from flora.errors import ConfigError
from flora.fleet import Device, DeviceClass, Fleet, GroupWork, Work

PHONE = DeviceClass("phone", 1, 0.5, 1000, up_mbps=8, down_mbps=8)
LAYERS = 8


def cost(speeds, backhaul=None, most_depth=None, **options):
    """Clients with phones this many times as fast; an inner round: 2 steps, half a megabyte each way a block."""
    found = {name: Device(name, dataclasses.replace(PHONE, seconds_per_layer_step=0.5 / speed)) for name, speed in speeds.items()}
    return Cost(Fleet(found, backhaul_mbps=backhaul), lambda client, depth: Work(2, depth, 5e5 * depth, 5e5 * depth), LAYERS,
                most_depth or {}, **options)


def test_seconds_and_bytes_by_hand():
    """a: 2 steps of 0.5 s a block and a second of links a block: 2 s a block. b is half as fast: 3 s. 1 MB each a block."""
    found = cost({"a": 1, "b": 0.5})
    assert found.seconds(["a"], 3, 4) == 24 and found.seconds(["a", "b"], 3, 4) == 36 and found.bytes(["a", "b"], 3, 4) == 24e6
    crossed = cost({"a": 1}, 16, group_bytes=lambda members, inner_rounds, depth: (2e6, inner_rounds * depth * 1e6))
    assert crossed.seconds(["a"], 3, 4) == 24 + 1 + 6 and crossed.bytes(["a"], 3, 4) == 12e6 + 14e6


def test_jitter_is_planned_for():
    """Two standard deviations slow: e^(2 * 0.3) times as long."""
    shaky = Fleet({"a": Device("a", dataclasses.replace(PHONE, jitter=0.3))})
    found = Cost(shaky, cost({"a": 1}).work, LAYERS)
    assert found.seconds(["a"], 3, 4) == pytest.approx(24 * math.exp(0.6))
    assert dataclasses.replace(found, caution=0).seconds(["a"], 3, 4) == pytest.approx(24)
    inner, depth = choose({"g": ["a"]}, found, Budget(seconds=24), Benefit(LAYERS))["g"]
    work = GroupWork({"a": found.work("a", depth)}, inner)
    late = sum("a" in shaky.round(number, {"g": work}, 24).lost for number in range(200))
    assert late <= 12


def test_the_best_pair_by_hand():
    """2 s a block and inner round under 24 s: at most 12 of inner_rounds * depth. Exponents decide which way they go."""
    found, budget = cost({"a": 1}), Budget(seconds=24)
    assert frontier(["a"], found, budget) == {1: 8, 2: 6, 3: 4, 4: 3, 5: 2, 6: 2, 7: 1, 8: 1}
    assert choose({"g": ["a"]}, found, budget, Benefit(LAYERS, 0.6, 0.4)) == {"g": (6, 2)}
    assert choose({"g": ["a"]}, found, budget, Benefit(LAYERS, 0.4, 0.6)) == {"g": (2, 6)}
    assert choose({"g": ["a"]}, found, budget, Benefit(LAYERS, 0.2, 0.8)) == {"g": (1, 8)}
    assert choose({"g": ["a"]}, found, budget, Benefit(LAYERS)) == {"g": (2, 6)}    # 12 four times: the fewest inner rounds
    assert choose({"g": ["a"]}, found, Budget(seconds=24, most_inner_rounds=1), Benefit(LAYERS)) == {"g": (1, 8)}


def test_one_inner_round_at_the_largest_depth_is_what_is_left():
    assert choose({"g": ["a"]}, cost({"a": 1}), Budget(seconds=3.9), Benefit(LAYERS)) == {"g": (1, 1)}
    bound = cost({"a": 1}, group_bytes=lambda members, inner_rounds, depth: (0, 0 if inner_rounds == 1 else 1e9))
    assert choose({"g": ["a"]}, bound, Budget(bytes=5.5e6), Benefit(LAYERS, 0.95, 0.05)) == {"g": (1, 5)}


def test_bytes_are_shared_by_members_and_memory_bounds_depth():
    found = cost({"a": 1, "b": 1, "c": 1}, most_depth={"b": 3})
    groups, budget = {"g": ["a"], "h": ["b", "c"]}, Budget(bytes=30e6)
    got = choose(groups, found, budget, Benefit(LAYERS))        # 10 MB a client: inner_rounds * depth up to 10
    assert got == {"g": (2, 5), "h": (5, 2)}
    assert choose(groups, found, Budget(bytes=30e6, seconds=9), Benefit(LAYERS)) == {"g": (1, 4), "h": (2, 2)}


def test_a_group_that_fits_nowhere_is_left_out_by_name(caplog):
    found = cost({"a": 1, "b": 0.1, "c": 1}, most_depth={"c": 0})
    groups, budget = {"g": ["a"], "slow": ["a", "b"], "slim": ["c", "a"]}, Budget(seconds=6)
    with caplog.at_level(logging.WARNING, "flora"):
        assert choose(groups, found, budget, Benefit(LAYERS)) == {"g": (1, 3)}
    assert "slow: one inner round at depth 1 takes 11 s (slowest: b)" in caplog.text
    assert "slim: the memory of c does not hold" in caplog.text and set(left_out(groups, found, budget)) == {"slow", "slim"}
    with pytest.raises(ConfigError, match="room for none: slow: .*11 s \\(slowest: b\\) and 2 MB"):
        choose({"slow": ["a", "b"]}, found, Budget(seconds=1), Benefit(LAYERS))


speeds = st.lists(st.floats(0.2, 5), min_size=1, max_size=4)
exponents = st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95))


def value(found, budget, benefit, members):
    """The estimate of what is chosen; 0 where nothing is."""
    try:
        return benefit.estimate("g", *choose({"g": members}, found, budget, benefit)["g"])
    except ConfigError:
        return 0.0


@settings(max_examples=60, deadline=None)
@given(speeds, exponents, st.floats(1, 60), st.floats(1, 4), st.floats(1, 4))
def test_a_looser_budget_and_faster_devices_never_lower_the_benefit(found, powers, seconds, looser, faster):
    names = {f"c{k}": speed for k, speed in enumerate(found)}
    benefit, members = Benefit(LAYERS, *powers), sorted(names)
    at = value(cost(names), Budget(seconds=seconds), benefit, members)
    assert value(cost(names), Budget(seconds=seconds * looser), benefit, members) >= at * (1 - 1e-11)
    quick = cost({name: speed * faster for name, speed in names.items()})
    assert value(quick, Budget(seconds=seconds), benefit, members) >= at * (1 - 1e-11)
    tight = value(cost(names), Budget(bytes=1e6 * seconds), benefit, members)
    assert value(cost(names), Budget(bytes=1e6 * seconds * looser), benefit, members) >= tight * (1 - 1e-11)


@settings(max_examples=40, deadline=None)
@given(speeds, exponents, st.floats(4, 60), st.randoms(use_true_random=False))
def test_the_choice_is_within_the_budget_the_best_and_independent_of_order(found, powers, seconds, draw):
    names = {f"c{k}": speed for k, speed in enumerate(found)}
    groups = {f"g{k}": [name] for k, name in enumerate(names)}
    benefit, of, budget = Benefit(LAYERS, *powers), cost(names), Budget(seconds=seconds)
    out = left_out(groups, of, budget)
    if len(out) == len(groups):
        return
    got = choose(groups, of, budget, benefit)
    assert set(got) == set(groups) - set(out)
    for name, pair in got.items():
        fits = [(n, d) for n in range(1, 9) for d in range(1, 9) if of.seconds(groups[name], n, d) <= seconds]
        assert pair in fits and benefit.estimate(name, *pair) >= max(benefit.estimate(name, *one) for one in fits) * (1 - 1e-11)
    order = list(groups)
    draw.shuffle(order)
    assert choose({name: groups[name] for name in order}, of, budget, benefit) == got


def test_the_table_of_the_docs_is_what_its_code_prints(capsys):
    text = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.S)[-1], "docs/fleet.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and printed in text


def test_returns_diminish_in_both():
    benefit = Benefit(LAYERS, 0.7, 0.3)
    for along in ([benefit.estimate("g", n, 4) for n in range(1, 9)], [benefit.estimate("g", 2, d) for d in range(1, 9)]):
        steps = [after - before for before, after in pairwise(along)]
        assert all(x > 0 for x in steps) and steps == sorted(steps, reverse=True)


def test_exponents_and_scales_are_learnt_from_decreases():
    """Two groups whose decrease is s * n^0.8 * (d / 8)^0.2 with s = 0.02 and 0.05, seen at six pairs each."""
    benefit = Benefit(LAYERS)
    before = choose({"g": ["a"]}, cost({"a": 1}), Budget(seconds=24), benefit)
    for n, d in ((1, 8), (8, 1), (4, 2), (2, 4), (1, 2), (4, 8)):
        for name, scale in (("g", 0.02), ("h", 0.05)):
            benefit.observe(name, n, d, 4.0, 4.0 * (1 - scale * n ** 0.8 * (d / 8) ** 0.2))
    assert benefit.exponents == (pytest.approx(0.8, abs=0.06), pytest.approx(0.2, abs=0.06))
    assert benefit.scales == {"g": pytest.approx(0.02, rel=0.1), "h": pytest.approx(0.05, rel=0.1)}
    assert benefit.estimate("new", 1, 8) == pytest.approx(math.sqrt(benefit.scales["g"] * benefit.scales["h"]))
    assert before == {"g": (2, 6)} and choose({"g": ["a"]}, cost({"a": 1}), Budget(seconds=24), benefit) == {"g": (8, 1)}


def test_one_choice_alone_teaches_the_scale_and_later_rounds_count_more():
    benefit = Benefit(LAYERS)
    for _ in range(30):
        benefit.observe("g", 1, 8, 3.0, 2.7)
    assert benefit.exponents == (0.5, 0.5) and benefit.estimate("g", 1, 8) == pytest.approx(0.1, rel=0.01)
    for _ in range(20):
        benefit.observe("g", 1, 8, 3.0, 2.97)
    assert 0.01 < benefit.estimate("g", 1, 8) < 0.02
    benefit.observe("h", 4, 8, 3.0, 3.5)                        # a loss that rose: almost no benefit, and still a number
    assert 0 < benefit.estimate("h", 4, 8) < 2e-4


def test_what_is_observed_in_another_order_of_groups_is_the_same():
    one, other = Benefit(LAYERS), Benefit(LAYERS)
    seen = {"g": [(1, 8, 0.9), (4, 2, 0.8)], "h": [(2, 2, 0.95), (3, 1, 0.99)]}
    for order, benefit in ((("g", "h"), one), (("h", "g"), other)):
        for name in order:
            for n, d, after in seen[name]:
                benefit.observe(name, n, d, 1.0, after)
    assert one.exponents == other.exponents and one.scales == other.scales


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Budget(), "positive seconds, bytes or both; got None and None"), (lambda: Budget(seconds=0), "got 0 and None"),
    (lambda: Budget(seconds=1, bytes=-1), "got 1 and -1"), (lambda: Budget(seconds=1, most_inner_rounds=0), "most_inner_rounds"),
    (lambda: Benefit(0), "layers of at least 1"),
    (lambda: Benefit(8, depth=1.5), "exponents"), (lambda: Benefit(8, forget=0), "forget"),
    (lambda: Benefit(8).observe("g", 1, 1, math.nan, 1.0), "'g': expected finite losses"),
    (lambda: Benefit(8).observe("g", 1, 9, 1.0, 0.5), "depth from 1 to 8; got 1 and 9"),
    (lambda: choose({}, cost({"a": 1}), Budget(seconds=9), Benefit(8)), "room for none: no groups"),
    (lambda: choose({"g": []}, cost({"a": 1}), Budget(seconds=9), Benefit(8)), "'g': expected members; got none"),
    (lambda: choose({"g": ["z"]}, cost({"a": 1}), Budget(seconds=9), Benefit(8)), "a device for client 'z'"),
], ids=str)
def test_refusals_say_what_came(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
