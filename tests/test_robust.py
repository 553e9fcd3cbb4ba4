"""Robust filters in rank space: what they judge by equals the dense numbers, what they bound is bounded, and liars are left out."""
import math
from dataclasses import replace

import pytest
import torch
from rounds import LAYERS, updates_of
from tiny import adapter, dense, same

from flora.adapter import Adapter, truncate
from flora.errors import StrategyError
from flora.messages import Update
from flora.strategies import STRATEGIES, strategy_named
from flora.strategies.robust import Robust, change, gram, sift

RANKS = [8, 5, 3, 1, 2, 8, 4]


def flat(update, sent=None):
    """A client's change, dense and in one vector: ΔW less the start's, which it trained from."""
    parts = []
    for name, shape in LAYERS.items():
        a = update.adapters.get(name)
        own = torch.zeros(shape, dtype=torch.float64) if a is None else dense(a)
        parts.append(own - (dense(truncate(sent[name], a.rank)) if sent and name in sent else 0))
    return torch.cat([part.flatten() for part in parts])


def start(rank=6):
    return {name: adapter(rank, shape, 99 + i) for i, (name, shape) in enumerate(LAYERS.items())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sent", [None, "start"])
def test_the_gram_matrix_is_that_of_the_dense_changes(dtype, sent):
    held = start() if sent else None
    updates = updates_of(RANKS, dtype=dtype)
    updates[2] = replace(updates[2], adapters={"blocks.0.v": updates[2].adapters["blocks.0.v"]})
    rows = torch.stack([flat(u, held if len(u.adapters) == 2 else {"blocks.0.v": held["blocks.0.v"]} if held else None)
                        for u in updates])
    exact = rows @ rows.T
    assert float((gram([change(u, held) for u in updates]) - exact).norm()) <= 1e-13 * float(exact.norm())


def test_a_client_cannot_hide_by_writing_its_change_in_other_factors():
    updates = updates_of([4, 4, 4])
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    turned = {n: Adapter(turn @ a.A.double(), a.B.double() @ turn.T, a.scale) for n, a in updates[1].adapters.items()}
    one, other = gram([u.adapters for u in updates]), gram([updates[0].adapters, turned, updates[2].adapters])
    assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_clip_bounds_every_change_and_turns_none(bound):
    updates = updates_of(RANKS)
    before = [flat(u) for u in updates]
    norms = sorted(float(one.norm()) for one in before)
    limit = bound or norms[(len(norms) - 1) // 2]
    found = sift(updates, Robust("clip", bound=bound))
    assert [u.client for u in found.updates] == [u.client for u in updates] and found.left_out == {}
    for update, old, was in zip(found.updates, updates, before, strict=True):
        now = flat(update)
        if float(was.norm()) <= limit:
            assert same(update.adapters, old.adapters) and update.client not in found.shortened
            continue
        assert math.isclose(float(now.norm()), limit, rel_tol=1e-6)
        assert float(now @ was) >= (1 - 1e-12) * float(now.norm() * was.norm())
        assert math.isclose(found.shortened[update.client], limit / float(was.norm()), rel_tol=1e-6)
        assert all(torch.equal(getattr(update.adapters[n], f), getattr(a, f)) for n, a in old.adapters.items() for f in "AB")


@pytest.mark.parametrize("train", ["AB", "B", "A"])
def test_clip_takes_a_client_back_towards_the_start_it_was_sent(train):
    """Ranks 8 and above the start's are the client's own; what did not train keeps its bits."""
    sent = start()
    ranks = RANKS if train == "AB" else [6] * 5
    updates = []
    for k, rank in enumerate(ranks):
        adapters = {}
        for i, (name, shape) in enumerate(LAYERS.items()):
            cut, more = truncate(sent[name], rank), adapter(max(1, rank - 6), shape, 5 * k + i)
            A = torch.cat([cut.A, more.A]) if rank > 6 else cut.A
            B = torch.cat([cut.B, torch.zeros_like(more.B)], 1) if rank > 6 else cut.B
            noise = adapter(rank, shape, 50 + 3 * k + i)
            adapters[name] = Adapter(A + (k + 1) * noise.A * ("A" in train), B + noise.B * ("B" in train),
                                     torch.full((rank,), float(cut.scale[0])))
        updates.append(Update(adapters, 1, {}, 0, f"c{k}"))
    limit = 0.3 * min(float(flat(u, sent).norm()) for u in updates)
    found = sift(updates, Robust("clip", bound=limit), sent)
    assert set(found.shortened) == {u.client for u in updates}
    for update, old in zip(found.updates, updates, strict=True):
        assert math.isclose(float(flat(update, sent).norm()), limit, rel_tol=1e-5)
        for name, a in update.adapters.items():
            assert "A" in train or torch.equal(a.A, old.adapters[name].A)
            assert "B" in train or torch.equal(a.B, old.adapters[name].B)


def honest_and_liars(lie, count=10, liars=(3, 8)):
    """Updates that share a direction, each with as much noise of its own; two lie."""
    ranks = [8, 8, 6, 6, 4, 4, 4, 2, 8, 2][:count]
    common = {n: torch.randn(out, inn, dtype=torch.float64) for n, (out, inn) in LAYERS.items()}
    updates = []
    for k, rank in enumerate(ranks):
        adapters = {}
        for i, (name, shape) in enumerate(LAYERS.items()):
            A = adapter(rank, shape, 17 * k + i).A.double()
            B = common[name] @ A.T + 0.5 * torch.randn(shape[0], rank, dtype=torch.float64)
            adapters[name] = Adapter(A.float(), B.float(), 1.0)
        update = Update(adapters, k + 1, {}, 0, f"c{k}")
        updates.append(replace(update, adapters=lie(adapters)) if k in liars else update)
    return updates


def times(factor):
    return lambda adapters: {name: a * factor for name, a in adapters.items()}


@pytest.mark.parametrize("how", ["krum", "trim"])
@pytest.mark.parametrize("factor", [-1, -4, -100])
def test_liars_that_turn_round_are_left_out_and_nobody_else(how, factor):
    updates = honest_and_liars(times(factor))
    found = sift(updates, Robust(how, share=0.2))
    assert set(found.left_out) == {"c3", "c8"}
    assert [u.client for u in found.updates] == [f"c{k}" for k in range(10) if k not in (3, 8)]
    assert all("its change points" in why for why in found.left_out.values())


@pytest.mark.parametrize("how", ["clip", "krum", "trim"])
def test_a_long_lie_weighs_no_more_than_the_median(how):
    updates = honest_and_liars(times(1e6))
    norms = torch.stack([flat(u).norm() for u in updates])
    kept = sift(updates, Robust(how)).updates
    assert all(float(flat(u).norm()) <= float(norms.median()) * (1 + 1e-6) for u in kept)


def test_trim_leaves_out_nobody_without_a_liar_and_krum_always_does():
    updates = honest_and_liars(times(1))
    assert sift(updates, Robust("trim")).left_out == {}
    assert len(sift(updates, Robust("krum")).left_out) == 2
    more = honest_and_liars(times(-1), liars=(1, 3, 8))
    assert len(sift(more, Robust("trim")).left_out) == 2       # no more than the share that may lie


@pytest.mark.parametrize("how", ["clip", "krum", "trim"])
def test_order_does_not_matter_and_zeros_are_no_fault(how):
    updates = honest_and_liars(times(-1))
    one, other = sift(updates, Robust(how)), sift(updates[::-1], Robust(how))
    assert set(one.left_out) == set(other.left_out)
    assert {u.client for u in one.updates} == {u.client for u in other.updates}
    still = [replace(u, adapters=times(0.0)(u.adapters)) for u in updates]
    assert len(sift(still, Robust(how)).updates) >= 8


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(StrategyError, match=r'robust="clip" or "krum" or "trim"; got \'median\''):
        Robust("median")
    for share in (0.0, 0.5, -1.0, math.nan):
        with pytest.raises(StrategyError, match="share of clients"):
            Robust("trim", share)
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(StrategyError, match="positive, finite bound"):
            Robust("clip", bound=bound)
    for how, count, least in (("clip", 2, 3), ("trim", 2, 3), ("krum", 6, 7)):
        with pytest.raises(StrategyError, match=f"at least {least} updates"):
            sift(updates_of([4] * count), Robust(how, share=0.34))
    for name, rule in STRATEGIES.items():
        if name in ("fedsa", "standalone", "centralized", "full"):
            with pytest.raises(StrategyError, match=f"whole adapters; got {name}"):
                Robust("clip").refuse(rule)
        else:
            Robust("clip").refuse(strategy_named(name))
