"""Partitions and splits: every row has one client, and what is held out was never trained on."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from data_helpers import ROWS, check_splits

import flora.data as data
from flora.errors import DataError


def labelled(*counts: int) -> list[dict]:
    """Make rows with labels 0, 1, ... of these counts, sorted by label."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return [{"prompt": f"q{i}", "completion": f"a{i}", "label": label} for i, label in enumerate(labels)]


def test_by_column_takes_those_with_the_most_rows():
    rows = [{"who": who} for who in "aabbbcdddd"] + [{"who": None}]
    assert data.partition(rows, 3, data.Partition(by="who"), 0) == {"d": [6, 7, 8, 9], "b": [2, 3, 4], "a": [0, 1]}
    with pytest.raises(DataError, match="5 clients.*4 distinct"):
        data.partition(rows, 5, data.Partition(by="who"), 0)
    with pytest.raises(DataError, match="no column 'sender'; they have who"):
        data.partition(rows, 2, data.Partition(by="sender"), 0)


@pytest.mark.parametrize(
    "rule", [{"iid": True}, {"dirichlet_alpha": 0.5, "label": "label"}, {"shards": 2, "label": "label"}]
)
def test_dealt_rules_cover_every_row_once_and_follow_the_seed(rule):
    rows = labelled(40, 30, 31)
    spec = data.Partition(**rule)
    clients = data.partition(rows, 5, spec, 3)
    assert sorted(i for indices in clients.values() for i in indices) == list(range(101))
    assert list(clients) == [f"client-{k}" for k in range(5)]
    assert data.partition(rows, 5, spec, 3) == clients != data.partition(rows, 5, spec, 4)
    with pytest.raises(DataError, match="lower (num_clients|shards)"):
        data.partition(rows, 102, spec, 0)


def test_iid_is_even_and_shards_are_pure():
    rows = labelled(50, 50, 50, 50)
    assert set(map(len, data.partition(rows, 8, data.Partition(iid=True), 0).values())) == {25}
    clients = data.partition(rows, 10, data.Partition(shards=2, label="label"), 0)
    kinds = [len({rows[i]["label"] for i in indices}) for indices in clients.values()]
    assert max(kinds) == 2 and all(len(indices) == 20 for indices in clients.values())
    # Which rows of a label make a shard is random: cut in the file's order, two shards would have one gap at most.
    for mine in clients.values():
        assert sum(after - before != 1 for before, after in pairwise(mine)) > 1


def test_dirichlet_skew_grows_as_alpha_falls():
    rows = labelled(1000, 1000, 1000)

    def skew(alpha):
        clients = data.partition(rows, 4, data.Partition(dirichlet_alpha=alpha, label="label"), 0)
        counts = [Counter(rows[i]["label"] for i in indices) for indices in clients.values()]
        return sum(max(count.values()) / sum(count.values()) for count in counts) / 4

    assert skew(0.1) > 0.6 and abs(skew(1000) - 1 / 3) < 0.05


def test_equal_sizes_skew_labels_alone():
    rows = labelled(1600, 1500, 700)

    def dealt(alpha, seed=0):
        return data.partition(rows, 80, data.Partition(dirichlet_alpha=alpha, label="label", equal_sizes=True), seed)

    def purity(clients):
        counts = [Counter(rows[i]["label"] for i in indices) for indices in clients.values()]
        return sum(max(count.values()) / sum(count.values()) for count in counts) / 80

    for alpha in (1e-300, 0.1, 1e6):
        clients = dealt(alpha)
        assert sorted(i for indices in clients.values() for i in indices) == list(range(3800))
        assert {len(indices) for indices in clients.values()} == {47, 48} and dealt(alpha) == clients != dealt(alpha, 1)
    assert purity(dealt(0.1)) > 0.85 and abs(purity(dealt(1e6)) - 16 / 38) < 0.09
    with pytest.raises(DataError, match="equal_sizes goes with dirichlet_alpha, iid came"):
        data.Partition(iid=True, equal_sizes=True)


def test_an_empty_partition_is_refused():
    with pytest.raises(DataError, match="without a row at dirichlet_alpha=1e-05.*raise dirichlet_alpha"):
        data.partition(labelled(20, 20), 5, data.Partition(dirichlet_alpha=1e-5, label="label"), 0)
    with pytest.raises(DataError, match="row 1 has no 'label'"):
        data.partition([{"label": 1}, {"label": None}], 2, data.Partition(shards=1, label="label"), 0)
    with pytest.raises(DataError, match="no rows"):
        data.partition([], 1, data.Partition(iid=True), 0)
    with pytest.raises(DataError, match="num_clients"):
        data.partition(ROWS, 0, data.Partition(iid=True), 0)


@pytest.mark.parametrize(
    "rule",
    [{}, {"by": "a", "iid": True}, {"shards": 2}, {"dirichlet_alpha": 1.0}, {"shards": 0, "label": "a"},
     {"dirichlet_alpha": 0.0, "label": "a"}, {"dirichlet_alpha": float("nan"), "label": "a"}],
)  # fmt: skip
def test_a_partition_has_exactly_one_sound_rule(rule):
    with pytest.raises(DataError):
        data.Partition(**rule)


def conversations(seed: int) -> tuple[list[dict], dict[str, list[int]]]:
    """Make conversations between pairs of people, with openings that many conversations share."""
    draw = random.Random(seed)
    rows = []
    for talk in range(60):
        pair = draw.sample("abcdefg", 2)
        for turn in range(draw.randint(2, 9)):
            answer = "hello" if turn == 0 and draw.random() < 0.5 else f"{talk} {turn}"
            rows.append({"prompt": "hi", "completion": answer, "who": pair[turn % 2], "conversation": f"c{talk}"})
    return rows, data.partition(rows, 7, data.Partition(by="who"), 0)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_held_out_is_trained_on(seed):
    rows, clients = conversations(seed)
    splits = data.split(rows, clients, seed, 5, 30)
    check_splits(rows, clients, splits, "conversation")
    assert splits == data.split(rows, clients, seed, 5, 30)
    assert splits != data.split(rows, clients, seed + 1, 5, 30)
    assert all(splits.eval.values()) and len(splits.server) > 15


def test_duplicates_stay_on_one_side_without_a_group():
    rows = [{"prompt": "q", "completion": f"a{i % 40}", "copy": f"a{i % 40}"} for i in range(100)]
    clients = data.partition(rows, 4, data.Partition(iid=True), 0)
    splits = data.split(rows, clients, 0, 5, 20)
    check_splits(rows, clients, splits, "copy")
    assert splits.server and all(splits.eval.values())


def test_a_duplicate_in_another_group_leaves_the_training_set():
    rows = [{"prompt": "q", "completion": "same" if i % 3 == 0 else f"a{i}", "talk": i // 3} for i in range(30)]
    for seed in range(5):
        splits = data.split(rows, {"x": list(range(30))}, seed, 3, 0, "talk")
        assert len(splits.eval["x"]) == 3
        assert not any(rows[i]["completion"] == "same" for i in splits.train["x"])


def test_one_row_clients_keep_their_row_and_small_ones_hold_out_one():
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(12)]
    clients = {"one": [0], "five": [1, 2, 3, 4, 5], "six": [6, 7, 8, 9, 10, 11]}
    for seed in range(20):
        splits = data.split(rows, clients, seed, 10, 2)
        assert splits.train["one"] == [0] and splits.eval["one"] == []
        assert len(splits.eval["five"]) == len(splits.eval["six"]) == 1 and len(splits.server) == 2


def test_a_large_group_is_held_out_only_if_something_is_left():
    rows = [{"prompt": f"q{i}", "completion": "a", "talk": "x" if i < 6 else "y"} for i in range(10)]
    splits = data.split(rows, {"k": list(range(10))}, 0, 5, 0, "talk")
    assert splits.train["k"] == list(range(6)) and len(splits.eval["k"]) == 2  # y has 4 rows, a fifth of ten is 2
    splits = data.split(rows[:6], {"k": list(range(6))}, 0, 5, 5, "talk")
    assert splits.train["k"] == list(range(6)) and not splits.eval["k"] and not splits.server


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="'empty' has no row"):
        data.split(ROWS, {"x": [0], "empty": []}, 0, 1, 1)
    with pytest.raises(DataError, match="row 0 belongs to 'x' and to 'y'"):
        data.split(ROWS, {"x": [0], "y": [0]}, 0, 1, 1)
    with pytest.raises(DataError, match="no column 'talk'.*who"):
        data.split(ROWS, {"x": [0]}, 0, 1, 1, "talk")
    with pytest.raises(DataError, match="counted from 0"):
        data.split(ROWS, {"x": [0]}, 0, -1, 1)
