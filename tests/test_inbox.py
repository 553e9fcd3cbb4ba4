"""What a server lets into a round: each update is judged alone, and a bad one costs its sender only."""
from dataclasses import replace

import pytest
import torch
from rounds import LAYERS, wanted
from tiny import adapter, dense, same

from flora.adapter import Adapter, truncate
from flora.client import LocalClient
from flora.errors import MessageError, StrategyError
from flora.group import Group
from flora.inbox import Trust
from flora.messages import Broadcast, Limits, Update, encode
from flora.server import Server, first_broadcast
from flora.strategies.robust import Robust

ROWS = [{"input_ids": [1, 2], "labels": [1, 2]}]


def server(strategy="flora", ranks=(4, 4, 4, 4), **options):
    clients = [LocalClient(f"c{k}", ROWS, rank, 8) for k, rank in enumerate(ranks)]
    return Server(strategy, clients, replace(first_broadcast(strategy, LAYERS, clients), run="r"), shapes=LAYERS, **options)


def answer(one, k, **changes):
    """What client k sends: its start (where there is one) with noise on what trains."""
    sent, rank = one.broadcast.start or {}, one.clients[k].rank
    adapters = {}
    for i, (name, shape) in enumerate(LAYERS.items()):
        a = truncate(sent[name], rank) if name in sent else adapter(rank, shape, 9 * k + i, 8)
        noise, train = adapter(rank, shape, 70 + 9 * k + i), one.broadcast.train
        adapters[name] = Adapter(a.A + 0.1 * noise.A * ("A" in train), a.B + 0.1 * noise.B * ("B" in train), a.scale)
    return replace(Update(adapters, k + 1, {"tokens": 10.0 * (k + 1)}, one.broadcast.version, f"c{k}"), **changes)


def with_layer(update, name="blocks.0.q", **changes):
    a = update.adapters[name]
    fields = {"A": a.A, "B": a.B, "scale": a.scale, **changes}
    return replace(update, adapters={**update.adapters, name: Adapter(**fields)})


def poisoned(update):
    bad = update.adapters["blocks.0.q"].B.clone()
    bad[0, 0] = float("nan")
    return with_layer(update, B=bad)


BAD = {"an unknown client": (lambda u: replace(u, client="eve"), "got one of 'eve'"),
       "a version ahead": (lambda u: replace(u, base_version=9), "version 0 of the base"),
       "NaN": (poisoned, "finite numbers"),
       "another layer": (lambda u: replace(u, adapters={"lm_head": adapter(4, (13, 7))}), "layers of this run"),
       "another shape": (lambda u: replace(u, adapters={"blocks.0.q": adapter(4, (7, 13))}), r"\(out, in\)"),
       "a rank above its own": (lambda u: replace(u, adapters={"blocks.0.q": adapter(5, (13, 7))}), "rank 4, its own; got 5"),
       "no examples": (lambda u: replace(u, num_examples=0), "num_examples"),
       "no update": (lambda u: encode(Broadcast(run="r")), "of kind update; got broadcast"),
       "a changed byte": (lambda u: encode(u)[:-1] + b"\x99", "digest"),
       "half of it": (lambda u: encode(u)[:200], "expected"),
       "no bytes": (lambda u: b"", "expected")}


@pytest.mark.parametrize("what", list(BAD))
@pytest.mark.parametrize("strategy", ["flora", "fedit", "zeropad", "flexlora", "ffa", "rolora", "fedex", "hetlora"])
def test_a_bad_update_costs_its_sender_only(strategy, what):
    change, says = BAD[what]
    one, other = server(strategy), server(strategy)
    good = {f"c{k}": answer(one, k) for k in (0, 1, 3)}
    refused = one.take({**good, "c2": change(answer(one, 2))})
    assert set(refused) == {"c2"} and one.short() == ""
    with pytest.raises((StrategyError, MessageError), match=says):
        server(strategy).receive(change(answer(one, 2)), "c2")
    mine, others = one.close(), other.close(list(good.values()))
    assert same(mine.merge or mine.start, others.merge or others.start)


def test_bytes_and_updates_are_the_same_to_a_round():
    one, other = server("ffa"), server("ffa")
    updates = [answer(one, k) for k in range(4)]
    assert one.take({u.client: encode(u, one.broadcast) for u in updates}) == {}
    assert same(one.close().start, other.close(updates).start)
    with pytest.raises(StrategyError, match="has sent one already"):
        other.receive(answer(other, 0)), other.receive(answer(other, 0))


def test_limits_hold_for_bytes():
    one = server(trust=Trust(limits=Limits(max_examples=3)))
    assert set(one.take({f"c{k}": encode(answer(one, k)) for k in range(4)})) == {"c3"}


@pytest.mark.parametrize(("strategy", "factor"), [("ffa", "A"), ("rolora", "A"), ("fedsvd", "A")])
def test_what_was_not_to_train_must_come_back_to_the_bit(strategy, factor):
    """Else one client stops the round of all: the average of B needs one A."""
    one = server(strategy)
    lie = answer(one, 0)
    other = getattr(lie.adapters["blocks.0.q"], factor).clone()
    other[0, 0] += 1e-6
    assert "expected the A that it was sent" in one.take({"c0": with_layer(lie, **{factor: other})})["c0"]
    assert one.take({"c1": answer(one, 1)}) == {}
    one.close()


@pytest.mark.parametrize("strategy", ["fedit", "ffa", "fedex"])
def test_another_scale_is_refused_where_factors_are_averaged(strategy):
    one = server(strategy)
    assert "the scale that it was sent" in one.take({"c0": with_layer(answer(one, 0), scale=torch.full((4,), 3.0))})["c0"]
    mixed = server("zeropad", ranks=(4, 2, 1, 4))
    assert mixed.take({f"c{k}": answer(mixed, k) for k in range(4)}) == {}
    low = server("fedit")
    assert "rank 4, its own; got 2" in low.take({"c0": replace(answer(low, 0), adapters={"blocks.0.q": adapter(2, (13, 7))})})["c0"]


def test_a_group_answers_with_any_rank_and_a_server_without_shapes_asks_for_none():
    clients = [LocalClient(f"c{k}", ROWS, 4, 8) for k in range(4)]
    one = Server("flora", [Group("g", clients)], Broadcast(run="r"), shapes=LAYERS)
    assert one.take({"g": Update({"blocks.0.q": adapter(16, (13, 7))}, 4, {}, 0, "g")}) == {}
    loose = Server("flora", clients, Broadcast(run="r"))
    assert loose.take({"c0": Update({"any": adapter(9, (2, 3))}, 4, {}, 0, "c0")}) == {}


def test_too_few_answers_leave_the_model_as_it_was():
    one = server(trust=Trust(min_clients=3))
    before = one.broadcast
    one.take({f"c{k}": answer(one, k) for k in (0, 1)})
    assert one.short() == "expected answers of at least 3 clients (min_clients); got 2"
    assert one.close() is before and one.broadcast is before
    one.take({f"c{k}": answer(one, k) for k in range(3)})       # the two of before are forgotten, and may answer again
    assert one.short() == "" and one.close().version == 1
    for how in ("clip", "krum", "trim"):
        few = server(trust=Trust(robust=Robust(how)))
        few.take({f"c{k}": answer(few, k) for k in (0, 1)})
        assert f"at least 3 answers for robust {how}" in few.short() and few.close().version == 0


@pytest.mark.parametrize("weighting", ["examples", "uniform", "tokens"])
def test_a_late_update_counts_less_in_the_round_that_takes_it(weighting):
    one = server(trust=Trust(staleness=0.5), weighting=weighting)
    late = answer(one, 2)
    one.close([answer(one, 0)])
    one.close([answer(one, 1)])
    now = [answer(one, 0), answer(one, 3)]
    count = {"examples": lambda u: u.num_examples, "uniform": lambda u: 1, "tokens": lambda u: u.metrics["tokens"]}[weighting]
    weights = [count(now[0]), 0.25 * count(late), count(now[1])]
    following = one.close([*now, late])
    for layer in LAYERS:
        exact = wanted([now[0], late, now[1]], layer, [w / sum(weights) for w in weights])
        assert float((dense(following.merge[layer]) - exact).norm()) <= 1e-6 * float(exact.norm())
    with pytest.raises(StrategyError, match="version 3 of the base; got others from c2"):
        one.receive(replace(answer(one, 2), base_version=4))


def test_a_late_update_is_refused_unless_it_is_said_what_it_counts():
    one = server()
    late = answer(one, 2)
    one.close([answer(one, 0)])
    with pytest.raises(StrategyError, match="version 1 of the base; got others from c2"):
        one.receive(late)
    for strategy in ("ffa", "rolora", "fedsvd", "fedsb", "hetlora", "fedsa", "standalone", "full"):
        with pytest.raises(StrategyError, match=f"trains both factors in every round; got {strategy}"):
            server(strategy, trust=Trust(staleness=0.5))
    with pytest.raises(StrategyError, match="weighting 0.3"):
        server(weighting=0.3, trust=Trust(staleness=0.5))


def test_a_guard_says_whom_it_left_out():
    one = server(ranks=(4,) * 7, trust=Trust(robust=Robust("krum", 0.2)))
    answers = {f"c{k}": replace(answer(one, 0), client=f"c{k}") for k in range(7)}
    answers["c4"] = replace(answers["c4"], adapters={n: a * -1.0 for n, a in answers["c4"].adapters.items()})
    assert one.take(answers) == {}
    following = one.close()
    assert set(one.sifted.left_out) == {"c4"} and "Krum" in one.sifted.left_out["c4"]
    exact = wanted([answer(one, 0)], "blocks.0.q", [1.0])
    assert float((dense(following.merge["blocks.0.q"]) - exact).norm()) <= 1e-6 * float(exact.norm())


def test_trust_that_makes_no_sense_is_refused():
    for bad, says in (({"min_clients": 0}, "min_clients"), ({"staleness": 0.0}, r"staleness in \(0, 1\]"),
                      ({"staleness": 1.5}, r"staleness in \(0, 1\]")):
        with pytest.raises(StrategyError, match=says):
            Trust(**bad)
    with pytest.raises(StrategyError, match="robust clip: expected a strategy whose clients send whole adapters; got fedsa"):
        server("fedsa", trust=Trust(robust=Robust("clip")))
