"""The rules that are not Σ p_k s_k B_k A_k: each against its own dense formula in fp64, and checked to differ from the sum."""
import pytest
import torch
from rounds import LAYERS, Rounds, error, shares, updates_of, wanted, within
from tiny import adapter, dense, same

import flora
from flora.adapter import Adapter, combine
from flora.errors import AdapterError, StrategyError
from flora.strategies import STRATEGIES, aggregate, come_home, leave_home
from flora.strategies.average import pruned_rank, tail

RANKS = [7, 4, 3, 1]


def padded_average(updates, layer, p, dtype=torch.float64):
    """Pad, write every client at the mean scale (the change split evenly between A and B), average: dense."""
    adapters = [u.adapters[layer] for u in updates]
    rank, (out, inn) = max(a.rank for a in adapters), adapters[0].shape
    common = sum(pk * float(a.scale[0]) for pk, a in zip(p, adapters, strict=True))
    A, B = torch.zeros(rank, inn, dtype=dtype), torch.zeros(out, rank, dtype=dtype)
    for pk, a in zip(p, adapters, strict=True):
        root = (float(a.scale[0]) / common) ** 0.5
        A[:a.rank] += pk * root * a.A.to(dtype)
        B[:, :a.rank] += pk * root * a.B.to(dtype)
    return common * (B @ A)


@pytest.mark.parametrize("alphas", [None, [16.0] * 4], ids=["alpha 2r", "one alpha: four scales"])
@pytest.mark.parametrize("name", ["zeropad", "hetlora"])
def test_padded_averages(name, alphas):
    updates = updates_of(RANKS, alphas)
    start = aggregate(updates, name).start
    for layer in LAYERS:
        p = shares(updates)
        if name == "hetlora":                                   # the norm of ΔW_k, layer by layer
            norms = [float(dense(u.adapters[layer]).norm()) for u in updates]
            p = [n / sum(norms) for n in norms]
        exact, compared = padded_average(updates, layer, p), padded_average(updates, layer, p, torch.float32)
        assert start[layer].rank == 7 and within(dense(start[layer]), compared, exact)
        assert error(dense(start[layer]), wanted(updates, layer, p)) > 0.1


def test_hetlora_with_nothing_trained_counts_everybody_alike():
    updates = updates_of([3, 3])
    still = [flora.Update({n: Adapter(a.A, a.B * 0, a.scale) for n, a in u.adapters.items()}, 1, {}, 0, u.client) for u in updates]
    for layer, a in aggregate(still, "hetlora").start.items():
        assert torch.allclose(a.A, (updates[0].adapters[layer].A + updates[1].adapters[layer].A) / 2)


def test_hetlora_prunes_ranks_that_shrank():
    before = {"l": adapter(10, (13, 7), 1)}
    shrunk = {"l": Adapter(before["l"].A, before["l"].B * torch.tensor([1.0] * 8 + [0.5] * 2), before["l"].scale)}
    grown = {"l": Adapter(before["l"].A, before["l"].B * 2, before["l"].scale)}
    assert pruned_rank(before, shrunk, 10, 0.85) == 8 and pruned_rank(before, grown, 10, 0.85) == 10
    assert pruned_rank(before, before, 10, 0.85) == 10 and pruned_rank({}, {}, 1, 0.5) == 1
    a = before["l"]
    assert float(tail(before, 8)) == pytest.approx(float(a.B[:, 8:].norm() * a.A[8:].norm()))
    B = a.B.clone().requires_grad_()
    tail({"l": Adapter(a.A, B, a.scale)}, 8).backward()
    assert not B.grad[:, :8].any() and bool(B.grad[:, 8:].any())
    with pytest.raises(StrategyError, match=r"decay in \(0, 1\)"):
        pruned_rank(before, shrunk, 10, 1.0)


def svd_part(exact, rank):
    U, sigma, Vh = torch.linalg.svd(exact, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("alphas", [None, [1.0, 64, 2, 8]], ids=["2r", "mixed"])
def test_flexlora_is_the_best_of_each_rank_of_the_sum(alphas):
    updates = updates_of([4, 3, 2, 1], alphas)
    start = aggregate(updates, "flexlora", scale=0.5).start
    for layer in LAYERS:
        exact = wanted(updates, layer)
        assert start[layer].rank == 4 and start[layer].scale.tolist() == [0.5] * 4
        for rank in (1, 2, 3, 4):                               # what a client of this rank holds of it
            best = svd_part(exact, rank)
            assert within(dense(flora.truncate(start[layer], rank)), svd_part(exact.float(), rank), best)
        assert error(dense(start[layer]), exact) > 0.01
    assert all(a.rank == 2 for a in aggregate(updates, "flexlora", ranks=[2, 1]).start.values())


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 1.0])
def test_florist_keeps_the_fewest_singular_values_that_hold_the_threshold(threshold):
    updates = updates_of([4, 3, 2, 1])
    start = aggregate(updates, "florist", threshold=threshold).start
    for layer in LAYERS:
        exact = wanted(updates, layer)
        energy = torch.linalg.svdvals(exact).square()
        share = energy.cumsum(0) / energy.sum()
        rank = 1 + int((share < threshold - 1e-9).sum())
        assert start[layer].rank == rank
        assert within(dense(start[layer]), svd_part(exact.float(), rank), svd_part(exact, rank))
        assert (error(dense(start[layer]), exact) < 1e-6) == (threshold == 1.0)


def test_raflora_averages_each_rank_over_those_who_have_it():
    updates = updates_of([4, 3, 3, 1], [8.0, 6.0, 60.0, 1.0])
    start, p = aggregate(updates, "raflora").start, shares(updates)
    for layer in LAYERS:
        exact = torch.zeros(LAYERS[layer], dtype=torch.float64)
        for i in range(4):
            have = [(u.adapters[layer], pk) for u, pk in zip(updates, p, strict=True) if u.adapters[layer].rank > i]
            for a, pk in have:
                exact += pk / sum(q for _, q in have) * float(a.scale[i]) * torch.outer(a.B[:, i].double(), a.A[i].double())
        assert within(dense(start[layer]), svd_part(exact.float(), 4), svd_part(exact, 4))
        assert error(dense(start[layer]), svd_part(wanted(updates, layer), 4)) > 0.1
    even = updates_of([3] * 4)
    for layer in LAYERS:                                        # with one rank it is flexlora
        assert error(dense(aggregate(even, "raflora").start[layer]), dense(aggregate(even, "flexlora").start[layer])) < 1e-6


def test_raflora_keeps_the_energy_of_high_ranks_where_flexlora_loses_it():
    """Clients that train nothing, round after round: only the rule decays the ranks that few clients hold."""
    full = {"l": flora.rescale(flora.compress(adapter(8, (40, 24), 1)), 2.0)}
    energy = {}
    for name in ("flexlora", "raflora"):
        start = full
        for version in range(5):
            updates = [flora.Update({"l": flora.truncate(start["l"], rank)}, 1, {}, version, f"c{rank}") for rank in (2, 8)]
            start = aggregate(updates, name, ranks=[2, 8], scale=2.0).start
        energy[name] = float(dense(flora.truncate(start["l"], 8)).norm() ** 2 - dense(flora.truncate(start["l"], 2)).norm() ** 2)
    assert energy["raflora"] > 100 * energy["flexlora"]


def test_fedsa_averages_a_and_sees_no_b():
    updates = updates_of([3] * 4)
    start = aggregate(updates, "fedsa").start
    blind = [flora.Update(leave_home(u.adapters, "B"), u.num_examples, {}, 0, u.client) for u in updates]
    assert same(start, aggregate(blind, "fedsa").start) and STRATEGIES["fedsa"].home == "B"
    for layer in LAYERS:
        exact = sum(p * u.adapters[layer].A.double() for u, p in zip(updates, shares(updates), strict=True))
        compared = sum(p * u.adapters[layer].A for u, p in zip(updates, shares(updates), strict=True))
        assert within(start[layer].A.double(), compared, exact) and not start[layer].B.any()
        mine = come_home(start, updates[2].adapters, "B")[layer]
        assert torch.equal(mine.B, updates[2].adapters[layer].B) and torch.equal(mine.A, start[layer].A)
        assert error(dense(mine), wanted(updates, layer)) > 0.1
    assert same(come_home(start, {}, "B"), start) and same(come_home(start, updates[2].adapters, ""), start)
    assert same(come_home(start, updates[2].adapters, "AB"), updates[2].adapters)
    assert not any(a.A.any() or a.B.any() for a in leave_home(updates[0].adapters, "AB").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_is_the_average_of_the_weights(dtype):
    draw = torch.Generator().manual_seed(0)
    weights = [{n: torch.randn(s, generator=draw).to(dtype) for n, s in LAYERS.items()} for _ in range(3)]
    updates = [flora.Update({}, k + 1, {}, 4, f"c{k}", base=w) for k, w in enumerate(weights)]
    broadcast = aggregate(updates, "full")
    assert broadcast.version == 5 and broadcast.merge is None and broadcast.start is None and broadcast.train == "weight"
    for layer in LAYERS:
        exact = sum((k + 1) / 6 * w[layer].double() for k, w in enumerate(weights))
        compared = sum((k + 1) / 6 * w[layer] for k, w in enumerate(weights))
        assert broadcast.base[layer].dtype == dtype and within(broadcast.base[layer].double(), compared, exact)
    del weights[0]["blocks.0.q"]
    kept = aggregate(updates, "full").base["blocks.0.q"].double()
    assert error(kept, (2 * weights[1]["blocks.0.q"].double() + 3 * weights[2]["blocks.0.q"].double()) / 5) < 1e-2


@pytest.mark.parametrize("name", ["fedit", "zeropad", "hetlora", "flexlora", "florist", "raflora", "fedsa"])
def test_inexact_rules_drift_from_the_sum_and_stay_finite_over_rounds(name):
    run = Rounds(name, [3] * 4 if name in ("fedit", "fedsa") else [5, 3, 2, 1], shapes={"l": (40, 30)})
    for _ in range(3):
        updates = run.round()
        assert error(run.model()["l"], wanted(updates, "l")) > 1e-3
        assert all(bool(torch.isfinite(w).all()) for w in run.model().values())


def test_a_linear_step_on_factors_is_taken_at_the_mean_scale_by_size():
    """2 a - b of scales 1 and 4: at scale (2 · 1 + 1 · 4) / 3, the change split evenly between A and B."""
    a, b = adapter(3, (13, 7), 1, 3.0), adapter(3, (13, 7), 2, 12.0)
    got = combine([a, b], [2.0, -1.0])
    assert torch.allclose(got.scale, torch.full((3,), 2.0))
    A, B = (2 * 0.5**0.5 * getattr(a, f).double() - 2**0.5 * getattr(b, f).double() for f in "AB")
    assert error(got.A, A) < 1e-6 and error(got.B, B) < 1e-6
    with pytest.raises(AdapterError, match="one weight an adapter"):
        combine([a, b], [1.0])


@pytest.mark.parametrize("name", ["fedit", "zeropad"])
def test_a_server_learning_rate_is_a_step_from_the_start(name):
    run = Rounds(name, [3, 3], options={"server_lr": 0.25})
    for _ in range(2):
        before = run.server.broadcast.start
        updates = run.round()
        p = shares(updates)
        for layer, a in run.server.broadcast.start.items():
            for factor in ("A", "B"):
                clients = sum(pk * getattr(u.adapters[layer], factor).double() for u, pk in zip(updates, p, strict=True))
                exact = 0.75 * getattr(before[layer], factor).double() + 0.25 * clients
                assert error(getattr(a, factor), exact) < 1e-6
