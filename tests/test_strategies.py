"""The aggregation rules against dense formulas in fp64, and each published error that could come back here by name."""
import pytest
import torch
from tiny import adapter, dense, same

import flora
from flora.errors import AdapterError, StrategyError
from flora.messages import Broadcast, Update
from flora.strategies import STRATEGIES, aggregate, strategy_named

PAPER = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
SHAPE = (40, 24)
LAYERS = {"blocks.0.q": SHAPE, "blocks.0.v": (64, 16)}        # ranks equal to a feature size on either side


def updates_of(ranks, alphas=None, shapes=LAYERS, examples=None, version=0, dtype=torch.float32):
    """One update a client, with random factors on both sides, as after training."""
    alphas = alphas or [2.0 * rank for rank in ranks]
    examples = examples or [3 * k + 1 for k in range(len(ranks))]
    return [Update({name: adapter(rank, shape, 31 * k + i, alpha, dtype) for i, (name, shape) in enumerate(shapes.items())},
                   count, {}, version, f"c{k}")
            for k, (rank, alpha, count) in enumerate(zip(ranks, alphas, examples, strict=True))]


def wanted(updates, layer, p=None):
    """Σ p_k s_k B_k A_k in fp64."""
    p = p or [u.num_examples / sum(u.num_examples for u in updates) for u in updates]
    return sum(pk * dense(u.adapters[layer]) for u, pk in zip(updates, p, strict=True) if layer in u.adapters)


def error(actual, exact):
    return float((actual - exact).norm() / exact.norm())


# Only the products p_k s_k are rounded to fp32, twice (s_k, then p_k s_k): well under 2 eps = 2.4e-7 for each term.
EXACT = 2.4e-7


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("alphas", [None, [16.0] * 10, [1.0, 64, 16, 8, 8, 4, 2, 128, 0.5, 3]], ids=["2r", "one", "mixed"])
def test_flora_is_the_weighted_sum_of_deltas(weights, alphas):
    updates = updates_of(PAPER, alphas)
    broadcast = aggregate(updates, "flora", weights=weights)
    p = None if weights == "examples" else [0.1] * 10
    assert broadcast.start is None and broadcast.train == "AB" and broadcast.version == 1
    for layer in LAYERS:
        assert broadcast.merge[layer].rank == sum(PAPER)
        assert error(dense(broadcast.merge[layer]), wanted(updates, layer, p)) < EXACT


def test_flora_copies_factors_bit_for_bit():
    updates = updates_of([8, 4, 1], dtype=torch.bfloat16)
    stacked = aggregate(updates).merge["blocks.0.q"]
    assert torch.equal(stacked.A, torch.cat([u.adapters["blocks.0.q"].A for u in updates]))
    assert torch.equal(stacked.B, torch.cat([u.adapters["blocks.0.q"].B for u in updates], 1))


def test_flora_equals_pefts_cat():
    """PEFT's add_weighted_adapter("cat"), which scales by alpha / r itself, on plain LoRA."""
    from peft import LoraConfig, get_peft_model

    updates = updates_of([8, 4, 2], [3.0, 16.0, 2.0], {"0": SHAPE})
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(SHAPE[1], SHAPE[0])),
                           LoraConfig(r=8, lora_alpha=3.0, target_modules=["0"]), "c0")
    for k, alpha in ((1, 16.0), (2, 2.0)):
        model.add_adapter(f"c{k}", LoraConfig(r=updates[k].adapters["0"].rank, lora_alpha=alpha, target_modules=["0"]))
    layer = model.base_model.model[0]
    for update in updates:
        layer.lora_A[update.client].weight.data.copy_(update.adapters["0"].A)
        layer.lora_B[update.client].weight.data.copy_(update.adapters["0"].B)
    total = sum(u.num_examples for u in updates)
    model.add_weighted_adapter([u.client for u in updates], [u.num_examples / total for u in updates], "all", "cat")
    assert error(dense(aggregate(updates).merge["0"]), layer.get_delta_weight("all").detach().double()) < 1e-6


def test_published_error_p_k_applied_twice():
    """Two equal clients with the same adapter: the sum is that adapter again, neither halved nor quartered."""
    one = updates_of([4], shapes={"l": SHAPE})[0]
    twin = Update(one.adapters, one.num_examples, {}, 0, "twin")
    assert error(dense(aggregate([one, twin]).merge["l"]), dense(one.adapters["l"])) < EXACT


def test_published_error_stacked_rank_is_r_times_clients():
    """Partial participation with any ranks: Σ r_k ranks, p_k over those who took part."""
    everyone = updates_of(PAPER)
    part = [everyone[k] for k in (1, 4, 9)]
    merged = aggregate(part).merge
    assert {a.rank for a in merged.values()} == {32 + 8 + 4}
    assert error(dense(merged["blocks.0.q"]), wanted(part, "blocks.0.q")) < EXACT


@pytest.mark.parametrize("rank", [16, 24, 40, 64])
def test_published_error_factors_told_apart_by_shape(rank):
    """A rank equal to a feature size, also where both are square."""
    updates = updates_of([rank, 8], shapes={"l": SHAPE, "square": (rank, rank)})
    merged = aggregate(updates).merge
    for layer in ("l", "square"):
        assert error(dense(merged[layer]), wanted(updates, layer)) < EXACT


def test_published_error_one_alpha_for_a_stack_of_mixed_ranks():
    updates = updates_of([32, 8, 4], [16.0] * 3, {"l": SHAPE})
    merged = aggregate(updates).merge["l"]
    p = [u.num_examples / sum(v.num_examples for v in updates) for u in updates]
    expected = torch.cat([torch.full((u.adapters["l"].rank,), pk * 16.0 / u.adapters["l"].rank)
                          for u, pk in zip(updates, p, strict=True)])
    assert torch.allclose(merged.scale, expected, rtol=EXACT, atol=0)


def test_published_error_average_is_p0_times_client_0():
    """The misspelt variable: FedIT is the average of all, A and B apart, weighted by examples."""
    updates = updates_of([8, 8, 8], examples=[1, 2, 5])
    start = aggregate(updates, "fedit").start
    for layer in LAYERS:
        for factor in ("A", "B"):
            exact = sum(getattr(u.adapters[layer], factor).double() * u.num_examples / 8 for u in updates)
            # three fp32 products and two sums: each rounds by at most eps / 2 of the largest term
            assert float((getattr(start[layer], factor) - exact).abs().max()) < 3 * 1.2e-7 * float(exact.abs().max() + 1)
        assert torch.equal(start[layer].scale, updates[0].adapters[layer].scale)


def test_published_error_average_is_not_the_sum_of_deltas():
    """FedIT's product of averages has cross terms: it must differ from ΣΔW, and by a lot for unlike clients."""
    updates = updates_of([8, 8, 8])
    start = aggregate(updates, "fedit").start
    assert all(error(dense(start[layer]), wanted(updates, layer)) > 0.3 for layer in LAYERS)


def test_published_error_factors_of_other_shapes_broadcast_in_an_average():
    """(4, .) and (1, .) factors would broadcast silently in a plain sum."""
    with pytest.raises(StrategyError, match="ranks \\[4, 1\\].*flora.*zeropad"):
        aggregate(updates_of([4, 1]), "fedit")
    with pytest.raises(StrategyError, match="flora"):
        strategy_named("fedit").begin(LAYERS, [4, 1], 0)


def test_fedit_of_one_client_is_that_client():
    update = updates_of([8])[0]
    assert same(aggregate([update], "fedit").start, update.adapters)
    assert same(aggregate([update], "centralized").start, update.adapters)


def zeropad_by_hand(updates, layer):
    """Pad with zeros, write every client at the average scale (the change split evenly between A and B), average; fp64."""
    total, rank = sum(u.num_examples for u in updates), max(u.adapters[layer].rank for u in updates)
    p = [u.num_examples / total for u in updates]
    scales = [float(u.adapters[layer].scale[0]) for u in updates]
    common = sum(pk * s for pk, s in zip(p, scales, strict=True))
    A, B = torch.zeros(rank, SHAPE[1], dtype=torch.float64), torch.zeros(SHAPE[0], rank, dtype=torch.float64)
    for u, pk, s in zip(updates, p, scales, strict=True):
        a, root = u.adapters[layer], (s / common) ** 0.5
        A[:a.rank] += pk * root * a.A.double()
        B[:, :a.rank] += pk * root * a.B.double()
    return common, A, B


@pytest.mark.parametrize("alphas", [None, [16.0] * 4], ids=["alpha 2r", "one alpha: four scales"])
def test_published_error_zeropad_merges_at_another_scale(alphas):
    """FLoRA's own zero-padding divided by the padded rank: here every client counts with the scale it trained with."""
    updates = updates_of([16, 8, 4, 1], alphas, {"l": SHAPE})
    start = aggregate(updates, "zeropad").start["l"]
    common, A, B = zeropad_by_hand(updates, "l")
    assert start.rank == 16
    assert error(dense(start), common * B @ A) < 1e-6           # fp32 sums of four terms, twice, and a product
    assert error(start.A.double(), A) < 1e-6 and error(start.B.double(), B) < 1e-6


def test_zeropad_of_one_client_keeps_its_delta_and_clients_can_truncate():
    update = updates_of([4], [16.0], {"l": SHAPE})[0]
    start = aggregate([update], "zeropad").start["l"]
    assert torch.equal(dense(flora.truncate(start, 4)), dense(update.adapters["l"]))


def test_absent_layers_count_as_zero_for_flora_and_renormalise_for_averages():
    updates = updates_of([4, 4, 4], examples=[1, 1, 2])
    del updates[2].adapters["blocks.0.q"]
    layer, p = "blocks.0.q", [0.25, 0.25, 0.5]
    assert error(dense(aggregate(updates).merge[layer]), wanted(updates, layer, p)) < EXACT
    assert error(dense(aggregate(updates, absent="renormalise").merge[layer]), wanted(updates, layer, [0.5, 0.5, 0])) < EXACT
    for name in ("fedit", "zeropad"):
        half = (updates[0].adapters[layer].A.double() + updates[1].adapters[layer].A.double()) / 2
        assert error(aggregate(updates, name).start[layer].A.double(), half) < EXACT
        assert error(aggregate(updates, name, absent="zero").start[layer].A.double(), half / 2) < EXACT
    assert aggregate(updates).merge["blocks.0.v"].rank == 12


def test_begin_sends_one_start_to_averages_and_nothing_to_flora():
    for name in ("flora", "standalone"):
        assert STRATEGIES[name].begin(LAYERS, PAPER, 0) == Broadcast()
    for name, ranks, rank in (("fedit", [8, 8], 8), ("zeropad", [4, 16, 8], 16), ("centralized", [8], 8)):
        first = STRATEGIES[name].begin(LAYERS, ranks, 7, 0.5)
        assert {n: a.shape for n, a in first.start.items()} == LAYERS and first.merge is None and first.version == 0
        assert all(a.scale.tolist() == [0.5] * rank and not a.B.any() and bool(a.A.any()) for a in first.start.values())
        assert same(first.start, STRATEGIES[name].begin(LAYERS, ranks, 7, 0.5).start)
        assert not same(first.start, STRATEGIES[name].begin(LAYERS, ranks, 8, 0.5).start)


def test_standalone_sends_nothing_and_keeps_adapters_at_home():
    broadcast = aggregate(updates_of([4, 8], version=2), "standalone")
    assert broadcast == Broadcast(version=3) and STRATEGIES["standalone"].home == "AB" and STRATEGIES["centralized"].pooled


def test_the_version_counts_on_and_the_inputs_stay_as_they_were():
    updates = updates_of([4, 8], version=6)
    before = [dense(u.adapters["blocks.0.q"]) for u in updates]
    assert aggregate(updates).version == 7
    assert all(torch.equal(b, dense(u.adapters["blocks.0.q"])) for b, u in zip(before, updates, strict=True))


def broken(what):
    updates = updates_of([4, 4])
    a = updates[1].adapters["blocks.0.q"]
    if what == "nan":
        a.B[3, 2] = float("nan")
    elif what == "inf":
        a.scale[1] = float("inf")
    elif what == "shape":
        updates[1].adapters["blocks.0.q"] = adapter(4, (SHAPE[0], SHAPE[1] + 1))
    elif what == "versions":
        updates[1] = Update(updates[1].adapters, 1, {}, 1, "c1")
    elif what == "examples":
        updates[1] = Update(updates[1].adapters, 0, {}, 0, "c1")
    return updates


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize(("what", "says"), [("nan", "c1, blocks.0.q.*NaN"), ("inf", "c1, blocks.0.q.*NaN"),
                                            ("shape", "c1, blocks.0.q"), ("versions", r"versions \[0, 1\]"),
                                            ("examples", "c1.*num_examples")])
def test_updates_that_cannot_be_combined_are_refused_by_name(strategy, what, says):
    with pytest.raises(StrategyError, match=says):
        aggregate(broken(what), strategy)


def test_no_updates_unknown_names_and_options_are_refused():
    with pytest.raises(StrategyError, match="at least one update"):
        aggregate([])
    with pytest.raises(StrategyError, match="'zeropat'.*Did you mean 'zeropad'"):
        aggregate(updates_of([4]), "zeropat")
    with pytest.raises(StrategyError, match="no option 'weight'.*weights, absent"):
        aggregate(updates_of([4]), weight="uniform")
    with pytest.raises(StrategyError, match="standalone has no option 'weights'.*none"):
        aggregate(updates_of([4]), "standalone", weights="uniform")
    for name, value in (("weights", "size"), ("absent", "skip")):
        with pytest.raises(StrategyError, match=value):
            aggregate(updates_of([4]), **{name: value})
    assert issubclass(StrategyError, ValueError) and issubclass(AdapterError, ValueError)
