"""merge_ adds B diag(scale) A in place with one rounding; stack_ copies. The same rule for every backend, layout and dtype."""
import copy
import itertools

import pytest
import torch
from oracles import FLOATS, PAPER_RANKS, SHAPES, adapter, check

import flora
from flora import kernels, ops
from flora.adapter import Adapter

WHY = kernels._load("native")[1]
NATIVE = pytest.mark.skipif(bool(WHY), reason=f"the compiled merge_ and stack_ were not tested: {WHY}")
BACKENDS = ["reference", pytest.param("native", marks=NATIVE)]
LAYOUTS = {
    "contiguous": lambda t: t.clone(), "transposed": lambda t: t.T.contiguous().T,
    "spread": lambda t: torch.zeros(2 * t.shape[0], 3 * t.shape[1], dtype=t.dtype)[::2, 1::3].copy_(t),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kernels.use(request.param):
        yield request.param


def plain(weight, a):
    """weight + B · scale @ A in the weight's dtype, as one writes it without flora."""
    return weight + (a.B.to(weight.dtype) * a.scale.to(weight.dtype)) @ a.A.to(weight.dtype)


def check_merge(weight, a):
    exact, expected = weight.double() + a.delta(), plain(weight, a)
    got = ops.merge_(weight, a.A, a.B, a.scale)
    assert got is weight
    check(weight, expected, exact)


@pytest.mark.parametrize(("weight", "factor"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_every_dtype_into_every_dtype(backend, weight, factor):
    for shape, rank in (((33, 29), 8), ((130, 67), 3)):              # one under and one over the size from which sums are fp32
        check_merge(torch.randn(shape).to(weight), adapter(*shape, rank, dtype=factor))
    a = adapter(33, 29, 4)
    check_merge(torch.randn(33, 29).to(weight), Adapter(a.A.to(factor), a.B, a.scale))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [s[1:] for s in SHAPES] + [(70, 1), (1, 70), (300, 17)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 40, 300])
def test_shapes_and_ranks(backend, shape, rank, dtype):
    check_merge(torch.randn(shape).to(dtype), adapter(*shape, rank))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("w", "a", "b"), list(itertools.product(LAYOUTS, repeat=3)))
def test_any_strides_of_all_three(backend, w, a, b, dtype):
    ranks = adapter(66, 67, 5, dtype=dtype)
    weight = LAYOUTS[w](torch.randn(66, 67).to(dtype))
    around = weight._base.clone() if weight._base is not None else None
    given = Adapter(LAYOUTS[a](ranks.A), LAYOUTS[b](ranks.B), torch.rand(5))
    spread_scale = torch.rand(10)[::2].copy_(given.scale)
    check_merge(weight, Adapter(given.A, given.B, spread_scale))
    if w == "spread":                                                # the elements between belong to somebody else
        weight.zero_(), around[::2, 1::3].zero_()
        assert torch.equal(weight._base, around)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rounding_is_once_and_to_nearest(backend, dtype):
    """Whole numbers whose sums fp32 holds exactly, large ones that cancel and small ones that must survive them."""
    for shape in ((8, 8), (80, 81)):
        weight, whole = torch.randint(-256, 257, shape).to(dtype), lambda *size: torch.randint(-8, 9, size).float()
        A, B = whole(3, shape[1]), whole(shape[0], 3)
        large, small = Adapter(A, B, 4097.0), Adapter(whole(9, shape[1]), whole(shape[0], 9), 1.0)
        stacked = flora.stack([large, small, Adapter(A, B, -4096.0)]).to(dtype)       # B · 4097 is no number of 16 bits
        exact = (weight.double() + small.delta() + Adapter(A, B, 1.0).delta()).to(dtype)
        assert torch.equal(ops.merge_(weight, stacked.A, stacked.B, stacked.scale), exact)


def test_the_papers_stack_merges_as_its_clients_one_by_one_in_fp64(backend):
    weight, many = torch.randn(96, 80), [adapter(96, 80, r) * (1 / 10) for r in PAPER_RANKS]
    exact, step = weight.double() + sum(a.delta() for a in many), weight.clone()
    for a in many:
        step += (a.B * a.scale) @ a.A
    stacked = flora.stack(many)
    check(ops.merge_(weight, stacked.A, stacked.B, stacked.scale), step, exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_number_of_threads_changes_no_bit(backend, dtype):
    before, results = torch.get_num_threads(), []
    a, weight = adapter(260, 300, 24, dtype=dtype), torch.randn(260, 300).to(dtype)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.merge_(weight.clone(), a.A, a.B, a.scale))
    finally:
        torch.set_num_threads(before)
    if backend == "native":
        assert all(torch.equal(results[0], r) for r in results)
    for r in results:
        check(r, plain(weight, a), weight.double() + a.delta())


def test_factors_may_be_views_of_the_weight(backend):
    for size in (40, 600):                                           # more than one block of rows of either backend
        weight = torch.randn(size, size) / size**0.5
        a = Adapter(weight[:3], weight[5:8].T, weight[0, :3])
        frozen = copy.deepcopy(a)
        exact, expected = weight.double() + frozen.delta(), plain(weight, frozen)
        ops.merge_(weight, a.A, a.B, a.scale)
        check(weight, expected, exact)


def test_nothing_to_merge_changes_nothing(backend):
    weight = torch.randn(7, 5)
    before = weight.clone()
    ops.merge_(weight, torch.empty(0, 5), torch.empty(7, 0), torch.empty(0))
    a = adapter(7, 5, 3) * 0
    assert torch.equal(ops.merge_(weight, a.A, a.B, a.scale), before)
    for shape in ((0, 5), (7, 0)):
        assert ops.merge_(torch.empty(shape), torch.ones(2, shape[1]), torch.ones(shape[0], 2), torch.ones(2)).shape == shape


def test_a_parameter_is_written_without_a_graph_and_its_version_rises(backend):
    weight, a = torch.nn.Parameter(torch.randn(7, 5)), adapter(7, 5, 3)
    leaf, version = a.A.clone().requires_grad_(), weight._version
    ops.merge_(weight, leaf, a.B, a.scale)
    assert weight._version > version and weight.is_leaf and weight.requires_grad and leaf.grad is None
    version = weight._version
    with torch.inference_mode():
        ops.merge_(weight, a.A, a.B, a.scale)
    assert weight._version > version


def test_a_scale_of_another_dtype_is_read_as_fp32(backend):
    a, weight = adapter(7, 5, 3), torch.randn(7, 5)
    expected = ops.merge_(weight.clone(), a.A, a.B, a.scale)
    for dtype in FLOATS:
        assert torch.equal(ops.merge_(weight.clone(), a.A, a.B, a.scale.to(dtype)), expected)


def outputs(rank, dtype=torch.float32, layout="contiguous"):
    return (LAYOUTS[layout](torch.full((rank, 29), float("nan"), dtype=dtype)),
            LAYOUTS[layout](torch.full((31, rank), float("nan"), dtype=dtype)), torch.full((rank,), float("nan")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("out", "factor"), [*zip(FLOATS, FLOATS, strict=True), (torch.float32, torch.bfloat16),
                                             (torch.bfloat16, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_stack_is_cat(backend, out, factor, layout):
    many = [adapter(31, 29, r, dtype=factor) * (1 / 3) for r in (*PAPER_RANKS, 1, 29)]
    ranks = [[LAYOUTS[layout](getattr(a, name)) for a in many] for name in ("A", "B")] + [[a.scale for a in many]]
    given = outputs(sum(a.rank for a in many), out, layout)
    versions = [t._version for t in given]
    got = ops.stack_(*given, *ranks)
    assert all(g is t and t._version > v for g, t, v in zip(got, given, versions, strict=True))
    assert torch.equal(got[0], torch.cat(ranks[0]).to(out)) and torch.equal(got[1], torch.cat(ranks[1], 1).to(out))
    assert torch.equal(got[2], torch.cat(ranks[2]))


def test_stack_takes_adapters_without_ranks_and_none_at_all(backend):
    a, none = adapter(31, 29, 4), (torch.empty(0, 29), torch.empty(31, 0), torch.empty(0))
    got = ops.stack_(*outputs(4), [none[0], a.A, none[0]], [none[1], a.B, none[1]], [none[2], a.scale, none[2]])
    assert torch.equal(got[0], a.A) and torch.equal(got[1], a.B) and torch.equal(got[2], a.scale)
    ops.stack_(*outputs(0), [], [], [])


def test_stack_keeps_the_bits_of_every_number(backend):
    """Infinities, NaN, zeros of both signs and subnormals are copied, not computed."""
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e-45, 3e38, 0.0]).repeat(29)[:29]
    A, B = special.expand(2, 29).clone(), torch.randn(31, 2)
    out = ops.stack_(*outputs(2), [A], [B], [torch.tensor([float("inf"), -0.0])])
    assert torch.equal(out[0].view(torch.int32), A.view(torch.int32))
    assert out[2].tolist() == [float("inf"), 0.0] and bool(out[2][1].signbit())
