"""Weights, what a server fills in, bad input by name, and what travels."""
import pytest
import torch
from rounds import LAYERS, Rounds, error, updates_of, wanted
from tiny import dense, same

import flora
from flora.adapter import Adapter
from flora.errors import StrategyError
from flora.messages import decode, encode
from flora.server import Server
from flora.strategies import STRATEGIES, aggregate

EVERYONE = sorted(set(STRATEGIES) - {"full"})
ONE_RANK = sorted(name for name, strategy in STRATEGIES.items() if not strategy.mixed_ranks)
SHARED = {"ffa": "A", "rolora": "A", "fedsvd": "A", "fedsb": "B"}


def good(name, ranks=(3, 3, 3), **options):
    """Updates that this rule takes."""
    return updates_of(list(ranks), shared=SHARED.get(name, ""), **options)


@pytest.mark.parametrize("name", ["flora", "ffa", "rolora", "fedsvd", "fedsb", "fedex"])
@pytest.mark.parametrize(("weights", "p"), [("examples", [1 / 12, 4 / 12, 7 / 12]), ("uniform", [1 / 3] * 3),
                                            ("tokens", [1 / 6, 2 / 6, 3 / 6])])
def test_weights_by_examples_uniform_or_tokens(name, weights, p):
    broadcast = aggregate(good(name), name, weights=weights)
    for layer in LAYERS:
        total = sum(dense(part[layer]) for part in (broadcast.merge, broadcast.start) if part is not None)
        assert error(total, wanted(good(name), layer, p)) < 1e-6


def test_a_fixed_factor_scales_every_client_alike():
    """The paper's study: 0.05 for each of three clients, of which the rest to 1 is the start that was sent, or nothing."""
    updates = good("flora")
    sent = aggregate(good("flora", examples=[1, 1, 1]), "flexlora").start
    for layer in LAYERS:
        step = wanted(updates, layer, [0.05] * 3)
        assert error(dense(aggregate(updates, weights=0.05).merge[layer]), step) < 1e-6
        assert error(dense(aggregate(updates, weights=0.05, sent=sent).merge[layer]), step + 0.85 * dense(sent[layer])) < 1e-6
    for bad in (0.0, -1.0, float("nan"), float("inf"), True, "size", None):
        with pytest.raises(StrategyError, match="weights"):
            aggregate(updates, weights=bad)


@pytest.mark.parametrize("name", ["fedit", "zeropad", "fedsa", "ffa", "rolora", "fedsvd", "fedsb", "fedex"])
@pytest.mark.parametrize("options", [{"weights": 0.1}, {"server_lr": 0.5}])
def test_a_step_of_factors_needs_to_know_where_it_starts(name, options):
    """Σ c A_k with Σ c = 0.3 would shrink the product by 0.09."""
    with pytest.raises(StrategyError, match="expected sent, the start"):
        aggregate(good(name), name, **options)
    with pytest.raises(StrategyError, match="server_lr"):
        aggregate(good(name), name, server_lr=0.0)


def test_tokens_that_nobody_counted_are_asked_for():
    updates = good("flora")
    updates[1].metrics.clear()
    with pytest.raises(StrategyError, match=r'client c1: expected metrics\["tokens"\].*got None'):
        aggregate(updates, weights="tokens")


@pytest.mark.parametrize("name", ONE_RANK)
def test_mixed_ranks_name_those_who_take_them(name):
    named = "flora, zeropad, hetlora, flexlora, florist, raflora"
    updates = good(name, (3, 3, 2))
    said = rf"one rank; got ranks \[3, 2\].*takes mixed ranks: {named}\.$"
    with pytest.raises(StrategyError, match=said):
        aggregate(updates, name)
    if name != "centralized":                                   # which pools them into one client of the largest rank
        with pytest.raises(StrategyError, match=said):
            STRATEGIES[name].begin(LAYERS, [3, 2], 0)


def test_ranks_may_differ_from_layer_to_layer():
    updates = updates_of([3, 3])
    for u in updates:
        u.adapters["blocks.0.v"] = flora.truncate(u.adapters["blocks.0.v"], 2)
    assert {a.rank for a in aggregate(updates, "fedit").start.values()} == {3, 2}


@pytest.mark.parametrize("name", ["fedit", "zeropad", "hetlora", "fedsa", "ffa", "rolora", "fedsvd", "fedsb", "fedex"])
def test_mixed_alpha_is_refused_by_an_average(name):
    options = {} if name == "fedsa" else {"mixed_alpha": "refuse"}
    with pytest.raises(StrategyError, match=r"blocks.0.q: expected one scale \(alpha / r\).*got \[1.0, 2.0\].*flora"):
        aggregate(good(name, alphas=[6.0, 6.0, 3.0]), name, **options)
    if name in ("zeropad", "hetlora"):
        aggregate(good(name, (4, 2, 1)), name, mixed_alpha="refuse")        # 2r: one scale at three ranks
    elif name != "fedsa":
        with pytest.raises(StrategyError, match="expected one scale"):
            aggregate(good(name, alphas=[6.0, 6.0, 3.0]), name)
        assert aggregate(good(name, alphas=[6.0, 6.0, 3.0]), name, mixed_alpha="fold").start
        with pytest.raises(StrategyError, match="mixed_alpha"):
            aggregate(good(name), name, mixed_alpha="yes")


@pytest.mark.parametrize("name", sorted(SHARED))
def test_another_shared_factor_is_refused(name):
    factor = SHARED[name]
    updates = good(name)
    a = updates[2].adapters["blocks.0.v"]
    other = getattr(a, factor).clone()
    other[0, 0] += 1e-6
    updates[2].adapters["blocks.0.v"] = Adapter(other, a.B, a.scale) if factor == "A" else Adapter(a.A, other, a.scale)
    with pytest.raises(StrategyError, match=f"blocks.0.v: expected one {factor}, the same.*number 2"):
        aggregate(updates, name)
    updates[2].adapters["blocks.0.v"] = a.to(torch.bfloat16)        # rounded on the way: no longer the same
    with pytest.raises(StrategyError, match="blocks.0.v: expected one"):
        aggregate(updates, name)


@pytest.mark.parametrize("name", EVERYONE)
def test_zero_examples_and_no_layers_are_refused(name):
    nobody = [flora.Update(u.adapters, 0, {}, 0, u.client) for u in good(name)]
    with pytest.raises(StrategyError, match="client c0: expected num_examples of at least 1; got 0. Leave"):
        aggregate(nobody, name)
    with pytest.raises(StrategyError, match="at least one layer"):
        aggregate([flora.Update({}, 1)], name)


def test_weights_and_adapters_do_not_stand_in_for_each_other():
    dense_one = flora.Update({}, 1, base={"l": torch.zeros(3, 2)})
    with pytest.raises(StrategyError, match="expected adapters for strategy flora; got weights"):
        aggregate([dense_one])
    with pytest.raises(StrategyError, match=r"expected weights \(Update.base\) for strategy full; got adapters"):
        aggregate(good("flora"), "full")
    with pytest.raises(StrategyError, match="l: expected finite"):
        aggregate([flora.Update({}, 1, base={"l": torch.full((3, 2), float("nan"))})], "full")
    with pytest.raises(StrategyError, match="got the factor 0.1"):
        aggregate([dense_one], "full", weights=0.1)


def test_options_out_of_range_are_refused():
    for name, options, says in (("florist", {"threshold": 0.0}, "threshold"), ("florist", {"threshold": 1.1}, "threshold"),
                                ("flora", {"start": "cold"}, "start="), ("fedex", {"absent": "skip"}, "absent")):
        with pytest.raises(StrategyError, match=says):
            aggregate(good(name), name, **options)
    with pytest.raises(StrategyError, match="start="):
        STRATEGIES["flora"].begin(LAYERS, [4], 0, 2.0, start="cold")


def test_a_server_fills_in_what_the_run_knows():
    """r_min over clients that were not sampled, the run's scale, its seed, and the start of the round; what was given holds."""
    run = Rounds("flora", [5, 4, 2], options={"start": "warm"})
    run.round([0, 1])
    assert all(a.rank == 2 and set(a.scale.tolist()) == {2.0} for a in run.server.broadcast.start.values())
    given = Rounds("flora", [5, 4, 2], options={"start": "warm", "ranks": [3], "scale": 0.5})
    given.round([0, 1])
    assert all(a.rank == 3 and set(a.scale.tolist()) == {0.5} for a in given.server.broadcast.start.values())
    flex = Rounds("flexlora", [2, 4, 5])
    flex.round([0, 1])
    assert all(a.rank == 5 for a in flex.server.broadcast.start.values())
    with pytest.raises(StrategyError, match="no option 'begin'"):
        Rounds("flora", [2], options={"begin": "warm"}).round()
    with pytest.raises(StrategyError, match="no options with a stream"):
        Server("flora", [], flora.Broadcast(), stream=object(), options={"start": "warm"})
    hetlora = Rounds("hetlora", [2, 2])
    hetlora.round()                                             # has no option weights: its weights are the norms


@pytest.mark.parametrize("name", EVERYONE)
def test_what_each_rule_sends_survives_the_wire(name):
    broadcast = aggregate(good(name), name)
    back = decode(encode(broadcast), LAYERS)
    assert back.train == broadcast.train and back.version == broadcast.version
    for part in ("merge", "start"):
        one, other = getattr(broadcast, part), getattr(back, part)
        assert (one is None) == (other is None) and (one is None or same(dict(sorted(one.items())), dict(sorted(other.items()))))


def test_dense_updates_and_broadcasts_survive_the_wire():
    update = flora.Update({}, 3, {"tokens": 7.0}, 1, "c", base={n: torch.randn(s) for n, s in LAYERS.items()})
    back = decode(encode(update), LAYERS)
    assert all(torch.equal(back.base[n], update.base[n]) for n in LAYERS) and back.adapters == {} and back.metrics == {"tokens": 7}
    assert decode(encode(flora.Update({}, 3))).base is None
    sent = decode(encode(aggregate([update], "full")), LAYERS)
    assert sent.train == "weight" and all(torch.equal(sent.base[n], update.base[n]) for n in LAYERS)
