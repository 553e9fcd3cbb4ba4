"""The rules that equal Σ p_k s_k B_k A_k, in one round and over several, each against the dense sum in fp64 by the error rule."""
import pytest
import torch
from rounds import LAYERS, PAPER, Rounds, error, plain, shares, updates_of, wanted, within
from tiny import dense, same

import flora
from flora.adapter import Adapter
from flora.frames import core, frame
from flora.strategies import STRATEGIES, aggregate

SHARED = {"ffa": ("A", 0), "rolora": ("A", 0), "rolora, A trains": ("B", 1), "fedsvd": ("A", 0), "fedsb": ("B", 0)}


@pytest.mark.parametrize("rank", [1, 3, 7, 11])
@pytest.mark.parametrize("name", SHARED)
def test_an_average_beside_a_shared_factor_is_the_sum_of_deltas(name, rank):
    shared, version = SHARED[name]
    updates = updates_of([rank] * 4, version=version, shared=shared)
    broadcast = aggregate(updates, name.split(",")[0])
    assert broadcast.merge is None and broadcast.version == version + 1
    for layer in LAYERS:
        assert within(dense(broadcast.start[layer]), plain(updates, layer), wanted(updates, layer))
        assert broadcast.start[layer].rank == rank
        if name != "fedsvd":                                    # the shared factor is passed on to the bit
            assert torch.equal(getattr(broadcast.start[layer], shared), getattr(updates[0].adapters[layer], shared))


@pytest.mark.parametrize("name", SHARED)
def test_mixed_alpha_is_exact_beside_a_shared_factor_when_folded(name):
    shared, version = SHARED[name]
    updates = updates_of([3] * 4, [1.0, 64.0, 6.0, 0.5], version=version, shared=shared)
    start = aggregate(updates, name.split(",")[0], mixed_alpha="fold").start
    for layer in LAYERS:
        assert within(dense(start[layer]), plain(updates, layer), wanted(updates, layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fedex_is_the_sum_of_deltas_and_starts_from_the_averages(dtype):
    updates = updates_of([3] * 4, dtype=dtype)
    broadcast = aggregate(updates, "fedex")
    assert same(broadcast.start, aggregate(updates, "fedit").start)
    for layer in LAYERS:
        merge, start = broadcast.merge[layer], broadcast.start[layer]
        assert within(dense(merge) + dense(start), plain(updates, layer), wanted(updates, layer))
        p = shares(updates)
        A = sum(pk * u.adapters[layer].A.double() for pk, u in zip(p, updates, strict=True))
        B = sum(pk * u.adapters[layer].B.double() for pk, u in zip(p, updates, strict=True))
        assert error(dense(start), 2.0 * B @ A) < (1e-6 if dtype == torch.float32 else 2e-2)
        assert merge.rank == 4 * 3 + 3 and error(dense(start), wanted(updates, layer)) > 0.3


@pytest.mark.parametrize("alphas", [None, [16.0] * 10, [1.0, 64, 16, 8, 8, 4, 2, 128, 0.5, 3]], ids=["2r", "one", "mixed"])
@pytest.mark.parametrize("start", ["fresh", "warm", "shared"])
def test_flora_is_exact_whatever_it_starts_from(start, alphas):
    updates = updates_of(PAPER, alphas)
    broadcast = aggregate(updates, "flora", start=start)
    for layer in LAYERS:
        total = dense(broadcast.merge[layer]) + (dense(broadcast.start[layer]) if start == "warm" else 0)
        exact = wanted(updates, layer)
        assert within(total, plain(updates, layer), exact) and error(total, exact) < 1e-6
        if start == "warm":                                     # the best part of rank 4, as the dense SVD has it
            U, sigma, Vh = torch.linalg.svd(exact)
            best = (U[:, :4] * sigma[:4]) @ Vh[:4]
            assert broadcast.start[layer].rank == 4 and error(dense(broadcast.start[layer]), best) < 1e-6
            assert len(set(broadcast.start[layer].scale.tolist())) == 1
    assert (broadcast.start is None) == (start == "fresh")
    if start == "shared":
        assert all(not a.B.any() and a.A.any() and a.rank == 64 for a in broadcast.start.values())
        assert same(broadcast.start, aggregate(updates, "flora", start=start).start)
        assert not same(broadcast.start, aggregate(updates, "flora", start=start, seed=1).start)


def test_layers_taken_by_several_threads_have_the_same_bits():
    updates, threads = updates_of(PAPER), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(aggregate(updates, "flora", start="warm"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert same(results[0].start, results[1].start) and same(results[0].merge, results[1].merge)


def test_warm_takes_the_smallest_rank_of_the_run_and_the_scale_of_the_run():
    updates = updates_of([8, 4])
    broadcast = aggregate(updates, "flora", start="warm", ranks=[8, 4, 2], scale=0.25)
    for layer, a in broadcast.start.items():
        assert a.rank == 2 and a.scale.tolist() == [0.25, 0.25]
        assert error(dense(broadcast.merge[layer]) + dense(a), wanted(updates, layer)) < 1e-6
        assert torch.allclose(a.A.norm(dim=1), a.B.norm(dim=0))


def test_a_warm_start_of_nothing_leaves_clients_to_draw_fresh_ranks():
    """Zeros on both sides have no gradient."""
    updates = [flora.Update({n: Adapter(a.A, torch.zeros_like(a.B), a.scale) for n, a in u.adapters.items()}, 1, {}, 0, u.client)
               for u in updates_of([4, 2])]
    for name, options in (("flora", {"start": "warm"}), ("flexlora", {}), ("florist", {}), ("raflora", {})):
        assert aggregate(updates, name, **options).start is None


EXACT_RUNS = {"flora": {}, "warm": {"start": "warm"}, "shared": {"start": "shared"}, "fedex": {}, "ffa": {}, "rolora": {},
              "fedsvd": {}, "fedsb": {}}


@pytest.mark.parametrize("lr", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("name", EXACT_RUNS)
def test_base_and_start_are_the_true_sum_in_every_round(name, lr):
    """W + start of round t + 1 = W + start of round t + lr · Σ p_k (what each client's model gained), with half of them sampled."""
    mixed = name in ("flora", "warm", "shared")
    strategy = "flora" if mixed else name
    run = Rounds(strategy, [5, 3, 3, 2] if mixed else [3] * 4, options=EXACT_RUNS[name] | {"server_lr": lr})
    for number in range(5):
        before, base = run.model(), dict(run.base)
        updates = run.round([(number, 3), (0, 1, 2, 3)][number % 2] if number < 3 else None)
        p = shares(updates)
        for layer in LAYERS:
            clients = sum(pk * (base[layer] + dense(u.adapters[layer])) for u, pk in zip(updates, p, strict=True))
            exact = before[layer] + lr * (clients - before[layer])
            assert error(run.model()[layer], exact) < 1e-6, (number, layer)


@pytest.mark.parametrize("name", ["warm", "fedex", "ffa"])
def test_a_client_without_a_layer_has_left_it_as_it_was_sent(name):
    """It still sees the start there: it counts as no change, in every round, also where nobody trained the layer."""
    absent = [("c0", "blocks.0.q"), ("c1", "blocks.0.q"), ("c2", "blocks.0.v")]
    run = Rounds("flora" if name == "warm" else name, [3] * 4, options=EXACT_RUNS[name], absent=absent)
    for number in range(4):
        before, base = run.model(), dict(run.base)
        updates = run.round([0, 1] if number == 2 else None)
        for layer in LAYERS:
            clients = sum(pk * (base[layer] + dense(u.adapters[layer]) if layer in u.adapters else before[layer])
                          for u, pk in zip(updates, shares(updates), strict=True))
            assert error(run.model()[layer], clients) < 1e-6, (number, layer)


def test_fedex_starts_from_the_average_of_those_who_have_the_layer():
    updates = updates_of([3, 3, 3], examples=[1, 1, 2])
    del updates[2].adapters["blocks.0.q"]
    for absent, p in (("zero", [0.25, 0.25]), ("renormalise", [0.5, 0.5])):
        broadcast = aggregate(updates, "fedex", absent=absent)
        merge, start = broadcast.merge["blocks.0.q"], broadcast.start["blocks.0.q"]
        assert error(start.A, (updates[0].adapters["blocks.0.q"].A + updates[1].adapters["blocks.0.q"].A) / 2) < 1e-6
        assert error(dense(merge) + dense(start), wanted(updates[:2], "blocks.0.q", p)) < 1e-6


def test_rolora_trains_b_first_and_then_in_turn():
    run = Rounds("rolora", [3, 3])
    seen = []
    for _ in range(4):
        before = run.server.broadcast
        run.round()
        after = run.server.broadcast
        seen.append(before.train)
        kept = "A" if before.train == "B" else "B"
        for layer in LAYERS:
            assert torch.equal(getattr(before.start[layer], kept), getattr(after.start[layer], kept))
            assert not torch.equal(getattr(before.start[layer], before.train), getattr(after.start[layer], before.train))
    assert seen == ["B", "A", "B", "A"]


@pytest.mark.parametrize("rank", [3, 7, 11, 16])
def test_fedsvd_keeps_a_orthonormal_and_follows_the_row_space(rank):
    run = Rounds("fedsvd", [rank] * 3)
    for _ in range(3):
        assert run.server.broadcast.train == "B"
        for layer, a in run.server.broadcast.start.items():
            rows = min(rank, LAYERS[layer][1])
            assert a.rank == rank and torch.allclose(a.A[:rows] @ a.A[:rows].T, torch.eye(rows), atol=1e-5)
            energy = a.B.norm(dim=0)
            assert bool((energy[:-1] >= energy[1:] - 1e-5).all())       # singular values fall
        run.round()


def test_fedsb_moves_in_a_frame_that_nobody_sends():
    run = Rounds("fedsb", [3] * 3)
    assert run.server.broadcast.train == "core"
    for _ in range(2):
        run.round()
        for layer, a in run.server.broadcast.start.items():
            A, B = frame(LAYERS[layer], 3, run.seed, layer)
            assert torch.equal(a.B, B) and torch.allclose(A @ A.T, torch.eye(3), atol=1e-6)
            assert core(a, A).shape == (3, 3) and error(core(a, A) @ A, a.A) < 1e-6


def test_the_first_broadcast_of_each_rule():
    for name in ("flora", "flexlora", "florist", "raflora", "standalone"):
        assert STRATEGIES[name].begin(LAYERS, [4, 4], 0).start is None
    assert STRATEGIES["full"].begin(LAYERS, [4], 0) == flora.Broadcast(train="weight")
    for name in ("hetlora", "ffa", "rolora", "fedex", "fedsa", "fedsvd", "fedsb"):
        first = STRATEGIES[name].begin(LAYERS, [4, 4], 7, 0.5)
        assert {n: a.shape for n, a in first.start.items()} == LAYERS and first.version == 0 and first.merge is None
        assert first.train == {"ffa": "B", "rolora": "B", "fedsvd": "B", "fedsb": "core"}.get(name, "AB")
        assert all(a.scale.tolist() == [0.5] * 4 and not a.delta().any() and (a.A.any() or a.B.any()) for a in first.start.values())
        assert same(first.start, STRATEGIES[name].begin(LAYERS, [4, 4], 7, 0.5).start)
        assert not same(first.start, STRATEGIES[name].begin(LAYERS, [4, 4], 8, 0.5).start)
    shared = STRATEGIES["flora"].begin(LAYERS, [4, 2], 7, 0.5, start="shared").start
    assert all(a.rank == 4 and not a.B.any() for a in shared.values())
