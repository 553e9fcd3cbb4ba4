"""merge_many_: all layers and clients in one call, the three ways of rounding, and nothing written where anything is wrong."""
import numpy as np
import pytest
import torch
from oracles import FLOATS, PAPER_RANKS, adapter, check, relative
from test_merge import BACKENDS

from flora import kernels, ops
from flora.errors import AdapterError
from flora.kernels import reference

SHAPES = ((33, 29), (130, 67), (1, 1), (70, 257), (64, 64))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kernels.use(request.param):
        yield request.param


def factors(layers):
    """As, Bs, scales: lists over layers of lists over clients."""
    return [[[getattr(a, name) for a in layer] for layer in layers] for name in ("A", "B", "scale")]


def whole(*size):
    """Small whole numbers: their products and sums are exact in fp32, so every backend rounds the same number."""
    return torch.randint(-8, 9, size).float()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_layers_of_many_clients_are_their_sums(backend, dtype):
    """Layers without clients, clients without ranks, all ranks of the paper, a mix of dtypes among a layer's clients."""
    clients = [[adapter(*shape, r, dtype=FLOATS[r % 4]) * 0.1 for r in ranks]
               for shape, ranks in zip(SHAPES, ((3, 5), PAPER_RANKS, (1, 1, 1), (), (300, 7)), strict=True)]
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    before, parts = [w.clone() for w in weights], factors(clients)
    for group, empty in zip(parts, (torch.empty(0, 67), torch.empty(130, 0), torch.empty(0)), strict=True):
        group[1].insert(4, empty)
    assert ops.merge_many_(weights, *parts) is weights
    for weight, old, layer in zip(weights, before, clients, strict=True):
        plain = old.clone()
        for a in layer:
            plain += (a.B.to(dtype) * a.scale.to(dtype)) @ a.A.to(dtype)
        check(weight, plain, old.double() + sum((a.delta() for a in layer), torch.zeros(old.shape).double()))
    assert torch.equal(weights[3], before[3])


def test_one_call_gives_the_bits_of_a_call_a_layer(backend):
    clients = [[adapter(*shape, r) for r in (4, 9)] for shape in SHAPES]
    for options in ({}, {"rounding": "stochastic", "seed": list(range(5))}):
        weights = [torch.randn(shape).bfloat16() for shape in SHAPES]
        alone = [w.clone() for w in weights]
        ops.merge_many_(weights, *factors(clients), **options)
        for i, (weight, layer) in enumerate(zip(alone, clients, strict=True)):
            seed = {"seed": options["seed"][i:i + 1]} if options else {}
            ops.merge_many_([weight], *factors([layer]), **{**options, **seed})
        assert all(torch.equal(a, b) for a, b in zip(weights, alone, strict=True))


def test_a_weight_across_devices_of_one_call_or_no_layer_at_all():
    assert ops.merge_many_([], [], [], []) == []


def drift(rounding, residual, count=200, turn=False):
    """‖(W + residual) - exact‖ / ‖Σ ΔW‖ and the bias along the sum, after merges of |Δ| = 2e-4 |W| into bf16."""
    torch.manual_seed(0)
    weight = torch.randn(96, 80).bfloat16()
    exact, left = weight.double(), torch.zeros(96, 80, dtype=torch.bfloat16) if residual else None
    start, few = exact.clone(), [adapter(96, 80, 8) for _ in range(8 if turn else 1)]
    few = [(a, a.delta()) for a in (a * float(2e-4 * start.norm() / a.delta().norm()) for a in few)]
    for i in range(count):
        a, delta = few[i % len(few)]
        exact += delta
        ops.merge_(weight, a.A, a.B, a.scale, residual=left, rounding=rounding, seed=i)
    got = weight.double() + (left.double() if residual else 0)
    moved = exact - start
    return float((got - exact).norm() / moved.norm()), float(((got - exact) * moved).sum() / moved.square().sum())


def test_two_hundred_merges_into_bf16_drift_only_without_a_residual(backend):
    """One direction: the case in which rounding to nearest loses every update; and directions that turn."""
    for turn in (False, True):
        (nearest, lost), (kept, bias), (drawn, mean) = (drift(*how, turn=turn) for how in (
            ("nearest", False), ("nearest", True), ("stochastic", False)))
        assert kept < 0.02 and abs(bias) < 1e-3, (kept, bias)
        assert nearest > 20 * kept and drawn > kept and abs(mean) < 0.05, (nearest, drawn, mean)
    print(f"error of 200 merges: nearest {nearest:.1%}, stochastic {drawn:.1%}, residual {kept:.3%}; lost by nearest {lost:.1%}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(backend, dtype):
    weight, a = torch.randn(40, 30).to(dtype), adapter(40, 30, 3) * 0.01
    weight[:20] *= 2.0**-15 if dtype == torch.float16 else 1          # numbers whose last place is fixed, in fp16
    a.B[:20] *= 2.0**-15 if dtype == torch.float16 else 1
    exact, total, count = weight.double() + a.delta(), torch.zeros(40, 30).double(), 400
    nearest = weight.clone()
    ops.merge_(nearest, a.A, a.B, a.scale)
    place = torch.maximum(exact.abs() * torch.finfo(dtype).eps, torch.tensor(2.0**-24 if dtype == torch.float16 else 0.0).double())
    for seed in range(count):
        drawn = ops.merge_(weight.clone(), a.A, a.B, a.scale, rounding="stochastic", seed=seed)
        assert bool(((drawn.double() - exact).abs() <= 1.01 * place).all())
        total += drawn
    assert relative(total / count, exact) < 0.25 * relative(nearest, exact)
    assert bool(((total / count - exact).abs() <= 0.5 / count**0.5 * 5 * place).all())


@pytest.mark.parametrize("residual", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("weight", FLOATS, ids=str)
def test_every_backend_rounds_to_the_same_bits(backend, weight, residual):
    """On whole numbers, whose sums are exact, the bits are those of the rule as reference.py writes it; any strides."""
    for shape in ((13, 11), (150, 71)):
        parts = [[whole(3, shape[1]), whole(5, shape[1])]], [[whole(shape[0], 3), whole(shape[0], 5)]], [[whole(3), whole(5)]]
        start = (whole(*shape) / 8).to(weight).T.contiguous().T
        left = None if residual is None else (whole(*shape) / 1024).to(residual)
        for options in ({}, {"rounding": "stochastic", "seed": 77}, {"rounding": "stochastic", "seed": [(1 << 62) + 5]}):
            given = {**options, "residuals": None if left is None else [left.clone()]}
            other = {**options, "residuals": None if left is None else [left.clone()]}
            (got,) = ops.merge_many_([start.clone()], *parts, **given)
            with kernels.use("reference"):
                (expected,) = ops.merge_many_([start.clone()], *parts, **other)
            assert torch.equal(got, expected)
            assert left is None or torch.equal(given["residuals"][0], other["residuals"][0])


def test_a_residual_holds_what_rounding_left_of_an_fp32_weight_too(backend):
    weight, left, a = torch.randn(90, 80), torch.zeros(90, 80), adapter(90, 80, 4) * 1e-3
    exact = weight.double()
    for _ in range(50):
        ops.merge_(weight, a.A, a.B, a.scale, residual=left)
        exact += a.delta()
    assert relative(weight.double() + left.double(), exact) < 0.2 * relative(weight, exact)


def test_seeds(backend):
    """The same seed, the same bits; none: drawn by torch's generator; layers of one int seed draw apart."""
    weight, a = torch.randn(64, 48).bfloat16(), adapter(64, 48, 3) * 0.01

    def once(seed=None):
        weights = [weight.clone(), weight.clone()]
        ops.merge_many_(weights, *factors([[a], [a]]), rounding="stochastic", seed=seed)
        return weights

    one, again, other = once(5), once(5), once(6)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])
    torch.manual_seed(3)
    drawn = once()
    torch.manual_seed(3)
    assert torch.equal(once()[0], drawn[0]) and not torch.equal(once()[0], drawn[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_number_that_is_not_finite_anywhere_stops_the_whole_merge(backend, dtype, value):
    for which, layer, client in (("A", 0, 0), ("B", 1, 1), ("scale", 1, 0)):
        clients = [[adapter(*shape, r, dtype=dtype) for r in (3, 5)] for shape in SHAPES[:2]]
        tensor = getattr(clients[layer][client], which)
        tensor.view(-1)[-1 if tensor.numel() < 1000 else 333] = value
        weights = [torch.randn(shape) for shape in SHAPES[:2]]
        before = [w.clone() for w in weights]
        with pytest.raises(AdapterError, match=f"layer {layer}, adapter {client}, {which}: expected finite numbers; got NaN"):
            ops.merge_many_(weights, *factors(clients))
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_memory_that_two_weights_share_is_refused_and_blocks_of_one_matrix_are_not(backend):
    a, flat = adapter(6, 5, 2), torch.randn(60)
    for pair in ((flat[:30].view(6, 5), flat[:30].view(6, 5)), (flat[:30].view(6, 5), flat[29:59].view(6, 5)),
                 (flat[:30].view(6, 5), flat[:60].view(6, 10)[:, 4:9])):
        before = flat.clone()
        with pytest.raises(AdapterError, match="expected memory of its own.*got the same memory twice"):
            ops.merge_many_(pair, *factors([[a], [a]]))
        with pytest.raises(AdapterError, match="residual 0: expected memory of its own|weight 0: expected memory of its own"):
            ops.merge_(pair[0], a.A, a.B, a.scale, residual=pair[1])
        assert torch.equal(flat, before)
    wide = torch.randn(200, 30)
    three = [wide[:100, 0:10], wide[:50, 10:20], wide[:50, 15:25]]
    with pytest.raises(AdapterError, match="weight 2: expected memory of its own"):
        ops.merge_many_(three, *factors([[adapter(*w.shape, 2)] for w in three]))
    with pytest.raises(AdapterError, match="expected a tensor that owns each of its elements"):
        ops.merge_(flat[:10].unfold(0, 5, 1), *(getattr(a, name) for name in ("A", "B", "scale")))
    fused = torch.randn(6, 10)
    left, right, expected = fused[:, :5], fused[:, 5:], fused.clone()
    ops.merge_many_([left, right], *factors([[a], [a]]))
    ops.merge_(expected[:, :5], a.A, a.B, a.scale), ops.merge_(expected[:, 5:], a.A, a.B, a.scale)
    assert torch.equal(fused, expected)


def test_read_only_memory_is_refused_and_the_process_lives(tmp_path):
    (tmp_path / "w").write_bytes(bytes(7 * 5 * 4))
    mapped = torch.from_numpy(np.memmap(tmp_path / "w", np.float32, "r", shape=(7, 5)))
    a = adapter(7, 5, 2)
    with pytest.raises(AdapterError, match="expected memory that can be written; got a tensor in a read-only mapping"):
        ops.merge_many_([torch.zeros(7, 5), mapped], *factors([[a], [a]]))


GOOD = adapter(7, 5, 2)
W = torch.zeros(7, 5)
REFUSED = {
    "a list too short": (([W, W.clone()], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {}),
    "clients of two numbers": (([W], [[GOOD.A, GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {}),
    "an adapter of another layer": (([W], [[torch.ones(2, 6)]], [[GOOD.B]], [[GOOD.scale]]), {}),
    "a weight of integers": (([W.int()], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {}),
    "a residual of another shape": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"residuals": [torch.zeros(5, 7)]}),
    "a residual of integers": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"residuals": [W.int()]}),
    "a residual expanded": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"residuals": [torch.zeros(7, 1).expand(7, 5)]}),
    "two residuals": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"residuals": [W.clone(), W.clone()]}),
    "an unknown rounding": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"rounding": "up"}),
    "a seed of words": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"rounding": "stochastic", "seed": "seed"}),
    "seeds for two layers": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"rounding": "stochastic", "seed": [1, 2]}),
    "a seed under 0": (([W], [[GOOD.A]], [[GOOD.B]], [[GOOD.scale]]), {"rounding": "stochastic", "seed": [-1]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(name):
    given, options = REFUSED[name]
    with pytest.raises(AdapterError, match="expected .*got"):
        ops.merge_many_(*given, **options)
    assert not bool(W.any())


def test_add_many_rounds_as_merge_many_does():
    """A dense sum, as a streamed round ends with, lands on the same bits as the merge of the adapters it was made of."""
    parts = [[whole(3, 71)]], [[whole(150, 3)]], [[whole(3)]]
    update = (parts[1][0][0] * parts[2][0][0]) @ parts[0][0][0]
    for dtype in FLOATS:
        for options in ({}, {"rounding": "stochastic", "seed": 9}):
            weight, left = (whole(150, 71) / 8).to(dtype), [torch.zeros(150, 71).bfloat16() for _ in range(2)]
            with kernels.use("reference"):
                (one,) = ops.merge_many_([weight.clone()], *parts, residuals=left[:1], **options)
            (two,) = ops.add_many_([weight.clone()], [update], residuals=left[1:], **options)
            assert torch.equal(one, two) and torch.equal(*left)
    for bad in (update.T, update.half(), update * float("nan")):
        with pytest.raises(AdapterError, match="expected .*got"):
            ops.add_many_([torch.zeros(150, 71)], [bad])
    weight = torch.randn(300, 300)
    for given, options in ((([weight, weight], [weight.clone()] * 2), {}), (([weight], []), {}),
                           (([weight], [weight.clone()]), {"residuals": [torch.zeros(3, 3)]})):
        before = weight.clone()
        with pytest.raises(AdapterError, match="expected .*got"):
            ops.add_many_(*given, **options)
        assert torch.equal(weight, before)
    before = weight.clone()
    assert torch.equal(ops.add_many_([weight], [weight.T])[0], before + before.T)       # read before it is written
    assert reference.round_to(torch.tensor([3e38]), torch.bfloat16, torch.tensor([-1], dtype=torch.int32)).isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_whose_sum_overflows_are_finite(backend, dtype):
    """So are tensors of none."""
    check_ = reference.first_not_finite if backend == "reference" else torch.ops.flora_native.first_not_finite.default
    large = torch.full((40, 50), torch.finfo(dtype).max, dtype=dtype)
    broken = large.clone()
    broken[39, 49] = float("inf")
    assert check_([torch.empty(0, 3)]) == check_([large, large.T, large[:, ::3]]) == -1
    assert check_([large, torch.empty(0), large, broken.T, broken]) == 3 and check_([broken[:39], broken[::2]]) == -1
