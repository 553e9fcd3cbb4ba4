"""The CUDA kernels of merge_ and stack_ against fp64, and bit for bit against the CPU operator where the sums are exact."""
import itertools
from types import SimpleNamespace

import pytest
import torch
from oracles import FLOATS, PAPER_RANKS, adapter, check

from flora import kernels

module, why = kernels._load("native")
WITHOUT = module is None or "cuda" not in module.OPERATORS["merge_"]
SAID = f"the CUDA merge_ and stack_ were not tested: {why or 'the native extension was built without them'}"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WITHOUT, reason=SAID)]
LAYOUTS = {
    "contiguous": lambda t: t.clone(), "transposed": lambda t: t.T.contiguous().T,
    "spread": lambda t: torch.zeros(2 * t.shape[0], 3 * t.shape[1], dtype=t.dtype, device=t.device)[::2, 1::3].copy_(t),
}


def hollow(weight):
    """A client without ranks, which an Adapter cannot be."""
    out, inn = weight.shape
    return SimpleNamespace(A=weight.new_empty(0, inn), B=weight.new_empty(out, 0), scale=weight.new_empty(0, dtype=torch.float32))


def merge_(weights, layers):
    """The operator on lists of adapters, one list a weight, with a client without ranks at the end of every other list."""
    layers = [[*layer, hollow(w)] if n % 2 else layer for n, (w, layer) in enumerate(zip(weights, layers, strict=True))]
    flat = [a for layer in layers for a in layer]
    factors = [[getattr(a, name) for a in flat] for name in ("A", "B", "scale")]
    torch.ops.flora_native.merge_.default(list(weights), [], *factors, [len(layer) for layer in layers], [])


def held_to_the_rule(weights, layers):
    """Merges copies on the card and checks each against fp64."""
    exact = [w.double() + sum((a.delta() for a in layer), 0) for w, layer in zip(weights, layers, strict=True)]
    plain = []
    for w, layer in zip(weights, layers, strict=True):
        many = [a.to(w.dtype) for a in layer]
        joined = [torch.cat(parts, dim) for parts, dim in (([a.A for a in many], 0), ([a.B for a in many], 1))] if many else None
        scale = torch.cat([a.scale for a in many]).to(w.dtype) if many else None
        plain.append(w + (joined[1] * scale) @ joined[0] if many else w.clone())
    moved = [w.cuda() for w in weights]
    merge_(moved, [[a.to("cuda") for a in layer] for layer in layers])
    for got, p, e in zip(moved, plain, exact, strict=True):
        check(got.cpu(), p, e)


@pytest.mark.parametrize(("weight", "factor"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_every_dtype_into_every_dtype(weight, factor):
    """merge_ on a card with every pair of dtypes, whole tiles and edges."""
    for shape, ranks in (((33, 29), (8,)), ((130, 67), (3, 5)), ((128, 512), PAPER_RANKS), ((1, 1), (1,)), ((300, 17), (300,))):
        held_to_the_rule([torch.randn(shape).to(weight)], [[adapter(*shape, r, dtype=factor) for r in ranks]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("w", "a", "b"), list(itertools.product(LAYOUTS, repeat=3)))
def test_any_strides(w, a, b, dtype):
    """merge_ on a card with any strides, and what lies between the elements."""
    ranks, weight = adapter(66, 67, 5, dtype=dtype), LAYOUTS[w](torch.randn(66, 67).to("cuda", dtype))
    A, B, scale = LAYOUTS[a](ranks.A.cuda()), LAYOUTS[b](ranks.B.cuda()), torch.rand(10, device="cuda")[::2]
    exact = weight.double() + (B.double() * scale.double()) @ A.double()
    plain = weight + (B * scale.to(dtype)) @ A
    around = weight._base.clone() if weight._base is not None else None
    torch.ops.flora_native.merge_.default([weight], [], [A], [B], [scale], [1], [])
    check(weight, plain, exact)
    if w == "spread":
        weight.zero_(), around[::2, 1::3].zero_()
        assert torch.equal(weight._base, around)


def test_many_layers_in_one_call():
    """Layers of many shapes and dtypes with 0 to 3 clients, some without ranks, in one call of the CUDA merge_."""
    shapes = [(0, 5), (7, 0), (5, 3), (64, 256), (130, 64), (1, 1), (129, 257), (17, 300), (2000, 513)]
    weights = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, itertools.cycle(FLOATS))]

    layers = [[adapter(*shape, (3, 9, 16)[(n + k) % 3]) for k in range(n % 4 if min(shape) else 0)]
              for n, shape in enumerate(shapes)]
    held_to_the_rule(weights, layers)


def test_the_same_call_gives_the_same_bits():
    """That the CUDA merge_ is deterministic."""
    weight, many = torch.randn(700, 900, device="cuda"), [adapter(700, 900, r).to("cuda") for r in PAPER_RANKS]
    results = [weight.clone() for _ in range(3)]
    for result in results:
        merge_([result], [many])
    assert all(torch.equal(results[0], r) for r in results)


def test_factors_may_be_views_of_the_weight():
    """That the CUDA merge_ reads factors that lie in the weight before it writes."""
    weight = torch.randn(600, 600, device="cuda") / 25
    A, B, scale = weight[:3], weight[5:8].T, weight[0, :3]
    delta = (B.double() * scale.double()) @ A.double()
    exact, plain = weight.double() + delta, weight + (B * scale) @ A
    torch.ops.flora_native.merge_.default([weight], [], [A], [B], [scale], [1], [])
    check(weight, plain, exact)


@pytest.mark.parametrize("seeded", [False, True], ids=["nearest", "by chance"])
@pytest.mark.parametrize("residual", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_roundings_are_those_of_the_cpu(dtype, residual, seeded):
    """Every rounding of the CUDA merge_, bit for bit, on whole numbers (whose sums are exact) of every size."""
    shapes = ((66, 130), (64, 256), (3, 5))
    for (out, inn), unit, layout in itertools.product(shapes, (1.0, 2.0**-19), ("contiguous", "transposed")):
        def whole(*shape, by=8, unit=unit):
            return torch.randint(-by, by + 1, shape).double() * unit

        As, Bs, scales = [whole(3, inn).float()], [whole(out, 3, unit=1).float()], [torch.tensor([1.0, -2.0, 0.5])]
        weight = LAYOUTS[layout](whole(out, inn, by=256).to(dtype))
        rest = [whole(out, inn, by=64, unit=unit / 4).to(residual)] if residual else []
        seeds = [-1234567890123456789] if seeded else []
        moved, moved_rest = LAYOUTS[layout](weight.cuda()), [t.cuda() for t in rest]
        torch.ops.flora_native.merge_.default([weight], rest, As, Bs, scales, [1], seeds)
        on_card = [[t.cuda() for t in each] for each in (As, Bs, scales)]
        torch.ops.flora_native.merge_.default([moved], moved_rest, *on_card, [1], seeds)
        assert torch.equal(moved.cpu(), weight)
        assert all(torch.equal(m.cpu(), r) for m, r in zip(moved_rest, rest, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("out", "factor"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_stack_is_cat(out, factor, layout):
    """The CUDA stack_, with every pair of dtypes and any strides."""
    for height, width, ranks in ((31, 29, (*PAPER_RANKS, 1, 29)), (64, 4096, (16, 8)), (1, 1, (1,))):
        many, total = [adapter(height, width, r, dtype=factor).to("cuda") for r in ranks], sum(ranks)
        many.insert(1, hollow(many[0].B @ many[0].A))
        As, Bs = [LAYOUTS[layout](a.A) for a in many], [LAYOUTS[layout](a.B) for a in many]
        shapes = ((total, width), (height, total))
        got = [LAYOUTS[layout](torch.full(shape, float("nan"), device="cuda", dtype=out)) for shape in shapes]
        scale = torch.full((total,), float("nan"), device="cuda")
        torch.ops.flora_native.stack_.default(*got, scale, As, Bs, [a.scale for a in many])
        assert torch.equal(got[0], torch.cat(As).to(out)) and torch.equal(got[1], torch.cat(Bs, 1).to(out))
        assert torch.equal(scale, torch.cat([a.scale for a in many]))
