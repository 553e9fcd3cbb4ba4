"""Groups: what is compressed, what averaging inside costs, who fails, what is refused, and a server whose clients are groups."""
from dataclasses import replace

import pytest
import torch
from oracles import relative
from test_group import CLOSE, CONFIG, SHAPES, TARGETS, agree, by_hand, client, clients_of, double, fit, ranks, start_of
from tiny import dense, near, same

import flora
import flora.group
from flora import Broadcast, Cohort, Group, GroupCohort, LocalClient
from flora.errors import ConfigError, StrategyError
from flora.server import Server, first_broadcast
from flora.strategies import STRATEGIES
from flora.versions import bring_to

LAYER = "model.layers.0.self_attn.q_proj"
LOST = {"input_ids": [4, 5, 6], "labels": [-100] * 3}


def whole(adapters):
    """All layers as one vector, in fp64."""
    return torch.cat([dense(a).flatten() for _, a in sorted(adapters.items())])


def test_frozen_ranks_that_outgrow_the_bound_are_compressed_and_nothing_changes(monkeypatch):
    """Of a stack of rank 12 a round on layers 16 wide, 16 ranks at most are seen; the answer keeps them all."""
    group, seen = Group("g", clients_of(8, 4), 3), []
    real = flora.group.bounded
    monkeypatch.setattr(flora.group, "bounded", lambda adapters: seen.append((adapters, real(adapters))) or seen[-1][1])
    [less] = fit([group])
    assert [a[LAYER].rank for a, _ in seen] == [12, 24, 36] and [b[LAYER].rank for _, b in seen] == [12, 16, 16]
    narrow = "model.layers.0.self_attn.v_proj"                  # 8 out of 16: rank 12 is more than it can have
    assert [b[narrow].rank for _, b in seen] == [8, 8, 8]
    assert all(relative(dense(b[n]), dense(a)) < 1e-6 for a, b in seen for n, a in a.items())
    monkeypatch.setattr(flora.group, "bounded", dict)
    [plain] = fit([group])
    agree(less.adapters, {name: dense(a) for name, a in plain.adapters.items()})
    assert ranks(less) == ranks(plain) == {36}
    monkeypatch.setattr(flora.group, "bounded", lambda adapters: {n: flora.truncate(a, 4) for n, a in adapters.items()})
    assert relative(whole(fit([group])[0].adapters), whole(plain.adapters)) > 1e-3          # what the members see counts


def test_bounded_leaves_what_it_cannot_shorten():
    a = start_of(9)
    assert flora.group.bounded(a)[LAYER] is a[LAYER]            # over 16 / 2, and of full rank
    twice = flora.group.concatenated([a, a])
    less = flora.group.bounded(twice)[LAYER]
    assert less.rank == 9 and relative(dense(less), dense(twice[LAYER])) < 1e-6


@pytest.mark.parametrize("rank", [1, 5, 100])
def test_an_answer_may_be_compressed_and_says_what_that_lost(rank):
    group = Group("g", clients_of(8, 4), 2)
    [plain], [cut] = fit([group]), fit([replace(group, rank=rank)])
    assert "compress_error" not in plain.metrics and ranks(plain) == {24}
    assert max(ranks(cut)) == min(rank, 24)
    error = float((whole(cut.adapters) - whole(plain.adapters)).norm() / whole(plain.adapters).norm())
    assert cut.metrics["compress_error"] == pytest.approx(error, rel=1e-3, abs=1e-6) and (error > 1e-3) == (rank < 24)
    best = {name: flora.compress(a, rank) for name, a in plain.adapters.items()}
    agree(cut.adapters, {name: dense(a) for name, a in best.items()}, 1e-5)
    [top] = fit([Group("top", [replace(group, rank=rank), client(7)])])
    assert top.metrics["compress_error"] == pytest.approx(cut.metrics["compress_error"], abs=1e-12)


def test_averaging_inside_a_group_brings_the_cross_term_back_and_stacking_does_not():
    """From one start, one inner round: the stack is Σ p_k ΔW_k of the members, the average of factors is far from it."""
    members, sent = clients_of(4, 4, 4), Broadcast(start=start_of(4))
    flat = Cohort(double(), members, CONFIG, TARGETS).fit(sent)
    exact = flora.aggregate(flat, sent=sent.start).merge
    moved = (whole(exact) - whole(sent.start)).norm()
    error = {}
    for rule in ("flora", "fedit"):
        [update] = fit([Group("g", members, inner=rule)], broadcast=sent)
        error[rule] = float((whole(update.adapters) - whole(exact)).norm() / moved)
    assert error["flora"] < 1e-6 and error["fedit"] > 1e-2
    [averaged] = fit([Group("g", members, inner="fedit")], broadcast=sent)
    assert same(averaged.adapters, flora.aggregate(flat, "fedit", sent=sent.start).start)


def test_averaging_groups_go_on_from_their_average():
    """Two inner rounds of fedit are two rounds of a cohort under fedit; without a start to go on from, one A is drawn for all."""
    members, start = clients_of(4, 4), start_of(4)
    for number in range(2):
        config = CONFIG if number == 0 else replace(CONFIG, seed=flora.seeds.derive(CONFIG.seed, "inner", 1))
        updates = Cohort(double(), members, config, TARGETS).fit(Broadcast(start=start))
        start = flora.aggregate(updates, "fedit", sent=start).start
    [got] = fit([Group("g", members, 2, inner="fedit")], broadcast=Broadcast(start=start_of(4)))
    assert ranks(got) == {4} and near(got.adapters, start, CLOSE)
    slow = replace(CONFIG, learning_rate=1e-9)
    [one], [two] = (fit([Group("g", members, inner="fedit")], slow, Broadcast(version=v)) for v in (0, 1))
    assert ranks(one) == {4} and all(relative(a.A, two.adapters[name].A) > 0.5 for name, a in one.adapters.items())
    alone = fit([Group("g", members[:1], inner="fedit")], slow)[0]
    assert all(relative(a.A, alone.adapters[n].A) < 1e-4 for n, a in one.adapters.items())  # shared, not a mean of two draws


def test_stacking_and_averaging_groups_train_in_one_batch():
    groups = [Group("s", clients_of(4, 2), 2), Group("a", clients_of(3, 3, first=2), 3, inner="fedit"),
              Group("x", clients_of(2, 4, first=4), 2, inner="flexlora")]
    sent = Broadcast(start=start_of(3))
    for group, update in zip(groups, fit(groups, broadcast=sent), strict=True):
        assert near(update.adapters, fit([group], broadcast=sent)[0].adapters, CLOSE)
    agree(fit(groups, broadcast=sent)[0].adapters, by_hand(groups[0].clients, 2, broadcast=sent))


def test_a_member_that_fails_is_left_out_and_named():
    bad, mute = client(8, learning_rate=1e300), LocalClient("mute", [LOST] * 2, 4)
    good = clients_of(4, 2)
    cohort = GroupCohort(double(), [Group("g", [good[0], bad, mute, good[1]], 2), Group("gone", [replace(mute, name="m2")], 2),
                                    Group("top", [Group("in", [replace(mute, name="m3")]), client(5)])], CONFIG, TARGETS)
    updates = cohort.fit(Broadcast())
    assert [u.client for u in updates] == ["g", "top"] and updates[0].num_examples == sum(len(c.rows) for c in good)
    assert set(cohort.failures) == {"c8", "mute", "m2", "gone", "m3", "in"}
    assert "finite loss" in cohort.failures["c8"] and "has a label" in cohort.failures["mute"]
    assert "all failed" in cohort.failures["gone"] and "all failed" in cohort.failures["in"]
    assert not any(reason.startswith("inner round") for reason in cohort.failures.values())       # the first reason stays
    agree(updates[0].adapters, by_hand(good, 2))
    assert near(updates[1].adapters, fit([client(5)])[0].adapters, CLOSE)
    assert GroupCohort(double(), [Group("gone", [mute], 2)], CONFIG, TARGETS).fit(Broadcast(start=start_of(2))) == []


def test_an_inner_round_that_nobody_survives_adds_nothing(monkeypatch):
    """The group goes on from where it was, start included, and counts who answered."""
    real = Cohort.fit

    def fit_but(self, broadcast, *rest):
        if (self.train_config.seed == CONFIG.seed) == first:
            self.failures, self.seconds = {c.name: "lost" for c in self.clients}, {}
            return []
        return real(self, broadcast, *rest)

    for first, inner, start in ((True, 1, start_of(4)), (False, 0, None)):
        with monkeypatch.context() as patch:
            patch.setattr(Cohort, "fit", fit_but)
            cohort = GroupCohort(double(), [Group("g", clients_of(4, 2), 2)], CONFIG, TARGETS)
            [update] = cohort.fit(Broadcast(start=start))
        config = CONFIG if inner == 0 else replace(CONFIG, seed=flora.seeds.derive(CONFIG.seed, "inner", 1))
        alone = Cohort(double(), clients_of(4, 2), config, TARGETS).fit(Broadcast(start=start))
        assert same(update.adapters, flora.aggregate(alone, sent=start).merge) and update.metrics["inner_rounds"] == 1
        assert cohort.failures["c0"] == ("lost" if first else "inner round 1: lost")


def test_metrics_sum_over_members_and_inner_rounds():
    group, seen = Group("g", [client(0, max_steps=1), client(1, max_steps=3)], 2), []
    cohort = GroupCohort(double(), [group, client(4)], CONFIG, TARGETS)
    update, beside = cohort.fit(Broadcast(), on_step=lambda *step: seen.append((*step, cohort.tokens_per_second > 0)))
    losses = [loss for name, *_, loss, _ in seen if name != "c4"]
    assert update.metrics["steps"] == len(losses) == 8 and update.metrics["loss"] == pytest.approx(sum(losses) / 8)
    last = {name: loss for name, _, _, loss, _ in seen}
    assert update.metrics["last_loss"] == pytest.approx((3 * last["c0"] + 4 * last["c1"]) / 7)
    assert update.num_examples == 7 and update.client == "g" and update.base is None and all(alive for *_, alive in seen)
    assert cohort.rate > 0 and {"forward", "backward", "group"} <= set(cohort.seconds) and cohort.failures == {}
    tokens = {u.client: u.metrics["tokens"] for u in Cohort(double(), group.clients, CONFIG, TARGETS).fit(Broadcast())}
    assert update.metrics["tokens"] > sum(tokens.values()) and update.metrics["seconds"] > 0 and beside.metrics["steps"] == 2


def test_optimizer_states_of_clients_go_on_through_inner_rounds():
    states = {}
    GroupCohort(double(), [Group("g", clients_of(4, 2), 3)], CONFIG, TARGETS, optimizer_states=states).fit(Broadcast())
    assert set(states) == {"c0", "c1"} and float(states["c0"][f"{LAYER}/A/step"]) == 3 * CONFIG.max_steps


def test_what_a_group_refuses():
    one = client(0)
    for settings, says in (({"members": []}, "at least one member"), ({"inner_rounds": 0}, "inner_rounds of at least 1"),
                           ({"depth": 0}, "depth of at least 1"), ({"rank": 0}, "rank of at least 1"),
                           ({"depth": 1.0}, "a whole depth"),
                           ({"members": [one, one]}, "different names"), ({"name": "c0"}, "different names"),
                           ({"members": [Group("h", [one]), Group("h", [client(1)])]}, "different names"),
                           ({"members": [replace(one, start=start_of(2))]}, "start of its own")):
        with pytest.raises(ConfigError, match=says):
            Group(**{"name": "g", "members": [one], **settings})
    with pytest.raises(StrategyError, match="Did you mean 'fedit'"):
        Group("g", [one], inner="fedi")
    for name in ("ffa", "rolora", "fedsb", "standalone", "fedsa", "full", "centralized", "fedex", "hetlora", "raflora"):
        with pytest.raises(StrategyError, match=f"got {name}. Use flora"):
            Group("g", [one], inner=name)
    with pytest.raises(StrategyError, match='h.*answers with what flora makes.*inner="fedit"'):
        Group("g", [Group("h", [one])], inner="fedit")
    assert Group("g", [Group("h", [one], inner="fedit")], inner="fedit").clients == [one]
    assert Group("g", [Group("h", [one], inner="fedit")]).inner == "flora"


def test_what_a_cohort_of_groups_refuses():
    shared = client(0)
    with pytest.raises(ConfigError, match="client in one group"):
        fit([Group("g", [shared]), Group("h", [shared])])
    with pytest.raises(ConfigError, match="depth of at most 2.*got 3"):
        fit([Group("top", [Group("g", [shared], depth=3)])])
    with pytest.raises(ConfigError, match=r"c0.*among the blocks that its group trains, \[1\]; got \[0\]"):
        fit([Group("top", [Group("g", [client(0, layers=[0])], depth=2)], depth=1)])
    with pytest.raises(ConfigError, match="one entry a client.*1.; got 2"):
        fit([Group("g", [shared])], frozen=[None, None])
    with pytest.raises(ConfigError, match='trains both factors, "AB"; got one that trains "B"'):
        fit([Group("g", [shared])], broadcast=Broadcast(start=start_of(4), train="B"))
    with pytest.raises(StrategyError, match="one rank"):
        fit([Group("g", clients_of(4, 2), inner="fedit")])


def test_the_least_depth_above_a_client_holds():
    tree = [Group("top", [Group("g", [client(0)], depth=2), client(1), client(2, layers=[0, 1])], depth=1)]
    assert set(fit(tree)[0].adapters) == {name for name in SHAPES if ".1." in name}
    assert set(fit([Group("top", [Group("g", [client(0)], depth=1)], depth=2)])[0].adapters) == {n for n in SHAPES if ".1." in n}
    assert set(fit([Group("top", [Group("g", [client(0)], depth=1), client(1)])])[0].adapters) == set(SHAPES)


@pytest.mark.parametrize("options", [{}, {"start": "warm"}])
def test_a_server_of_groups_with_one_inner_round_runs_as_one_of_their_clients(options):
    """Two rounds: sampling, weights, what a run fills in and versions take a group for a client."""
    clients = clients_of(4, 2, 3)
    models: dict = {}
    for kind, members in (("flat", clients), ("groups", [Group("a", clients[:2]), clients[2]])):
        model = models[kind] = double()
        shapes = {name: tuple(shape) for name, shape in SHAPES.items()}
        server = Server("flora", members, replace(first_broadcast("flora", shapes, members, 3, options), run="r"), options=options)
        server.rehearse()
        for number in range(2):
            updates = GroupCohort(model, server.sample(number), CONFIG, TARGETS).fit(server.broadcast)
            server.close(updates)
        bring_to(model, server.broadcast)
        models[kind] = {name: dense(server.broadcast.start[name]) if server.broadcast.start else 0 for name in SHAPES}
        models[kind] = {name: model.get_submodule(name).weight.detach() + more for name, more in models[kind].items()}
    base = double().requires_grad_(False)
    for name, weight in models["flat"].items():
        moved = (weight - base.get_submodule(name).weight).norm()
        assert float((models["groups"][name] - weight).norm() / moved) < CLOSE and float(moved) > 1e-3


def test_a_server_refuses_groups_whose_answers_its_strategy_cannot_combine():
    groups = [Group("g", clients_of(4, 4))]
    for name in set(STRATEGIES) - {"flora", "flexlora", "florist"}:
        with pytest.raises(StrategyError, match="got group 'g'"):
            Server(name, groups, Broadcast())
    for name in ("flora", "flexlora", "florist"):
        Server(name, groups, Broadcast()).rehearse()
    Server("fedit", [replace(groups[0], inner="fedit")], Broadcast()).rehearse()
    with pytest.raises(StrategyError, match="one rank"):
        Server("flora", [Group("g", clients_of(4, 2), inner="fedit")], Broadcast()).rehearse()


def test_groups_are_names_of_the_package():
    assert flora.Group is flora.group.Group and flora.GroupCohort is GroupCohort
