"""Near-IID groups: every client once, sizes within one, near the whole, and a function of the histograms alone."""
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora import grouping
from flora.data import Partition, partition
from flora.errors import ConfigError


def skewed(clients=80, labels=10, alpha=0.1, seed=0, rows=16000):
    """Histograms of a Dirichlet partition, as a run would deal it."""
    made = [{"label": f"l{i % labels}"} for i in range(rows)]
    dealt = partition(made, clients, Partition(dirichlet_alpha=alpha, label="label"), seed)
    return grouping.histograms({name: [made[i] for i in indices] for name, indices in dealt.items()})


counts = st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any)
cohorts = st.lists(counts, min_size=1, max_size=12).map(
    lambda many: {f"c{k:02d}": dict(zip("xyz", own, strict=True)) for k, own in enumerate(many)})


@settings(max_examples=60, deadline=None)
@given(cohorts, st.integers(1, 12), st.integers(0, 3))
def test_every_client_is_in_one_group_and_sizes_differ_by_at_most_one(found, num_groups, seed):
    num_groups = min(num_groups, len(found))
    amounts = {name: 1.0 + 5 * (k % 3) for k, name in enumerate(found)}
    for groups in (grouping.near_iid(found, num_groups, seed=seed), grouping.near_iid(found, num_groups, amounts, seed),
                   grouping.random_groups(found, num_groups, seed), grouping.similar_together(found, num_groups)):
        assert sorted(name for group in groups for name in group) == sorted(found) and len(groups) == num_groups
        assert {len(group) for group in groups} <= {len(found) // num_groups, -(-len(found) // num_groups)}
        assert groups == sorted(sorted(group) for group in groups)


@settings(max_examples=40, deadline=None)
@given(cohorts, st.integers(1, 4), st.randoms(use_true_random=False))
def test_neither_order_nor_the_unit_of_the_counts_matters(found, num_groups, draw):
    num_groups = min(num_groups, len(found))
    names = list(found)
    draw.shuffle(names)
    turned = {name: dict(reversed(found[name].items())) for name in names}
    expected = grouping.near_iid(found, num_groups)
    assert grouping.near_iid(turned, num_groups) == expected
    assert grouping.near_iid({name: {k: 4 * v for k, v in own.items()} for name, own in found.items()}, num_groups) == expected
    assert grouping.report(turned, expected) == grouping.report(found, expected)


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize(("clients", "num_groups"), [(9, 3), (24, 5), (40, 8)])
def test_no_random_grouping_is_nearer(clients, num_groups, seed):
    found = skewed(clients, 6, 0.3, seed, 1200)
    ours = grouping.measure(found, grouping.near_iid(found, num_groups, seed=seed))["js"]
    drawn = [grouping.measure(found, grouping.random_groups(found, num_groups, n))["js"] for n in range(50)]
    assert len(set(drawn)) > 20 and ours <= min(drawn) + 1e-9


@pytest.mark.parametrize(("alpha", "factor"), [(0.1, 5), (0.5, 10)])
def test_eighty_skewed_clients(alpha, factor):
    """Near-IID groups are several times nearer than random ones, also the best of 20, and similar ones are the furthest."""
    found = skewed(alpha=alpha)
    said = grouping.report(found, grouping.near_iid(found, 8))
    for kind in ("js", "kl", "worst"):
        ours, chance, best, worst = (said[name][kind] for name in ("near-IID", "random", "random, the best", "similar together"))
        assert factor * ours < best <= chance * 1.2 and 1.5 * chance < worst
    assert said["near-IID"]["l1"] < 0.5 * said["random"]["l1"]


def test_what_a_person_would_do():
    """Two pure clients of each label: each group gets one of each. The same, alike together."""
    found = {"a": {"x": 5}, "b": {"x": 5}, "c": {"y": 5}, "d": {"y": 5}}
    assert {tuple(sorted(next(iter(found[name])) for name in group)) for group in grouping.near_iid(found, 2)} == {("x", "y")}
    assert grouping.similar_together(found, 2) == [["a", "b"], ["c", "d"]]
    said = grouping.measure(found, [["a", "b"], ["c", "d"]])
    assert said["l1"] == 1 and said["kl"] == 1 and said["js"] == pytest.approx(1.5 - 0.75 * math.log2(3))
    assert grouping.measure(found, [["a", "c"], ["b", "d"]]) == {"js": 0, "kl": 0, "l1": 0, "worst": 0, "compute": 1}


def test_compute_is_balanced_and_the_labels_still_are():
    """Half of the clients are ten times as fast; labels alone leave the groups unequal."""
    found = skewed(24, 4, 0.5, 1, 2400)
    fast = {name: 10.0 if k < 12 else 1.0 for k, name in enumerate(sorted(found))}
    balanced, labels = grouping.near_iid(found, 4, fast), grouping.near_iid(found, 4)
    by_labels, by_both = grouping.measure(found, labels, fast), grouping.measure(found, balanced, fast)
    assert by_both["compute"] < 1.01 < 1.1 < by_labels["compute"]
    assert by_both["js"] < grouping.measure(found, grouping.random_groups(found, 4))["js"] / 3
    assert by_both["compute"] == max(sum(fast[name] for name in group) for group in balanced) / (sum(fast.values()) / 4)


def test_divergences_by_hand():
    p, q = {"x": 1, "y": 1}, {"x": 3, "y": 1}
    assert grouping.divergence(p, q, "l1") == pytest.approx(0.5)
    assert grouping.divergence(p, q, "kl") == pytest.approx(0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    m = (0.625, 0.375)
    expected = sum(a * math.log2(a / b) for a, b in zip((0.5, 0.5, 0.75, 0.25), m + m, strict=True)) / 2
    assert grouping.divergence(p, q) == pytest.approx(expected) == grouping.divergence(q, p)
    assert grouping.divergence({"x": 2}, {"y": 9}) == 1 and grouping.divergence({"x": 2}, {"y": 9}, "l1") == 2
    assert grouping.divergence({"x": 1}, {"y": 1}, "kl") == math.inf and grouping.divergence(p, {"x": 7, "y": 7}, "kl") == 0


def test_histograms_count_labels_and_name_who_has_none():
    rows = {"a": [{"label": 1}, {"label": 1}, {"label": None}, {}], "b": [{"label": "1"}, {"label": 0}]}
    assert grouping.histograms(rows) == {"a": {"1": 2}, "b": {"0": 1, "1": 1}}
    with pytest.raises(ConfigError, match="'mood' of every client; got none of b, c.*token_histograms"):
        grouping.histograms({"a": [{"mood": "m"}], "c": [], "b": [{"label": 3}]}, "mood")


def test_token_histograms_tell_vocabularies_apart():
    draw = random.Random(0)
    tokens = {f"c{k:02d}": [[draw.randrange(1000) + 1000 * (k % 4) for _ in range(20)] for _ in range(30)] for k in range(16)}
    found = grouping.token_histograms(tokens, 64, 3)
    assert all(sum(own.values()) == 600 and len(own) == 64 for own in found.values())
    same = grouping.divergence(found["c00"], found["c04"])
    assert grouping.divergence(found["c00"], found["c01"]) > 1.3 * same
    said = grouping.report(found, grouping.near_iid(found, 4))
    assert said["near-IID"]["js"] < 0.9 * said["random"]["js"] < said["similar together"]["js"]
    assert found == grouping.token_histograms(tokens, 64, 3) != grouping.token_histograms(tokens, 64, 4)
    spread = np.array([grouping.token_histograms({"a": [range(64000)]}, 64, seed)["a"][0] for seed in range(20)])
    assert (abs(spread - 1000) < 200).all() and len(set(spread)) > 5
    assert grouping.token_histograms({"a": [np.arange(9), []]}) == grouping.token_histograms({"a": [[], list(range(9))]})


@pytest.mark.parametrize(("call", "says"), [
    (lambda f: grouping.near_iid(f, 3), "num_groups: expected 1 to 2.*got 3"),
    (lambda f: grouping.random_groups(f, 0), "num_groups: expected 1 to 2.*got 0"),
    (lambda f: grouping.near_iid({}, 1), "at least one client; got none"),
    (lambda f: grouping.near_iid({**f, "c": {"x": 0}, "d": {}}, 1), "got none of c, d"),
    (lambda f: grouping.near_iid({"c": {}}, 1), "got none of c"),
    (lambda f: grouping.near_iid({**f, "c": {"x": -1, "y": 3}}, 1), "at least 0.*other numbers of c"),
    (lambda f: grouping.near_iid({**f, "c": {"x": math.nan}}, 1), "other numbers of c"),
    (lambda f: grouping.near_iid(f, 1, {"a": 1.0}), "compute: .*got none for b"),
    (lambda f: grouping.divergence(f["a"], f["b"], "euclid"), "js, kl, l1; got 'euclid'"),
    (lambda f: grouping.measure(f, [["a"]]), "exactly one group.*1 places in 1 groups for 2"),
    (lambda f: grouping.measure(f, [["a", "b"], []]), "no group empty"),
    (lambda f: grouping.token_histograms({"a": [[1]]}, 1), "bins: .*got 1"),
    (lambda f: grouping.token_histograms({"a": [[1]], "b": [[]]}), "got none of b"),
], ids=str)
def test_refusals_say_what_came(call, says):
    with pytest.raises(ConfigError, match=says):
        call({"a": {"x": 1}, "b": {"y": 1}})
