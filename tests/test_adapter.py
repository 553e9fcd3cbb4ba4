"""The law: stacking is concatenating ranks, weighting multiplies scale; every other rule is a known compression of the stack."""
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracles import PAPER_RANKS, adapter, relative

import flora
from flora.adapter import Adapter, all_layers, fresh, fresh_adapters, normalised
from flora.errors import AdapterError

few = settings(max_examples=25, deadline=None)
ranks = st.lists(st.integers(1, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def dense(adapters, weights):
    """Σ p_k s_k B_k A_k rank by rank in fp64: no code of ours."""
    total = 0
    for p, a in zip(weights, adapters, strict=True):
        for r in range(a.rank):
            total = total + p * float(a.scale[r]) * torch.outer(a.B[:, r].double(), a.A[r].double())
    return total


@pytest.mark.parametrize("shape", [(96, 80), (64, 40), (8, 4)], ids=str)
@pytest.mark.parametrize("alpha", [None, 16, "mixed"])
def test_a_stack_is_the_weighted_sum_of_deltas(shape, alpha):
    """The paper's ranks, one of which is a feature size of every one of these shapes; ten alphas."""
    many = [adapter(*shape, r, 2.0 ** (k % 5) if alpha == "mixed" else alpha) for k, r in enumerate(PAPER_RANKS)]
    weights = [w / 55 for w in range(1, 11)]
    stacked = flora.stack([a * p for p, a in zip(weights, many, strict=True)])
    assert stacked.rank == sum(PAPER_RANKS) and stacked.A.dtype == torch.float32
    assert relative(stacked.delta(), dense(many, weights)) <= 1e-6


@few
@given(ranks, st.integers(-40, 40), seeds)
def test_delta_and_stack_are_linear(some, weight, seed):
    torch.manual_seed(seed)
    many = [adapter(6, 5, r) for r in some]
    weights = [weight / 10 + k for k in range(len(many))]
    exact = dense(many, weights)
    assert (flora.stack([a * p for p, a in zip(weights, many, strict=True)]).delta() - exact).norm() <= 1e-6 * sum(
        abs(p) * a.delta().norm() for p, a in zip(weights, many, strict=True))


@few
@given(ranks, ranks, seeds)
def test_stacking_is_associative(left, right, seed):
    torch.manual_seed(seed)
    one, two = [adapter(6, 5, r) for r in left], [adapter(6, 5, r) for r in right]
    flat, tree = flora.stack(one + two), flora.stack([flora.stack(one), flora.stack(two)])
    for a, b in ((flat.A, tree.A), (flat.B, tree.B), (flat.scale, tree.scale)):
        assert torch.equal(a, b)


def test_weighting_touches_scale_alone():
    a = adapter(7, 5, 3, dtype=torch.bfloat16)
    for weighted in (a * 0.3, 0.3 * a):
        assert torch.equal(weighted.A, a.A) and torch.equal(weighted.B, a.B) and weighted.A.dtype == torch.bfloat16
        assert torch.equal(weighted.scale, a.scale * 0.3) and weighted.scale.dtype == torch.float32
    assert torch.equal(a.scale, torch.full((3,), 2.0))


def test_a_stack_keeps_the_bits_of_what_it_stacks():
    many = [adapter(7, 5, r, dtype=torch.bfloat16) for r in (1, 4, 2)]
    stacked = flora.stack(many)
    assert torch.equal(stacked.A, torch.cat([a.A for a in many])) and torch.equal(stacked.B, torch.cat([a.B for a in many], 1))
    assert torch.equal(stacked.scale, torch.cat([a.scale for a in many]))
    assert flora.stack([many[0], adapter(7, 5, 2)]).A.dtype == torch.float32


def test_a_stack_is_what_pefts_cat_gives():
    """PEFT's add_weighted_adapter(combination_type="cat") folds √(p · scale) into both factors; the sum is one."""
    peft = pytest.importorskip("peft", reason="peft is not installed: its weighted cat was not compared")
    some, weights = {"a": (4, 8), "b": (2, 16), "c": (8, 4)}, [0.5, 0.2, 0.3]
    model, held = torch.nn.Sequential(torch.nn.Linear(8, 6)), {}
    for name, (rank, alpha) in some.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
        model = peft.get_peft_model(model, config, name) if not held else model
        if held:
            model.add_adapter(name, config)
        layer = model.base_model.model[0]
        torch.nn.init.normal_(layer.lora_B[name].weight)
        held[name] = Adapter(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), alpha / rank)
    model.add_weighted_adapter(list(some), weights, "sum", combination_type="cat")
    ours = flora.stack([a * p for p, a in zip(weights, held.values(), strict=True)])
    assert relative(model.base_model.model[0].get_delta_weight("sum").detach(), ours.delta()) <= 1e-6


def test_mean_is_the_weighted_average_of_every_clients_factors():
    """Not p_0 times the first client's: the error of a published baseline."""
    many, weights = [adapter(7, 5, 3) for _ in range(4)], [1.0, 2.0, 5.0, 8.0]
    got = flora.mean(many, weights)
    for name in ("A", "B"):
        exact = sum(w / 16 * getattr(a, name).double() for w, a in zip(weights, many, strict=True))
        assert relative(getattr(got, name), exact) <= 1e-6
    assert torch.equal(got.scale, many[0].scale)
    assert relative(got.delta(), dense(many, [w / 16 for w in weights])) > 0.1     # FedIT is not the average of ΔW
    alone = flora.mean(many, [0, 0, 1, 0])
    assert torch.equal(alone.A, many[2].A) and torch.equal(alone.B, many[2].B)
    assert relative(flora.mean(many[:1] * 3, [3, 1, 2]).A, many[0].A) <= 1e-6


def test_mean_of_different_scales_is_taken_at_one():
    one = adapter(7, 5, 4)
    same = Adapter(one.A * 2, one.B * 2, one.scale / 4)            # the same ΔW, written at another alpha / r
    assert relative(flora.mean([one, same], [1, 3]).delta(), one.delta()) <= 1e-6
    balanced, doubled = Adapter(one.A, one.B, 2.0), Adapter(one.A * 2**0.5, one.B * 2**0.5, 1.0)
    got = flora.mean([balanced, doubled], [1, 3])
    assert torch.allclose(got.scale, torch.full((4,), 1.25)) and relative(got.delta(), balanced.delta()) <= 1e-6
    negative = Adapter(one.A, -one.B, -one.scale)
    assert relative(flora.mean([one, negative], [1, 1]).delta(), one.delta()) <= 1e-6
    padded = flora.pad(one, 9)
    assert relative(flora.mean([padded, flora.pad(adapter(7, 5, 9, 5.0), 9) * 0], [1, 0]).delta(), one.delta()) <= 1e-6
    assert relative(flora.mean([padded, padded], [1, 1]).delta(), one.delta()) <= 1e-6
    mixed = Adapter(one.A, one.B, torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert relative(flora.mean([mixed, mixed], [0.3, 0.7]).delta(), mixed.delta()) <= 1e-6


def test_mean_promotes_dtypes_in_any_order():
    pair = [adapter(7, 5, 3, dtype=torch.bfloat16), adapter(7, 5, 3)]
    one, two = flora.mean(pair, [1, 1]), flora.mean(pair[::-1], [1, 1])
    assert one.A.dtype == two.A.dtype == torch.float32 and relative(one.A, two.A) <= 1e-6
    ones = [adapter(7, 5, 3, dtype=torch.bfloat16)] * 300
    assert torch.equal(flora.mean(ones, [1] * 300).A, ones[0].A)            # sums in fp32: bf16 would stop growing at 256


def test_pad_and_truncate():
    a = adapter(7, 5, 3)
    padded = flora.pad(a, 6)
    assert padded.rank == 6 and torch.equal(padded.delta(), a.delta()) and flora.pad(a, 3) is a
    assert not padded.A[3:].any() and not padded.B[:, 3:].any() and torch.allclose(padded.scale, a.scale[:1].expand(6))
    back = flora.truncate(padded, 3)
    assert torch.equal(back.A, a.A) and torch.equal(back.B, a.B) and torch.equal(back.scale, a.scale)
    assert flora.truncate(a, 10).rank == 3


@pytest.mark.parametrize(("shape", "rank"), [((12, 9), 4), ((12, 9), 9), ((9, 12), 12), ((12, 9), 40), ((5, 1), 1), ((6, 6), 6)])
def test_compress_is_the_best_approximation_balanced(shape, rank):
    a = adapter(*shape, rank, dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(a.delta())
    most = min(rank, *shape)
    assert flora.compress(a).rank == most and relative(flora.compress(a).delta(), a.delta()) <= 1e-6
    for r in range(1, most + 1):
        got = flora.compress(a, rank=r)
        best = (U[:, :r] * sigma[:r]) @ Vh[:r]
        assert got.rank == r and (got.delta() - best).norm() <= 1e-6 * a.delta().norm()
        assert torch.equal(got.scale, torch.ones(r))
        for norm in (got.A.norm(dim=1), got.B.norm(dim=0)):
            assert relative(norm, sigma[:r].sqrt()) <= 1e-6
    assert flora.compress(a, rank=100).rank == most


@few
@given(st.integers(1, 12), st.floats(0.0, 0.99), seeds)
def test_compress_to_a_tolerance_keeps_the_bound_with_the_fewest_ranks(rank, tol, seed):
    torch.manual_seed(seed)
    a = adapter(8, 6, rank, dtype=torch.float64)
    a = Adapter(a.A, a.B, torch.rand(rank) ** 4 + 1e-3)
    sigma, got = torch.linalg.svdvals(a.delta()), flora.compress(a, tol=tol)
    slack = 1e-6 * sigma.norm()
    assert (got.delta() - a.delta()).norm() <= tol * sigma.norm() + slack
    if got.rank > 1 and sigma[got.rank - 1] > slack:                # one rank fewer breaks the bound
        assert sigma[got.rank - 1:].norm() > tol * sigma.norm() - slack
    assert flora.compress(a, rank=2, tol=tol).rank == min(2, got.rank)


def test_compress_keeps_dtypes_and_takes_a_delta_of_zero():
    for a in (Adapter(torch.zeros(3, 5), torch.randn(7, 3), 1.0), adapter(7, 5, 3) * 0):
        for options in ({}, {"rank": 2}, {"tol": 0.1}, {"tol": 0.0}):
            got = flora.compress(a, **options)
            assert got.rank >= 1 and not got.delta().any() and torch.isfinite(got.A).all()
    assert flora.compress(Adapter(torch.zeros(3, 5), torch.randn(7, 3), 1.0), tol=0.1).rank == 1
    assert flora.compress(adapter(7, 5, 3, dtype=torch.bfloat16)).A.dtype == torch.bfloat16


def test_rescale_keeps_delta_at_a_constant_scale_and_balances():
    a = adapter(7, 5, 4, dtype=torch.float64)
    a = Adapter(a.A, a.B, torch.tensor([0.5, 3.0, -2.0, 1.0]))
    got = flora.rescale(a, 4.0)
    assert torch.equal(got.scale, torch.full((4,), 4.0)) and relative(got.delta(), a.delta()) <= 1e-6
    assert relative(got.A.norm(dim=1), got.B.norm(dim=0)) <= 1e-6
    new = fresh((7, 5), 4, 8, 0)
    sent = flora.rescale(new, 0.5)
    assert torch.equal(sent.A, new.A) and torch.equal(sent.B, new.B)
    half_dead = Adapter(torch.cat([torch.zeros(1, 5), torch.randn(2, 5)]), torch.randn(7, 3), torch.tensor([1.0, 1.0, 0.0]))
    sent = flora.rescale(half_dead, 0.5)
    assert torch.equal(sent.B[:, 0], half_dead.B[:, 0]) and torch.equal(sent.A[2], half_dead.A[2])
    assert relative(sent.delta(), half_dead.delta()) <= 1e-6 and torch.isfinite(sent.A).all()


def test_fold_moves_scale_into_B():
    a = adapter(7, 5, 3) * 0.37
    got = flora.fold(a)
    assert torch.equal(got.A, a.A) and torch.equal(got.scale, torch.ones(3)) and relative(got.delta(), a.delta()) <= 1e-6
    assert flora.fold(adapter(7, 5, 3, dtype=torch.bfloat16)).B.dtype == torch.bfloat16


def test_fresh_is_zero_and_depends_on_its_seed_alone():
    a = fresh((7, 5), 4, 8, 3)
    assert a.shape == (7, 5) and not a.B.any() and torch.equal(a.scale, torch.full((4,), 2.0))
    assert 0.4 / 5**0.5 < float(a.A.abs().max()) <= 5**-0.5
    state = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = fresh((7, 5), 4, 8, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.A, a.A) and again.B.device.type == "cpu" and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(fresh((7, 5), 4, 8, 4).A, a.A)
    both = fresh_adapters({"x": (7, 5), "y": (7, 5)}, 4, 8, 0, "client")
    assert torch.equal(both["y"].A, fresh_adapters({"y": (7, 5)}, 4, 8, 0, "client")["y"].A)
    assert not torch.equal(both["x"].A, both["y"].A)
    assert all_layers([{"b": a}, both, {"x": a, "c": a}]) == ["b", "x", "y", "c"]


def test_bytes_device_and_dtype():
    a = adapter(7, 5, 3, dtype=torch.bfloat16)
    assert a.nbytes == 2 * (3 * 5 + 7 * 3) + 4 * 3 and a.rank == 3 and a.shape == (7, 5)
    moved = a.to(torch.float64)
    assert moved.A.dtype == moved.B.dtype == torch.float64 and moved.scale.dtype == torch.float32
    assert Adapter(a.A, a.B, a.scale.double()).scale.dtype == torch.float32 and a.delta().dtype == torch.float64


BAD_FACTORS = {
    "rank 0": (torch.zeros(0, 5), torch.zeros(7, 0), 1.0), "two ranks": (torch.zeros(3, 5), torch.zeros(7, 4), 1.0),
    "swapped": (torch.zeros(7, 3), torch.zeros(3, 5), 1.0), "a vector": (torch.zeros(5), torch.zeros(7, 1), 1.0),
    "three axes": (torch.zeros(3, 5, 1), torch.zeros(7, 3), 1.0), "integers": (torch.zeros(3, 5).int(), torch.zeros(7, 3), 1.0),
    "scale": (torch.zeros(3, 5), torch.zeros(7, 3), torch.ones(2)),
    "scale, one": (torch.zeros(3, 5), torch.zeros(7, 3), torch.ones(1)),
    "scale, matrix": (torch.zeros(3, 5), torch.zeros(7, 3), torch.ones(3, 1)),
    "devices": (torch.zeros(3, 5), torch.zeros(7, 3, device="meta"), 1.0),
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_factors_that_are_no_adapter_are_refused(name):
    with pytest.raises(AdapterError, match="expected .*got"):
        Adapter(*BAD_FACTORS[name])


REFUSED = {
    "an empty stack": lambda a: flora.stack([]), "an empty mean": lambda a: flora.mean([], []),
    "a stack of layers": lambda a: flora.stack([a, adapter(7, 6, 4)]),
    "a stack of transposes": lambda a: flora.stack([a, adapter(5, 7, 4)]),
    "a mean of ranks, one of them 1": lambda a: flora.mean([a, adapter(7, 5, 1)], [1, 1]),      # (4,·) with (1,·) would broadcast
    "a mean of layers": lambda a: flora.mean([a, adapter(7, 1, 4)], [1, 1]),
    "a weight too few": lambda a: flora.mean([a, a], [1]), "no weight": lambda a: flora.mean([a, a], [0, 0]),
    "a negative weight": lambda a: flora.mean([a, a], [2, -1]), "NaN": lambda a: flora.mean([a, a], [1, float("nan")]),
    "infinity": lambda a: flora.mean([a, a], [1, float("inf")]), "a sum of infinity": lambda a: normalised([1e308, 1e308]),
    "pad to less": lambda a: flora.pad(a, 3), "truncate to 0": lambda a: flora.truncate(a, 0),
    "truncate to -1": lambda a: flora.truncate(a, -1), "compress to 0": lambda a: flora.compress(a, 0),
    "tolerance 1": lambda a: flora.compress(a, tol=1.0), "tolerance under 0": lambda a: flora.compress(a, tol=-0.1),
    "tolerance NaN": lambda a: flora.compress(a, tol=float("nan")), "scale 0": lambda a: flora.rescale(a, 0.0),
    "scale under 0": lambda a: flora.rescale(a, -1.0), "scale infinite": lambda a: flora.rescale(a, float("inf")),
    "fresh at rank 0": lambda a: fresh((7, 5), 0, 1, 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_algebra_does_not_take_is_refused(name):
    with pytest.raises(AdapterError, match="expected .*got"):
        REFUSED[name](adapter(7, 5, 4))
