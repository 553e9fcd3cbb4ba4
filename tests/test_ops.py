"""lora_linear: the output and every gradient against a dense fp64 oracle, by the one error rule."""
import oracles
import pytest
import torch
from oracles import FLOATS, RANKS, SHAPES, Case, check, check_case

from flora import kernels, ops

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (x, weight, factors)
MIXES = ((BF16, BF16, FP32), (FP16, FP16, FP32), (FP32, BF16, BF16), (FP32, FP16, FP64), (FP64, FP32, FP16), (BF16, FP32, FP16))
COHORT = {"rows": (5, 0, 11, 1, 17), "ranks": (8, 4, 40, 1, 3)}


def flora_linear(case, **changes):
    """The operator with the operands of the case, as a function of those that get a gradient."""
    return lambda x, A, B: ops.lora_linear(x, case.weight, A, B, case.scale, **{**case.keywords(), **changes})


def cohort(N=31, K=29, **options):
    return Case(sum(COHORT["rows"]), N, K, COHORT["ranks"], rows=COHORT["rows"], **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_one_adapter(shape, rank, dtype):
    case = Case(*shape, [rank], x=dtype, bias=rank % 2 == 0)
    check_case(case, flora_linear(case))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_cohort_of_mixed_ranks_of_which_one_has_no_rows(dtype, bias):
    case = cohort(x=dtype, bias=bias)
    check_case(case, flora_linear(case))


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_dtypes_mix(mix):
    x, weight, factor = mix
    for case in (Case(33, 31, 29, [8], x=x, weight=weight, factor=factor, bias=True),
                 cohort(x=x, weight=weight, factor=factor, frozen=6, dropout=0.3)):
        check_case(case, flora_linear(case))
        y = flora_linear(case)(*case.operands)
        assert y.dtype == x and case.A.dtype == case.B.dtype == factor


@pytest.mark.parametrize(("M", "N", "K", "rank"), [(8, 8, 8, 8), (5, 12, 7, 7), (5, 7, 12, 7), (3, 5, 4, 64)], ids=str)
def test_a_rank_that_equals_a_feature_size_or_exceeds_it(M, N, K, rank):
    case = Case(M, N, K, [rank])
    check_case(case, flora_linear(case))
    case = Case(M, N, K, [rank, 2], rows=[M - 2, 2], frozen=rank)
    check_case(case, flora_linear(case))


@pytest.mark.parametrize("rows", [(0,), (0, 0, 0)])
def test_no_rows_at_all(rows):
    case = Case(0, 5, 7, [3] * len(rows), rows=rows if len(rows) > 1 else None, frozen=2, bias=True)
    y, dx, dA, dB = oracles.output_and_gradients(flora_linear(case), case.operands, case.dy)
    assert y.shape == (0, 5) and dx.shape == (0, 7) and not dA.any() and not dB.any()


@pytest.mark.parametrize("rows", [(6,), (1,) * 24, (3, 0, 0, 5)], ids=str)
def test_one_client_many_clients_and_absent_ones(rows):
    case = Case(sum(rows), 11, 13, [1 + k % 4 for k in range(len(rows))], rows=rows)
    check_case(case, flora_linear(case))
    _, _, dA, dB = oracles.output_and_gradients(flora_linear(case), case.operands, case.dy)
    for (_, seen, ranks), count in zip(case.segments(), rows, strict=True):
        assert seen.stop - seen.start == count
        assert bool(dA[ranks].any()) == bool(dB[:, ranks].any()) == bool(count)


def test_offsets_as_a_list_a_tensor_or_segments_are_one():
    case = cohort()
    segments = ops.Segments(case.row_offsets, torch.tensor(case.rank_offsets))
    assert (segments.num_clients, segments.num_rows, segments.num_ranks, segments.max_rank) == (5, 34, 56, 40)
    results = [flora_linear(case, **given)(*case.operands) for given in (
        {}, {"row_offsets": torch.tensor(case.row_offsets, dtype=torch.int32), "rank_offsets": tuple(case.rank_offsets)},
        {"row_offsets": segments, "rank_offsets": None})]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_segments_are_separate_calls():
    case = cohort(frozen=6, ranges=[(0, 6), (1, 2), (2, 6), (0, 0), (3, 6)], dropout=0.2)

    def separately(x, A, B):
        parts = []
        for k, rows, ranks in case.segments():
            own = slice(*case.ranges[k])
            frozen = (case.frozen.A[own], case.frozen.B[:, own], case.frozen.scale[own])
            parts.append(ops.lora_linear(x[rows], case.weight, A[ranks], B[:, ranks], case.scale[ranks], frozen=frozen,
                                         dropout=0.2, seed=case.keys[rows]))
        return torch.cat(parts)

    check_case(case, flora_linear(case), separately)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["all rows", "ranges", "one client", "no client"])
def test_frozen_ranks(kind, dropout, dtype):
    """Ranges may overlap, be empty or be shared; frozen ranks see x without dropout."""
    options = {"frozen": 9, "dropout": dropout, "x": dtype, "bias": True}
    if kind == "ranges":
        case = cohort(ranges=[(0, 9), (3, 9), (3, 9), (4, 4), (0, 2)], **options)
    elif kind == "all rows":
        case = cohort(**options)
    else:
        case = Case(21, 13, 11, [5], ranges=[(2, 7)] if kind == "one client" else None, **options)
    check_case(case, flora_linear(case))


def test_frozen_ranks_as_an_adapter_a_tuple_or_frozen_are_one_and_get_no_gradient():
    case = Case(21, 13, 11, [5], frozen=4)
    held = [t.clone().requires_grad_() for t in (case.frozen.A, case.frozen.B, case.frozen.scale)]
    results = [flora_linear(case, frozen=given)(case.x, case.A.clone().requires_grad_(), case.B)
               for given in (case.frozen, tuple(held), ops.Frozen(*held))]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    results[2].sum().backward()
    assert all(t.grad is None for t in held)
    fewer = flora_linear(case, frozen=None)(*case.operands)
    assert oracles.relative(results[0].detach() - fewer, case.x @ case.frozen.delta().float().T) < 1e-6


def spread(t):
    """The same matrix as every second element of a larger one, in both directions."""
    large = torch.full((2 * t.shape[0], 2 * t.shape[1]), float("nan"), dtype=t.dtype)
    large[::2, 1::2] = t
    return large[::2, 1::2]


@pytest.mark.parametrize("layout", [spread, lambda t: t.T.contiguous().T], ids=["spread", "transposed"])
@pytest.mark.parametrize("packed", [False, True])
def test_any_strides(layout, packed):
    case = cohort(frozen=4) if packed else Case(33, 31, 29, [8], bias=True, frozen=4)
    for name in ("x", "weight", "A", "B", "dy"):
        setattr(case, name, layout(getattr(case, name)))
        assert not getattr(case, name).is_contiguous()
    case.scale = spread(case.scale[:, None])[:, 0]
    frozen = ops.Frozen(layout(case.frozen.A), layout(case.frozen.B), case.frozen.scale)
    check_case(case, flora_linear(case, frozen=frozen))


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_the_gradient_of_B_lies_as_B_does(backend):
    """Ranks outermost where B's are: so autograd keeps the gradient as it comes, and a client's part of it is one piece."""
    if (why := kernels._load(backend)[1]):
        pytest.skip(f"the layout of {backend}'s dB is not tested: {why}")
    for B in (torch.randn(7, 5), torch.randn(5, 7).T, spread(torch.randn(7, 5)), torch.randn(1, 5), torch.randn(5, 1)):
        B = B.requires_grad_()
        A, x = torch.randn(B.shape[1], 6, requires_grad=True), torch.randn(20, 6)
        with kernels.use(backend):
            ops.lora_linear(x, torch.randn(B.shape[0], 6), A, B, torch.ones(B.shape[1])).sum().backward()
        turned = B.T.is_contiguous() and not B.is_contiguous()
        assert B.grad.stride() == (B.stride() if turned else B.grad.contiguous().stride()) and A.grad.is_contiguous()


@pytest.mark.parametrize("packed", [False, True])
def test_a_gradient_of_stride_zero(packed):
    """What .sum().backward() sends."""
    case = cohort() if packed else Case(33, 31, 29, [8])
    case.dy = torch.ones(()).expand(case.dy.shape)
    check_case(case, flora_linear(case))
    expected = oracles.output_and_gradients(flora_linear(case), case.operands, case.dy.contiguous())
    leaves = [t.clone().requires_grad_() for t in case.operands]
    flora_linear(case)(*leaves).sum().backward()
    assert all(torch.equal(leaf.grad, e) for leaf, e in zip(leaves, expected[1:], strict=True))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
def test_x_of_any_number_of_axes(lead):
    case = Case(max(1, torch.Size(lead).numel()) if 0 not in lead else 0, 7, 5, [3], bias=True)
    x = case.x.reshape(*lead, 5).requires_grad_()
    y = ops.lora_linear(x, case.weight, case.A, case.B, case.scale, case.bias)
    assert y.shape == (*lead, 7)
    exact = case.exact(*(t.double() for t in case.operands))
    check(y.detach().reshape(-1, 7), case.plain(*case.operands), exact)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_a_scale_of_another_dtype_is_read_as_fp32():
    case = Case(5, 7, 6, [3])
    scale = torch.tensor([0.5, 2.0, 1.25])
    for dtype in FLOATS:
        got = ops.lora_linear(case.x, case.weight, case.A, case.B, scale.to(dtype))
        assert torch.equal(got, ops.lora_linear(case.x, case.weight, case.A, case.B, scale))


def test_clients_do_not_touch_each_other():
    """A NaN stays where it arose."""
    case = cohort()
    clean = oracles.output_and_gradients(flora_linear(case), case.operands, case.dy)
    rows, ranks = slice(5, 16), slice(12, 52)
    x, A = case.x.clone(), case.A.clone()
    x[rows], A[ranks] = float("nan"), float("inf")
    dirty = oracles.output_and_gradients(flora_linear(case), (x, A, case.B), case.dy)
    for kind, (good, bad) in enumerate(zip(clean, dirty, strict=True)):
        axis = (rows, rows, ranks, ranks)[kind]
        good, bad = (good.T, bad.T) if kind == 3 else (good, bad)
        other = torch.ones(len(good), dtype=torch.bool)
        other[axis] = False
        assert torch.equal(good[other], bad[other]) and not torch.isfinite(bad[axis]).all()


def test_autocast_gives_what_linear_layers_give():
    case = Case(33, 31, 29, [8], bias=True, frozen=3)

    def autocast(function):
        def run(*operands):
            with torch.autocast("cpu", dtype=BF16):
                return function(*operands)
        return run

    def plain(x, A, B):
        linear = torch.nn.functional.linear
        y = linear(x, case.weight, case.bias) + linear(linear(x, A) * case.scale, B)
        return y + linear(linear(x, case.frozen.A) * case.frozen.scale, case.frozen.B)

    check_case(case, autocast(flora_linear(case)), autocast(plain), BF16)
    doubles = [t.double() for t in case.operands]
    assert autocast(flora_linear(case))(*doubles).dtype == FP64       # autocast leaves fp64 alone
