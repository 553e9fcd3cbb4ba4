"""The CUDA kernels of merge_, stack_ and first_not_finite against fp64, and bit for bit against the CPU's where sums are exact.

Every test runs twice: on a card, and on the host, compiled by g++ (on_host.py), where a card is not needed.
"""
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from on_host import CXX, build, sanitized
from oracles import FLOATS, PAPER_RANKS, adapter, check, check_checked_merge

from flora import kernels

module, why = kernels._load("native")
WITHOUT = module is None or "cuda" not in module.OPERATORS["merge_"]
SAID = f"the CUDA merge_ and stack_ were not tested: {why or 'the native extension was built without them'}"
CARD = [pytest.mark.gpu, pytest.mark.skipif(WITHOUT, reason=SAID)]
HOST = pytest.mark.skipif(CXX is None, reason="no g++ here: the CUDA kernels were not run on the host")
LAYOUTS = {
    "contiguous": lambda t: t.clone(), "transposed": lambda t: t.T.clone(memory_format=torch.contiguous_format).T,
    "spread": lambda t: torch.zeros(2 * t.shape[0], 3 * t.shape[1], dtype=t.dtype, device=t.device)[::2, 1::3].copy_(t),
}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """torch.ops.flora_on_host, built once."""
    torch.ops.load_library(str(build(tmp_path_factory.mktemp("host"))))
    return torch.ops.flora_on_host


@pytest.fixture(params=[pytest.param("cuda", marks=CARD), pytest.param("host", marks=HOST)])
def card(request):
    """Where a test runs: the device, and the operators there."""
    if request.param == "cuda":
        return SimpleNamespace(device="cuda", ops=torch.ops.flora_native)
    return SimpleNamespace(device="cpu", ops=request.getfixturevalue("on_host"))


def hollow(weight):
    """A client without ranks, which an Adapter cannot be."""
    out, inn = weight.shape
    return SimpleNamespace(A=weight.new_empty(0, inn), B=weight.new_empty(out, 0), scale=weight.new_empty(0, dtype=torch.float32))


def merge_(card, weights, layers, residuals=(), seeds=()):
    """The operator on lists of adapters, one list a weight, with a client without ranks at the end of every other list."""
    layers = [[*layer, hollow(w)] if n % 2 else layer for n, (w, layer) in enumerate(zip(weights, layers, strict=True))]
    flat = [a for layer in layers for a in layer]
    factors = [[getattr(a, name) for a in flat] for name in ("A", "B", "scale")]
    card.ops.merge_.default(list(weights), list(residuals), *factors, [len(layer) for layer in layers], list(seeds))


def held_to_the_rule(card, weights, layers):
    """Merges copies on the card and checks each against fp64."""
    exact = [w.double() + sum((a.delta() for a in layer), 0) for w, layer in zip(weights, layers, strict=True)]
    plain = []
    for w, layer in zip(weights, layers, strict=True):
        many = [a.to(w.dtype) for a in layer]
        joined = [torch.cat(parts, dim) for parts, dim in (([a.A for a in many], 0), ([a.B for a in many], 1))] if many else None
        scale = torch.cat([a.scale for a in many]).to(w.dtype) if many else None
        plain.append(w + (joined[1] * scale) @ joined[0] if many else w.clone())
    moved = [w.to(card.device, copy=True) for w in weights]
    merge_(card, moved, [[a.to(card.device) for a in layer] for layer in layers])
    for got, p, e in zip(moved, plain, exact, strict=True):
        check(got.cpu(), p, e)


@pytest.mark.parametrize(("weight", "factor"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_every_dtype_into_every_dtype(card, weight, factor):
    """merge_ on a card with every pair of dtypes, whole tiles and edges."""
    for shape, ranks in (((33, 29), (8,)), ((130, 67), (3, 5)), ((128, 512), PAPER_RANKS), ((1, 1), (1,)), ((100, 17), (300,))):
        held_to_the_rule(card, [torch.randn(shape).to(weight)], [[adapter(*shape, r, dtype=factor) for r in ranks]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides(card, dtype):
    """merge_ on a card with any strides, and what lies between the elements."""
    for w, a, b in itertools.product(LAYOUTS, repeat=3):
        ranks, weight = adapter(66, 67, 5, dtype=dtype), LAYOUTS[w](torch.randn(66, 67).to(card.device, dtype))
        A, B = LAYOUTS[a](ranks.A.to(card.device)), LAYOUTS[b](ranks.B.to(card.device))
        scale = torch.rand(10, device=card.device)[::2]
        exact = weight.double() + (B.double() * scale.double()) @ A.double()
        plain = weight + (B * scale.to(dtype)) @ A
        around = weight._base.clone() if weight._base is not None else None
        card.ops.merge_.default([weight], [], [A], [B], [scale], [1], [])
        check(weight, plain, exact, what=f"{w} {a} {b}")
        if w == "spread":
            weight.zero_(), around[::2, 1::3].zero_()
            assert torch.equal(weight._base, around)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_begin_anywhere(card, dtype):
    """merge_ on a card with rows padded to odd lengths and storage offsets that break the alignment of 16 bytes."""
    for pad, offset in itertools.product((0, 1, 2, 4, 8), (0, 1, 2, 4)):
        def placed(t, pad=pad, offset=offset):
            room = torch.zeros(t.shape[0] * (t.shape[1] + pad) + offset, dtype=t.dtype, device=card.device)
            return room.as_strided(t.shape, (t.shape[1] + pad, 1), offset).copy_(t)

        a, weight = adapter(65, 264, 12, dtype=dtype), placed(torch.randn(65, 264).to(dtype))
        A, B, scale = placed(a.A), placed(a.B), a.scale.to(card.device)
        exact, plain = weight.double() + (B.double() * scale.double()) @ A.double(), weight + (B * scale.to(dtype)) @ A
        card.ops.merge_.default([weight], [], [A], [B], [scale], [1], [])
        check(weight, plain, exact, what=f"{pad} {offset}")


def mixed_layers():
    """Layers of many shapes and dtypes with 0 to 3 clients."""
    shapes = [(0, 5), (7, 0), (5, 3), (64, 256), (130, 64), (1, 1), (129, 257), (17, 300), (700, 513)]
    weights = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, itertools.cycle((*FLOATS, torch.bfloat16)))]
    return weights, [[adapter(*shape, (3, 9, 16)[(n + k) % 3]) for k in range(n % 4 if min(shape) else 0)]
                     for n, shape in enumerate(shapes)]


def test_many_layers_in_one_call(card):
    """Layers of many shapes and dtypes with 0 to 3 clients, some without ranks, in one call of the CUDA merge_."""
    held_to_the_rule(card, *mixed_layers())


def test_the_same_call_gives_the_same_bits(card):
    """That the CUDA merge_ is deterministic, in each of its kernels."""
    for dtype, kept in itertools.product(FLOATS, (False, True)):
        weight = torch.randn(130, 300, device=card.device).to(dtype)
        many, results = [adapter(130, 300, r).to(card.device) for r in PAPER_RANKS[3:]], []
        for _ in range(2):
            results.append([weight.clone(), weight * 2.0**-9])
            merge_(card, results[-1][:1], [many], results[-1][1:] if kept else [])
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_factors_may_be_views_of_the_weight(card):
    """That the CUDA merge_ reads factors that lie in the weight before it writes."""
    weight = torch.randn(600, 600, device=card.device) / 25
    A, B, scale = weight[:3], weight[5:8].T, weight[0, :3]
    delta = (B.double() * scale.double()) @ A.double()
    exact, plain = weight.double() + delta, weight + (B * scale) @ A
    card.ops.merge_.default([weight], [], [A], [B], [scale], [1], [])
    check(weight, plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_elements_far_apart(card, dtype):
    """merge_ and stack_ on a card where offsets in bytes and in elements are beyond 32 bits: rows 2^32 bytes apart."""
    far = torch.empty(2**32 // dtype.itemsize * 2 + 400, dtype=dtype, device=card.device)

    def rows(t, offset):
        return far.as_strided(t.shape, (2**32 // dtype.itemsize, 1), offset).copy_(t)

    a = adapter(3, 128, 3, dtype=dtype).to(card.device)
    weight, A, B = rows(torch.randn(3, 128, dtype=dtype), 0), rows(a.A, 128), rows(a.B, 256)
    exact, plain = weight.double() + (B.double() * a.scale.double()) @ A.double(), weight + (B * a.scale.to(dtype)) @ A
    card.ops.merge_.default([weight], [], [A], [B], [a.scale], [1], [])
    check(weight, plain, exact)
    out = torch.empty(3, 128, dtype=dtype, device=card.device), torch.empty(3, 3, dtype=dtype, device=card.device)
    card.ops.stack_.default(*out, torch.empty_like(a.scale), [A], [B], [a.scale])
    assert torch.equal(out[0], A) and torch.equal(out[1], B)


@pytest.mark.skipif(module is None, reason=f"no CPU operator to compare with: {why}")
@pytest.mark.parametrize("seeded", [False, True], ids=["nearest", "by chance"])
@pytest.mark.parametrize("residual", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_roundings_are_those_of_the_cpu(card, dtype, residual, seeded):
    """Every rounding of the CUDA merge_, bit for bit, on whole numbers (whose sums are exact) of every size."""
    shapes = ((66, 130), (64, 256), (3, 5))
    for (out, inn), unit, layout in itertools.product(shapes, (1.0, 2.0**-19), ("contiguous", "transposed")):
        def whole(*shape, by=8, unit=unit):
            return torch.randint(-by, by + 1, shape).double() * unit

        As, Bs, scales = [whole(3, inn).float()], [whole(out, 3, unit=1).float()], [torch.tensor([1.0, -2.0, 0.5])]
        weight = LAYOUTS[layout](whole(out, inn, by=256).to(dtype))
        rest = [whole(out, inn, by=64, unit=unit / 4).to(residual)] if residual else []
        seeds = [-1234567890123456789] if seeded else []
        moved, moved_rest = LAYOUTS[layout](weight.to(card.device)), [t.to(card.device, copy=True) for t in rest]
        torch.ops.flora_native.merge_.default([weight], rest, As, Bs, scales, [1], seeds)
        on_card = [[t.to(card.device) for t in each] for each in (As, Bs, scales)]
        card.ops.merge_.default([moved], moved_rest, *on_card, [1], seeds)
        assert torch.equal(moved.cpu(), weight)
        assert all(torch.equal(m.cpu(), r) for m, r in zip(moved_rest, rest, strict=True))


@pytest.mark.parametrize(("out", "factor"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_stack_is_cat(card, out, factor):
    """The CUDA stack_, with every pair of dtypes and any strides."""
    cases = ((31, 29, (*PAPER_RANKS, 1, 29)), (64, 4096, (16, 8)), (1, 1, (1,)))
    for (height, width, ranks), layout in itertools.product(cases, LAYOUTS):
        many, total = [adapter(height, width, r, dtype=factor).to(card.device) for r in ranks], sum(ranks)
        many.insert(1, hollow(many[0].B @ many[0].A))
        As, Bs = [LAYOUTS[layout](a.A) for a in many], [LAYOUTS[layout](a.B) for a in many]
        shapes = ((total, width), (height, total))
        got = [LAYOUTS[layout](torch.full(shape, float("nan"), device=card.device, dtype=out)) for shape in shapes]
        scale = torch.full((total,), float("nan"), device=card.device)
        card.ops.stack_.default(*got, scale, As, Bs, [a.scale for a in many])
        assert torch.equal(got[0], torch.cat(As).to(out)) and torch.equal(got[1], torch.cat(Bs, 1).to(out))
        assert torch.equal(scale, torch.cat([a.scale for a in many]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_first_not_finite(card, dtype):
    """The scan of the CUDA first_not_finite: every place, every stride, the largest numbers that are finite."""
    fine = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2, 0.0], dtype=dtype)
    find, fine = card.ops.first_not_finite.default, fine.to(card.device)
    assert find([torch.empty(0, 3, device=card.device)]) == -1
    for shape, bad in itertools.product(((1,), (37, 29), (5003,), (64, 40), (3, 70, 51), (0, 3)), (float("nan"), -float("inf"))):
        tensor = torch.zeros(shape, dtype=dtype, device=card.device)
        views = [tensor, tensor.transpose(0, -1), tensor[::2], tensor[..., ::3], tensor[..., 1:], tensor[None].expand(4, *shape)]
        assert find([fine, *views, fine]) == -1
        for view in (v for v in views if v.numel()):
            for place in (0, -1):
                at = (place,) * view.dim()
                view[at] = bad
                assert find([torch.ones(90, 90, device=card.device), fine, view, fine, tensor]) == 2
                view[at] = 0


def test_what_is_wrong_with_a_factor_is_found(card):
    """The checks of the CUDA checked_merge_, and that it merges where nothing is wrong."""
    check_checked_merge(card.ops.checked_merge_.default, card.device)


@HOST
def test_warps_in_any_order_and_less_shared_memory_give_the_same_bits(on_host, monkeypatch):
    """A barrier that is missing, or a slot that is written while it is read, changes what one warp order leaves and another does
    not; with less shared memory the right factor comes in pieces."""
    card, results = SimpleNamespace(device="cpu", ops=on_host), []
    weights, layers = mixed_layers()
    weights += [torch.randn(200, 257).to(dtype) for dtype in FLOATS]
    layers += [[adapter(200, 257, r) for r in (64, 33, 16)]] * 4
    for settings in ((), ("BACKWARDS",), ("SHARED",), ("BACKWARDS", "SHARED")):
        with monkeypatch.context() as patch:
            for name in settings:
                patch.setenv(f"ON_HOST_{name}", "30000")
            results.append([w.clone() for w in weights])
            merge_(card, results[-1], layers)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@HOST
def test_cards_without_the_matrix_instruction(on_host, monkeypatch):
    """The kernel for cards before sm_80, which takes all dtypes in fp64."""
    monkeypatch.setenv("ON_HOST_MAJOR", "7")
    held_to_the_rule(SimpleNamespace(device="cpu", ops=on_host), *mixed_layers())


@HOST
def test_no_kernel_touches_what_is_not_its_own():
    """Strides, edges and stacks again under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k",
                           "host and (many_layers or (anywhere and bfloat16) or (strides and float32)"
                           " or (finite and float16) or (stack_is_cat and bfloat16-torch.float32))"],
                          env=sanitized(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
