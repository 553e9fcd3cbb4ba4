"""The compiled merge_ over lists: exactness, its two roundings bit for bit, bounded scratch; and first_not_finite."""
import ctypes
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
from oracles import FLOATS, PAPER_RANKS, check, check_checked_merge

from flora import kernels

WHY = kernels._load("native")[1]
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"the compiled merge_ was not tested: {WHY}")
if not WHY:
    from flora.kernels import native

MASK, GOLDEN = 2**32 - 1, 0x9E3779B1
SIXTEEN = (torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda t: t.clone(), "transposed": lambda t: t.T.contiguous().T,
    "spread": lambda t: torch.full((2 * t.shape[0], 3 * t.shape[1]), 9, dtype=t.dtype)[::2, 1::3].copy_(t),
}
# Every one of: a single row, column, element; primes; just off the blocks of 8, 48, 64 and 256; over 4096 elements or not
SHAPES = ((1, 1), (1, 5003), (4999, 1), (7, 13), (61, 67), (64, 65), (257, 97), (131, 577), (520, 49))
RANKS = ((), (0,), (1,), (3, 0, 40), PAPER_RANKS, (300, 700, 1), (256,), (255, 2), (512, 1))
PAIRS = [*itertools.product(SHAPES, RANKS)][::2]


def mix(z):
    z = ((z ^ z >> 16) * 0x85EBCA6B) & MASK
    z = ((z ^ z >> 13) * 0xC2B2AE35) & MASK
    return z ^ z >> 16


def draws(rows, columns, seed):
    """What the definition draws for every element, in int64."""
    i, j = (torch.arange(n) * GOLDEN & MASK for n in (rows, columns))
    return mix(j ^ (mix(i ^ seed % 2**32) ^ (seed >> 32) % 2**32)[:, None])


def rounded(value, dtype, draw):
    """value in dtype: to nearest, or stochastically where there are draws and dtype has 16 bits."""
    if draw is None or dtype not in SIXTEEN:
        return value.to(dtype)
    x = value.float()
    bits, size = x.view(torch.int32), x.abs()
    keep = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    up = ((bits + (draw & keep).int()) & ~keep).view(torch.float32)
    if dtype == torch.float16:
        steps = size * 2.0**24
        small = (steps.floor() + (steps - steps.floor() > (draw >> 8).float() * 2.0**-24)) * 2.0**-24
        up = torch.where(size >= 2.0**-14, up, small.copysign(x))
    return torch.where(x.isfinite(), up, x).to(dtype)


def reference(weight, residual, total, seed):
    """(weight, residual) after the rule, in the working type; total: the sum over clients, exact."""
    work = torch.float64 if weight.dtype == torch.float64 or weight.numel() <= 4096 else torch.float32
    draw = None if seed is None else draws(*weight.shape, seed)
    w, t = weight.to(work), total.to(work)
    if residual is None:
        return rounded(w + t, weight.dtype, draw), None
    t = t + residual.to(work)
    new = (w + t).to(weight.dtype)
    moved = new.to(work) - w
    return new, rounded((w - (new.to(work) - moved)) + (t - moved), residual.dtype, draw)


def whole(*size, top=4):
    return torch.randint(-top, top + 1, size).double()


def total(clients, weight):
    return sum(((B.double() * s.double()) @ A.double() for A, B, s in clients), torch.zeros(weight.shape, dtype=torch.float64))


def flat(layers):
    """As, Bs, scales, counts of the layers' clients."""
    return (*([c[n] for clients in layers for c in clients] for n in range(3)), [len(clients) for clients in layers])


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lists_of_every_shape_rank_dtype_and_stride_are_exact(dtype, layout):
    """One call for all: each weight dtype and layout with factors of every dtype, layout and of stride 0."""
    drawn, weights, layers, exact, plain = random.Random(0), [], [], [], []
    for shape, ranks in PAIRS:
        clients = []
        for r in ranks:
            A, B = torch.randn(r, shape[1]), torch.randn(shape[0], r) / max(1, r) ** 0.5
            A, B = (LAYOUTS[drawn.choice(list(LAYOUTS))](t.to(drawn.choice(FLOATS))) for t in (A, B))
            if r and drawn.random() < 0.2:
                A, B = drawn.choice(((A[:1].expand(r, -1), B), (A, B[:, :1].expand(-1, r)), (A[:, :1].expand(-1, shape[1]), B)))
            clients.append((A, B, torch.rand(2 * r)[::2] if r > 3 else torch.rand(1).expand(r)))
        weights.append(LAYOUTS[layout](torch.randn(shape).to(dtype)))
        layers.append(clients)
        exact.append(weights[-1].double() + total(clients, weights[-1]))
        step = weights[-1].clone()
        for A, B, s in clients:
            step += ((B.to(dtype) * s.to(dtype)) @ A.to(dtype))
        plain.append(step)
    native.merge_(weights, [], *flat(layers), [])
    for weight, p, e, pair in zip(weights, plain, exact, PAIRS, strict=True):
        check(weight, p, e, what=str(pair))
        if layout == "spread":
            rest = weight._base.clone()
            rest[::2, 1::3] = 9
            assert bool((rest == 9).all()), "elements between those of the weight were written"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kept", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("seeded", [False, True])
def test_the_roundings_bit_for_bit(dtype, kept, seeded):
    """Whole numbers times powers of two, whose sums are exact in any order, against the rule in plain torch."""
    weights, residuals, layers, expected, seeds = [], [], [], [], []
    scales = (1.0, 2.0**-6, 2.0**-10, 2.0**-16, 2.0**-26, 2.0**9)     # into fp16's subnormals, and beyond what it holds
    drawn = random.Random(0)
    for (shape, ranks), scale in zip(PAIRS, itertools.cycle(scales), strict=False):
        layout = drawn.choice(list(LAYOUTS))
        clients = [(whole(r, shape[1]).float(), whole(shape[0], r).float(), torch.full((r,), scale)) for r in ranks]
        weight = (whole(*shape, top=300) * min(scale, 16.0)).to(dtype)
        weight.view(-1)[:: 7] = torch.randn(weight.view(-1)[:: 7].shape).to(dtype)
        residual = None if kept is None else (whole(*shape, top=50) * scale / 64).to(kept)
        seed = drawn.randrange(-2**63, 2**63) if seeded else None
        expected.append(reference(weight, residual, total(clients, weight), seed))
        weights.append(LAYOUTS[layout](weight)), layers.append(clients), seeds.append(seed)
        residuals += [LAYOUTS[drawn.choice(list(LAYOUTS))](residual)] if kept else []
    native.merge_(weights, residuals, *flat(layers), seeds if seeded else [])
    for k, (weight, (new, rest)) in enumerate(zip(weights, expected, strict=True)):
        torch.testing.assert_close(weight, new, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=k: f"weight {k}: {m}")
        if kept:
            torch.testing.assert_close(residuals[k], rest, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=k: f"residual {k}: {m}")


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_what_is_not_finite_or_at_the_edge_is_rounded_as_the_rule_says(dtype):
    top = torch.finfo(dtype).max
    values = [float("inf"), float("-inf"), float("nan"), top, -top, 0.0, 2.0**-14, 2.0**-24, -(2.0**-25), 1.0]
    total = torch.tensor([*values, top * (1 + 2.0**-11), -top * (1 + 2.0**-10), 2.0**-14 - 2.0**-30, 1e-30]).repeat(400, 1)
    total.view(torch.int32)[:, 9] = 2**31 - 1                        # a NaN whose bits must not overflow into a number
    for weight, shape in ((torch.zeros(400, 14, dtype=dtype), 400), (torch.zeros(200, 14, dtype=dtype), 200)):
        t, (A, B) = total[:shape], (total[:1], torch.ones(shape, 1))
        expected, _ = reference(weight, None, t, 5)
        native.merge_([weight], [], [A], [B], [torch.ones(1)], [1], [5])
        torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)
        assert weight[:, 0].isinf().all() and weight[:, [2, 9]].isnan().all() and (weight[:, 3] == top).all()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("value", [1.001, -3.3, 1e-5, -3.1e-8, 700.123])
def test_stochastic_rounding_is_right_on_average(dtype, value):
    weight = torch.zeros(300, 300, dtype=dtype)
    native.merge_([weight], [], [torch.full((1, 300), value)], [torch.ones(300, 1)], [torch.ones(1)], [1], [123456789012])
    held = weight.unique().double()
    step = float(held.max() - held.min())
    assert len(held) == 2 and held.min() < value < held.max()
    assert abs(float(weight.double().mean()) - value) < 5 * step / 600                # five times the error of 90000 draws


def test_the_number_of_threads_changes_no_bit(threads):
    shapes = [(260, 300), (1, 5), (1100, 97), (64, 48), (97, 1100)] * 2
    layers = [[(torch.randn(r, i), torch.randn(o, r), torch.rand(r)) for r in (24, 0, 280)] for o, i in shapes]
    for kept, seeds in itertools.product((False, True), ([], list(range(10)))):
        results = []
        weights = [torch.randn(s).to(FLOATS[k % 4]) for k, s in enumerate(shapes)]
        for n in (1, 2, 3, 5):
            threads(n)
            got, rest = [w.clone() for w in weights], [w * 2.0**-9 for w in weights] if kept else []
            native.merge_(got, rest, *flat(layers), seeds)
            results.append(got + rest)
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure the scratch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scratch_is_under_a_megabyte_for_each_thread(threads, dtype):
    """The peak of the process's memory over one call that would need 13 MB for packed factors, 64 MB for a dense product."""
    def memory(field):
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line) * 1024

    threads(2)
    for ranks in ((7, 3), (250,), (300, 500)):
        clients = [(torch.randn(r, 4096), torch.randn(2048, r), torch.rand(r)) for r in ranks]
        weight, residual = (torch.randn(2048, 4096).to(dtype) for _ in range(2))
        native.merge_([torch.ones(70, 70)], [], [torch.ones(1, 70)], [torch.ones(70, 1)], [torch.ones(1)], [1], [])
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")                # the peak starts anew
        before = memory("VmRSS")
        native.merge_([weight], [residual], *flat([clients]), [])
        assert memory("VmHWM") - before < 2 * 2**20 + 2**19, ranks


def call(**changed):
    """A list of two layers where the argument `changed` is another; returns the weights, which nothing may have touched."""
    given = {"weights": [torch.zeros(9, 8), torch.zeros(6, 5)], "residuals": [torch.zeros(9, 8), torch.zeros(6, 5)],
             "As": [torch.ones(2, 8), torch.ones(3, 5)], "Bs": [torch.ones(9, 2), torch.ones(6, 3)],
             "scales": [torch.ones(2), torch.ones(3)], "counts": [1, 1], "seeds": [1, 2]}
    given.update(changed)
    try:
        native.merge_(*given.values())
    finally:
        assert not given["weights"][0].any() and (not given["residuals"] or not given["residuals"][0].any())


@pytest.mark.parametrize(("changed", "message"), [
    ({"weights": [torch.zeros(9, 8), torch.zeros(6)]}, r"expected weights\[1\] \(out, in\) with 2 dim.*, got shape \(6,\)"),
    ({"weights": [torch.zeros(9, 8), torch.zeros(6, 5).int()]}, r"expected weights\[1\].* in float32, float64"),
    ({"weights": [torch.zeros(9, 8), torch.zeros(6, 1).expand(6, 5)]}, r"expected weights\[1\] to own each of its elements"),
    ({"residuals": [torch.zeros(9, 8)]}, "expected no residuals or one for each of the 2 weights, got 1"),
    ({"residuals": [torch.zeros(9, 8), torch.zeros(5, 6)]}, r"expected residuals\[1\] of the weight's shape \(6, 5\), got"),
    ({"As": [torch.ones(2, 8), torch.ones(3, 6)]}, r"expected As\[1\].* of shape \(6, 5\), got \(3, 6\), \(6, 3\) and \(3,\)"),
    ({"scales": [torch.ones(2), torch.ones(2)]}, r"expected As\[1\] \(r, in\), Bs\[1\]"),
    ({"scales": [torch.ones(2), torch.ones(3).double()]}, r"expected scales\[1\] in float32, got float64"),
    ({"As": [torch.ones(2, 8)]}, "expected as many As, Bs and scales as the 2 clients that the counts add up to, got 1, 2 and 2"),
    ({"counts": [2]}, "expected one count for each of the 2 weights, got 1"),
    ({"counts": [3, -1]}, "expected counts of 0 or more, got -1"),
    ({"seeds": [1]}, "expected no seeds or one for each of the 2 weights, got 1"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_errors_come_before_any_write(changed, message):
    with pytest.raises(RuntimeError, match=message):
        call(**changed)


def test_nothing_to_merge_changes_nothing():
    weight = torch.tensor([[0.0, -0.0, 3.0]])
    native.merge_([], [], [], [], [], [], [])
    native.merge_([weight, torch.ones(0, 4)], [], [torch.ones(0, 3), torch.ones(2, 4)], [torch.ones(1, 0), torch.ones(0, 2)],
                  [torch.ones(0), torch.ones(2)], [1, 1], [1, 2])
    assert weight.tolist() == [[0, 0, 3]] and weight[0, 1].signbit()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_first_not_finite(threads, dtype):
    info = torch.finfo(dtype)
    fine = torch.tensor([info.max, -info.max, info.tiny, -info.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    first_not_finite = torch.ops.flora_native.first_not_finite.default
    for bad, n in itertools.product((float("nan"), float("inf"), -float("inf")), (1, 2, 5)):
        threads(n)
        for shape in ((1,), (37, 29), (400_003,), (3, 700, 501), (0, 3), (5, 1, 7)):
            tensor = torch.zeros(shape, dtype=dtype)
            tensor.view(-1)[:6] = fine[: tensor.numel()]
            views = [tensor, tensor.transpose(0, -1), tensor[::2], tensor[..., ::3], tensor[None].expand(4, *shape)]
            assert first_not_finite([*views, *views]) == -1
            for view in views:
                if view.numel():
                    view[(-1,) * view.dim()] = bad
                    assert first_not_finite([torch.ones(90, 90), fine, torch.empty(0), view, fine, tensor]) == 3
                    view[(-1,) * view.dim()] = 0
    with pytest.raises(RuntimeError, match=r"expected tensors\[1\] in float32.*got dtype number"):
        first_not_finite([fine, torch.ones(3).int()])


def test_what_is_wrong_with_a_factor_is_found():
    check_checked_merge(native.checked_merge_, "cpu")
