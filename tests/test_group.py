"""Groups: one inner round is flat FLoRA, several are the loop one would write by hand, whatever the groups beside them do."""
from dataclasses import replace

import pytest
import torch
from oracles import relative
from tiny import TARGETS, adapter, dense, llama, near, same, token_rows

import flora
from flora import Broadcast, Cohort, Group, GroupCohort, LocalClient, TrainConfig
from flora.nn import lora_layers, target_shapes
from flora.seeds import derive

SHAPES = target_shapes(llama(), TARGETS)
CONFIG = TrainConfig(learning_rate=1e-2, max_steps=2, per_device_train_batch_size=2, seed=5, lora_dropout=0.2)
# Frozen ranks and a merge sum in another order, in fp64; the loss is taken in fp32, and AdamW divides by the gradient's size.
CLOSE = 1e-5


def client(k, rank=4, **own):
    return LocalClient(f"c{k}", token_rows(3 + k, seed=k), rank, 2 * rank, **own)


def clients_of(*ranks, first=0):
    return [client(first + k, rank) for k, rank in enumerate(ranks)]


def start_of(rank, seed=0):
    """Small enough for training to go on from."""
    return {name: adapter(rank, shape, seed + i, 0.1 * rank) for i, (name, shape) in enumerate(SHAPES.items())}


def double():
    return llama(dtype=torch.float64)


def fit(members, config=CONFIG, broadcast=None, frozen=None, model=None):
    model = model or double()
    updates = GroupCohort(model, members, config, TARGETS).fit(broadcast or Broadcast(), frozen)
    assert not lora_layers(model)
    return updates


def seeds(config, inner):
    """The settings of an inner round, by the definition."""
    return config if inner == 0 else replace(config, seed=derive(config.seed, "inner", inner))


def by_hand(clients, inner_rounds, config=CONFIG, broadcast=None):
    """Train, merge the clients' stack into the base, train again; Σ over rounds of Σ p_k ΔW_k, dense in fp64, by layer."""
    model, total, sent = double(), {}, broadcast or Broadcast()
    for inner in range(inner_rounds):
        updates = Cohort(model, clients, seeds(config, inner), TARGETS).fit(sent)
        sent = Broadcast()
        count = sum(u.num_examples for u in updates)
        merge = {}
        for layer in {layer for u in updates for layer in u.adapters}:
            terms = [(u.adapters[layer], u.num_examples / count) for u in updates if layer in u.adapters]
            total[layer] = total.get(layer, 0) + sum(p * dense(a) for a, p in terms)
            merge[layer] = flora.stack([a * p for a, p in terms])
        flora.merge(model, merge)
    return total


def agree(actual, expected, tolerance=CLOSE):
    """Adapters against dense ΔW of the same layers."""
    assert set(actual) == set(expected)
    assert all(relative(dense(a), expected[name]) < tolerance for name, a in actual.items())


def ranks(update):
    return {a.rank for a in update.adapters.values()}


@pytest.mark.parametrize("start", [None, start_of(6)])
def test_one_inner_round_is_flat_flora(start):
    """In fp64, by the members' own bits; ranks add up, order apart; and so for a tree of groups, and clients beside groups."""
    clients, sent = clients_of(4, 1, 8, 3, 2), Broadcast(start=start)
    alone = Cohort(double(), clients, CONFIG, TARGETS).fit(sent)
    flat = flora.aggregate(alone, sent=start)
    for members in ([Group("a", clients[:2]), Group("b", clients[2:])],
                    [Group("a", [clients[0], Group("b", clients[1:3])]), clients[3], Group("d", clients[4:])],
                    [Group("all", [Group("x", [Group("y", clients)])])]):
        updates = fit(members, broadcast=sent)
        assert [u.client for u in updates] == [m.name for m in members]
        assert sum(u.num_examples for u in updates) == sum(len(c.rows) for c in clients)
        assert all(torch.equal(a.A[:4], alone[0].adapters[name].A) for name, a in updates[0].adapters.items())
        got = flora.aggregate(updates, sent=start).merge
        assert {name: a.rank for name, a in got.items()} == {name: a.rank for name, a in flat.merge.items()} and got[
            "model.layers.0.self_attn.q_proj"].rank == 18
        for name, a in flat.merge.items():
            assert float((dense(got[name]) - dense(a)).norm()) <= 1e-6 * float(dense(a).norm())


def test_a_client_beside_groups_is_the_client_of_a_cohort():
    one = client(0)
    assert same(fit([one])[0].adapters, Cohort(double(), [one], CONFIG, TARGETS).fit(Broadcast())[0].adapters)
    beside = fit([one, Group("g", clients_of(2, 2, first=1), 2)])[0]
    assert near(beside.adapters, fit([one])[0].adapters) and beside.client == "c0" and "inner_rounds" not in beside.metrics


@pytest.mark.parametrize("start", [None, start_of(4)])
def test_groups_of_any_pace_and_depth_in_lockstep_equal_the_loop_by_hand(start):
    """Three, one and two inner rounds, one of them for the last block alone; each as if its base had been merged in between."""
    broadcast = Broadcast(start=start)
    groups = [Group("slow", clients_of(4, 2), 3), Group("flat", clients_of(3, first=2)),
              Group("deep", clients_of(1, 5, first=3), 2, depth=1)]
    updates = fit(groups, broadcast=broadcast)
    assert [u.metrics["inner_rounds"] for u in updates] == [3, 1, 2] and [ranks(u) for u in updates] == [{18}, {3}, {12}]
    agree(updates[0].adapters, by_hand(groups[0].clients, 3, broadcast=broadcast))
    agree(updates[1].adapters, by_hand(groups[1].clients, 1, broadcast=broadcast))
    last = [replace(one, layers=[1]) for one in groups[2].clients]
    if start is None:                                           # else the start in the first block is no part of what is merged
        agree(updates[2].adapters, by_hand(last, 2))
    assert set(updates[2].adapters) == {name for name in SHAPES if ".1." in name}
    far = by_hand(groups[0].clients, 1, broadcast=broadcast)
    assert all(relative(dense(a), far[name]) > 0.1 for name, a in updates[0].adapters.items())


def test_a_start_below_a_groups_depth_is_still_seen_in_its_second_inner_round():
    start = {name: a for name, a in start_of(4).items() if ".0." in name}
    model = double()
    flora.merge(model, start)
    group = Group("g", clients_of(2, 3), 2, depth=1)
    expected, [got] = fit([group], model=model)[0].adapters, fit([group], broadcast=Broadcast(start=start))
    assert set(got.adapters) == set(expected) == {name for name in SHAPES if ".1." in name}
    agree(got.adapters, {name: dense(a) for name, a in expected.items()})
    assert not near(got.adapters, fit([group])[0].adapters, 1e-2)


def test_trees_of_groups_with_inner_rounds():
    """A group that only passes on changes nothing; a group that repeats its groups' rounds equals the loop over its loops."""
    clients = clients_of(4, 2, 3)
    halves = [Group("a", clients[:2], 2), Group("b", clients[2:], 2)]
    one, two = fit(halves), fit([Group("top", halves)])
    total = flora.aggregate(one).merge
    agree(two[0].adapters, {name: dense(a) for name, a in total.items()}, 1e-6)
    assert two[0].num_examples == sum(u.num_examples for u in one)
    [nested] = fit([Group("top", [Group("only", clients, 2)], 2)])
    agree(nested.adapters, by_hand(clients, 4))
    [uneven] = fit([Group("top", [Group("a", clients[:2], 2), clients[2]], 2)])
    agree(uneven.adapters, uneven_by_hand(clients))
    assert uneven.metrics["steps"] == 2 * (2 * 4 + 2)           # two clients of two inner rounds, one of one; two steps each


def uneven_by_hand(clients):
    """Twice: the first two train two inner rounds among themselves, the third one, then all are stacked by examples."""
    examples = [len(one.rows) for one in clients]
    merged, total = [], {}
    for outer in range(2):
        def trained(some, inner, *beside):
            model = double()
            for each in (*merged, *beside):
                flora.merge(model, each)
            updates = Cohort(model, some, seeds(CONFIG, inner), TARGETS).fit(Broadcast())
            count = sum(u.num_examples for u in updates)
            return {n: flora.stack([u.adapters[n] * (u.num_examples / count) for u in updates]) for n in SHAPES}

        first = trained(clients[:2], 2 * outer)
        second = trained(clients[:2], 2 * outer + 1, first)
        alone = trained(clients[2:], 2 * outer)
        share = sum(examples[:2]) / sum(examples)
        made = {n: flora.stack([first[n] * share, second[n] * share, alone[n] * (1 - share)]) for n in SHAPES}
        merged.append(made)
        total = {n: total.get(n, 0) + dense(a) for n, a in made.items()}
    return total


def test_every_inner_round_draws_its_own_rows_and_ranks():
    """Else the second inner round would repeat the first: the same fresh A side by side."""
    [update] = fit([Group("g", clients_of(4), 3)], replace(CONFIG, learning_rate=1e-9))
    for a in update.adapters.values():
        parts = a.A.split(4)
        assert len(parts) == 3 and all(float((x - y).norm()) > 0.5 * float(x.norm())
                                       for x, y in ((parts[0], parts[1]), (parts[1], parts[2]), (parts[0], parts[2])))
    first = Cohort(double(), clients_of(4), replace(CONFIG, learning_rate=1e-9), TARGETS).fit(Broadcast())[0]
    assert all(torch.equal(a.A[:4], first.adapters[name].A) for name, a in update.adapters.items())
    later = fit([Group("g", clients_of(4), 3)], replace(CONFIG, learning_rate=1e-9), Broadcast(version=1))[0]
    assert all(not torch.equal(a.A, update.adapters[name].A) for name, a in later.adapters.items()) and later.base_version == 1


def test_the_same_again_and_in_any_order_and_company():
    groups = [Group("a", clients_of(4, 2), 2), Group("b", clients_of(3, 1, first=2), 3, depth=1),
              Group("c", clients_of(2, first=4))]
    together = fit(groups)
    assert all(same(a.adapters, b.adapters) for a, b in zip(together, fit(groups), strict=True))
    backwards = fit(groups[::-1])[::-1]
    for group, update, other in zip(groups, together, backwards, strict=True):
        assert near(update.adapters, other.adapters, CLOSE) and near(fit([group])[0].adapters, update.adapters, CLOSE)
    assert not near(fit(groups, replace(CONFIG, seed=6))[0].adapters, together[0].adapters, 0.1)


def test_one_batch_serves_all_groups_and_holds_a_groups_ranks_once(monkeypatch):
    """An inner round is one forward pass a step; frozen ranks of a group with two members are held once."""
    import flora.packed as packed

    model, calls, held = double(), [], []
    row = {"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}
    parties = [LocalClient(f"c{k}", [row] * 4, 2, 4) for k in range(5)]
    groups = [Group("a", parties[:3], 2), Group("b", parties[3:], 2)]
    fit(groups, model=model)                                    # measures memory and traits, once a model
    real = packed.ops.Frozen
    monkeypatch.setattr(packed.ops, "Frozen", lambda A, *rest: held.append(len(A)) or real(A, *rest))
    model.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    fit(groups, model=model)
    assert calls == [(1, 40)] * 4                               # two steps of two rows each, two inner rounds
    assert held == [6 + 4] * len(SHAPES)                        # three members of rank 2, and two; once a layer


def test_frozen_ranks_of_the_caller_are_seen_by_all_of_a_group():
    """Through every inner round, and in no answer; one set for all, or one a group."""
    mine, group, model = start_of(3, 7), Group("g", clients_of(2, 3), 2), double()
    flora.merge(model, mine)
    expected = {name: dense(a) for name, a in fit([group], model=model)[0].adapters.items()}
    agree(fit([group], frozen=mine)[0].adapters, expected)
    updates = fit([Group("other", clients_of(2, first=2), 2), group], frozen=[None, mine])
    agree(updates[1].adapters, expected)
    assert near(updates[0].adapters, fit([Group("other", clients_of(2, first=2), 2)])[0].adapters, CLOSE)


def test_the_base_is_merged_into_once_and_never_by_groups():
    model, clean, merge = llama(), llama(), start_of(3)
    flora.merge(clean, merge)
    for sent in (Broadcast(merge=merge), Broadcast(merge=merge, version=1, run="r")):
        model = llama()
        for _ in range(2):
            fit([Group("a", clients_of(2), 3), Group("b", clients_of(2, first=1))], broadcast=sent, model=model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


def test_adapters_of_one_layer_only_in_a_group_are_absent_from_the_other():
    updates = fit([Group("a", [client(0, layers=[0])], 2), Group("b", [client(1, layers=[1])], 2)])
    assert [{name.split(".")[2] for name in u.adapters} for u in updates] == [{"0"}, {"1"}]
    merge = flora.aggregate(updates).merge
    share = [u.num_examples / sum(v.num_examples for v in updates) for u in updates]
    for name, a in merge.items():
        own = updates[int(".1." in name)].adapters[name]
        assert relative(dense(a), share[int(".1." in name)] * dense(own)) < 1e-6


def test_answers_are_on_the_cpu_in_the_adapters_dtype():
    [update] = fit([Group("g", clients_of(4), 2)], replace(CONFIG, adapter_dtype="bfloat16"), model=llama(dtype=torch.bfloat16))
    assert all(a.A.dtype == a.B.dtype == torch.bfloat16 and a.A.device.type == "cpu" for a in update.adapters.values())
