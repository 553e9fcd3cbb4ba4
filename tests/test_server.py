"""The server: who is sampled, and which updates count. It holds no model, so nothing here does."""
import itertools

import pytest
import torch
from tiny import adapter, same

from flora.client import LocalClient
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.server import Server
from flora.strategies import aggregate

ROWS = [{"input_ids": [1, 2], "labels": [1, 2]}]


def server(strategy="flora", count=6, version=0, **options):
    clients = [LocalClient(f"c{k}", ROWS, 4) for k in range(count)]
    return Server(strategy, clients, Broadcast(version=version, run="r"), **options)


def update(k, version=0, examples=None, rank=4):
    return Update({"l": adapter(rank, (7, 5), k)}, examples or k + 1, {}, version, f"c{k}")


def names(clients):
    return [client.name for client in clients]


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 6), (0.5, 3), (0.34, 2), (0.01, 1), (1e-9, 1), (0.9, 5)])
def test_a_fraction_of_the_clients_is_sampled_but_never_none(fraction, expected):
    for number in range(20):
        chosen = names(server(fraction=fraction).sample(number))
        assert len(chosen) == expected == len(set(chosen)) and chosen == sorted(chosen)


def test_sampling_depends_on_seed_and_round_alone():
    rounds = [names(server(fraction=0.5, seed=3).sample(n)) for n in range(30)]
    again = server(fraction=0.5, seed=3)
    assert [names(again.sample(n)) for n in reversed(range(30))] == rounds[::-1]
    assert [names(server(fraction=0.5, seed=4).sample(n)) for n in range(30)] != rounds
    assert len({tuple(r) for r in rounds}) > 5 and {name for r in rounds for name in r} == {f"c{k}" for k in range(6)}


@pytest.mark.parametrize("strategy", ["flora", "fedit", "zeropad"])
def test_the_order_of_replies_does_not_change_a_bit(strategy):
    updates = [update(k) for k in range(4)]
    results = []
    for order in itertools.permutations(updates):
        broadcast = server(strategy).close(order)
        results.append(broadcast.merge or broadcast.start)
    assert all(same(results[0], other) for other in results[1:])
    assert same(results[0], (lambda b: b.merge or b.start)(aggregate(updates, strategy)))


def test_close_counts_the_version_and_keeps_the_run():
    one = server()
    assert one.close([update(0), update(3)]) is one.broadcast
    assert (one.broadcast.version, one.broadcast.run, one.broadcast.start) == (1, "r", None)
    assert one.close([update(2, version=1)]).version == 2


def test_weighting_is_by_examples_or_uniform():
    updates = [update(0, examples=1), update(1, examples=3)]
    for weighting, p in (("examples", [0.25, 0.75]), ("uniform", [0.5, 0.5])):
        merged = server(weighting=weighting).close(updates).merge["l"]
        assert merged.scale.tolist() == [2 * p[0]] * 4 + [2 * p[1]] * 4          # powers of two and 3/4: no rounding


def test_no_updates_leave_the_broadcast_as_it_was():
    one = server("fedit", version=5)
    before = one.broadcast
    assert one.close([]) is before and one.broadcast is before


@pytest.mark.parametrize(("updates", "says"), [
    ([update(0, version=1)], "version 0.*others from c0"), ([update(0), update(1, version=1)], "others from c1"),
    ([update(0), update(0)], "one update from each"), ([Update({"l": adapter(4, (7, 5))}, 1, {}, 0, "stranger")], "stranger"),
    ([Update({"l": adapter(4, (7, 5))}, 1)], "one update from each")], ids=["wrong", "mixed", "twice", "unknown", "no name"])
def test_updates_that_do_not_belong_to_the_round_are_refused(updates, says):
    one = server()
    before = one.broadcast
    with pytest.raises(StrategyError, match=says):
        one.close(updates)
    assert one.broadcast is before


def test_a_refused_aggregate_leaves_the_broadcast():
    one = server("fedit")
    before = one.broadcast
    with pytest.raises(StrategyError, match="flora"):
        one.close([update(0, rank=4), update(1, rank=2)])
    bad = update(0)
    bad.adapters["l"].A[0, 0] = torch.nan
    with pytest.raises(StrategyError, match="c0"):
        one.close([bad])
    assert one.broadcast is before


def test_standalone_takes_no_weights_and_an_unknown_strategy_is_refused():
    one = server("standalone", weighting="uniform")
    assert one.close([update(0)]) == Broadcast(version=1, run="r")
    with pytest.raises(StrategyError, match="Did you mean 'flora'"):
        server("flor")
