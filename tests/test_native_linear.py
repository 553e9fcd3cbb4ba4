"""The native lora_linear beside the reference: block edges, groups of layers, every dtype, the bits of dropout and of threads."""
import pytest
import torch
from oracles import FLOATS, check, murmur_mask

from flora import kernels, ops
from flora.kernels import reference

native, WHY = kernels._load("native")
pytestmark = pytest.mark.skipif(native is None, reason=f"native is not built ({WHY}): its lora_linear was not tested")

# (M, N, K, rank) around the tiles of 6 or 8 rows and 8 to 48 columns, the chunks of 64 rows and the slices of 64
EDGES = ((7, 47, 16, 8), (9, 49, 17, 9), (31, 95, 33, 16), (32, 97, 48, 17), (63, 24, 31, 47), (65, 193, 63, 48),
         (129, 145, 200, 49), (200, 16, 1601, 5))


class Call:
    """The arguments of one call over layers that read the same x, random in fp64, rounded to a dtype when they are asked for."""

    def __init__(self, M, outs, K, rank, rows=None, ranks=None, frozen=0, dropout=0.0):
        R, L = sum(ranks) if ranks else rank, len(outs)
        self.x, self.dys = torch.randn(M, K), [torch.randn(M, N) for N in outs]
        self.weights, self.biases = [torch.randn(N, K) / K**0.5 for N in outs], [torch.randn(N) for N in outs]
        self.As, self.Bs = [torch.randn(R, K) / K**0.5 for _ in outs], [torch.randn(N, R) for N in outs]
        self.scales = [torch.rand(R) + 0.5 for _ in outs]
        self.frozen = [t for N in outs for t in (torch.randn(frozen, K) / K**0.5, torch.randn(N, frozen), torch.rand(frozen) + 0.5)]
        self.offsets, self.dropout = (None, None, None), dropout
        if ranks:
            ranges = torch.tensor([(k % 3, frozen - k % 2) for k in range(len(ranks))]) if frozen else None
            self.offsets = (*(torch.tensor([0, *torch.tensor(v).cumsum(0).tolist()]) for v in (rows, ranks)), ranges)
        self.widths = [max(ranks) if ranks else R] * L
        self.keys = [torch.randint(1 << 62, (M,)) for _ in outs] if dropout else []

    def run(self, backend, x=torch.float32, weight=None, factor=None):
        """Every y, h, dx, every dA and every dB, from x, weights and factors of these dtypes."""
        def to(tensors, dtype):
            return [t.to(dtype or x) for t in tensors]

        frozen = [t if i % 3 == 2 else t.to(factor or x) for i, t in enumerate(self.frozen)] if self.frozen[0].numel() else []
        shared = (to(self.As, factor), to(self.Bs, factor), self.scales, frozen, *self.offsets, self.widths, self.dropout,
                  self.keys)
        rounded, weights, dys = self.x.to(x), to(self.weights, weight), to(self.dys, x)
        ys, h = backend.lora_linear(rounded, weights, to(self.biases, weight), *shared)
        dx, dAs, dBs = backend.lora_linear_backward(dys, rounded, h, weights, *shared, [True] * (1 + 2 * len(dys)))
        added = dys[0].clone()
        first = (frozen[:3], *self.offsets, self.widths[0], self.dropout, self.keys[0] if self.keys else None)
        kept = backend.lora_add_(added, rounded, shared[0][0], shared[1][0], self.scales[0], *first)
        return [*ys, h, dx, *dAs, *dBs, added, kept]


def compare(call, x=torch.float32, weight=None, factor=None):
    """The error rule for all that a call gives. The exact answer is the reference in fp64, from operands as they were rounded."""
    got = call.run(native, x, weight, factor)
    plain = call.run(reference, x, weight, factor)
    for name, dtype in (("x", x), ("weights", weight), ("biases", weight), ("As", factor), ("Bs", factor), ("dys", x)):
        value = getattr(call, name)
        rounded = [t.to(dtype or x).double() for t in (value if isinstance(value, list) else [value])]
        setattr(call, name, rounded if isinstance(value, list) else rounded[0])
    call.frozen = [t if i % 3 == 2 else t.to(factor or x).double() for i, t in enumerate(call.frozen)]
    for number, (a, p, e) in enumerate(zip(got, plain, call.run(reference, torch.float64), strict=True)):
        check(a, p, e, x, f"result {number}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_shapes_around_the_blocks(shape, dtype):
    M, N, K, rank = shape
    compare(Call(M, [N], K, rank), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_of_layers_of_a_cohort_with_frozen_ranks(dtype, dropout):
    call = Call(131, [65, 20, 49], 97, 0, rows=(40, 0, 3, 1, 60, 27), ranks=(8, 4, 17, 1, 64, 3), frozen=9, dropout=dropout)
    compare(call, dtype)


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_on_processors_with_tiles_for_it_and_without(tiles, monkeypatch):
    """With them torch makes the products with the weights; both ways are tested on every processor."""
    asked = []
    monkeypatch.setattr(native, "_TILES", tiles)
    monkeypatch.setattr(reference, "base_gradient", lambda *a, _run=reference.base_gradient: (asked.append(1), _run(*a))[1])
    for frozen, dropout in ((0, 0.0), (9, 0.3)):
        call = Call(131, [65, 20], 97, 0, rows=(40, 0, 30, 61), ranks=(8, 17, 1, 64), frozen=frozen, dropout=dropout)
        call.run(native, torch.bfloat16)
        assert bool(asked) == tiles
        for one in (call, Call(70, [33, 50], 41, 12, frozen=frozen, dropout=dropout)):
            compare(one, torch.bfloat16)
        asked.clear()


@pytest.mark.parametrize("x", FLOATS, ids=str)
@pytest.mark.parametrize("weight", FLOATS, ids=str)
def test_every_mix_of_dtypes(x, weight):
    for factor in FLOATS:
        compare(Call(41, [50, 33], 37, 5, frozen=3, dropout=0.2), x, weight, factor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype):
    call = Call(700, [192, 100], 150, 0, rows=(300, 17, 383), ranks=(16, 8, 3), frozen=4, dropout=0.1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(call.run(native, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dropout", [0.07, 0.5])
def test_the_mask_is_that_of_the_reference_bit_for_bit(dtype, dropout):
    """x of ones through an identity: h is the mask; and so is dx of a dy through an identity."""
    M, K = 37, 300
    keys = torch.randint(-2**63, 2**63 - 1, (M,))
    one, eye, scale = torch.ones(M, K, dtype=dtype), torch.eye(K, dtype=dtype), torch.ones(K)
    rest = ([], None, None, None)
    h = native.lora_add_(torch.zeros(M, K, dtype=dtype), one, eye, eye, scale, *rest, K, dropout, keys)
    mask = reference.dropout_mask(keys, K, dropout, dtype)
    assert torch.equal(h, mask) and torch.equal(h != 0, murmur_mask(keys.tolist(), K, dropout))
    dx, _, _ = native.lora_linear_backward([one], one, h, [], [eye], [eye], [scale], *rest, [K], dropout, [keys],
                                           [True, False, False])
    assert torch.equal(dx, mask)
    _, dAs, _ = native.lora_linear_backward([eye[:M]], one, h, [], [eye], [eye], [scale], *rest, [K], dropout, [keys],
                                            [False, True, False])
    assert torch.equal(dAs[0][:M], mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gradient_that_is_not_needed_is_not_computed(dtype):
    call = Call(70, [33, 50], 40, 7)
    dys, weights, As, Bs = ([t.to(dtype) for t in v] for v in (call.dys, call.weights, call.As, call.Bs))
    x, rest = call.x.to(dtype), (call.scales, [], None, None, None, [7, 7], 0.0, [])
    _, h = native.lora_linear(x, weights, [None, None], As, Bs, *rest)

    def gradients(x, h, needs):
        dx, dAs, dBs = native.lora_linear_backward(dys, x, h, weights, As, Bs, *rest, needs)
        return [dx, *dAs, *dBs]

    every = gradients(x, h, [True] * 5)
    for number in range(5):
        needs = [n == number for n in range(5)]
        some = gradients(x if number in (1, 2) else None, h if number > 2 else h.new_empty(0), needs)
        for n, (a, b) in enumerate(zip(some, every, strict=True)):
            assert torch.equal(a, b) if n == number else a.numel() == 0


def test_lora_add_writes_only_its_view():
    large = torch.randn(40, 30)
    before, y = large.clone(), large.T[3:28, 5:31]
    x, A, B, scale = torch.randn(25, 19), torch.randn(3, 19), torch.randn(26, 3), torch.rand(3)
    native.lora_add_(y, x, A, B, scale, [], None, None, None, 3, 0.0, None)
    expected = before.clone()
    expected.T[3:28, 5:31] += ((x @ A.T) * scale) @ B.T
    assert torch.allclose(large, expected, atol=1e-5)
    expected.T[3:28, 5:31] = large.T[3:28, 5:31]
    assert torch.equal(large, expected)


def test_a_mistake_is_refused_with_what_was_expected():
    x, w, A, B, s = torch.ones(4, 3), torch.ones(5, 3), torch.ones(2, 3), torch.ones(5, 2), torch.ones(2)
    none = ([], None, None, None)
    for arguments, said in (((x, [w], [None], [A.T], [B], [s], *none, [2], 0.0, []), r"A \(R, 3\)"),
                            ((x, [w.T], [None], [A], [B], [s], *none, [2], 0.0, []), r"shape \(5, 3\)"),
                            ((x, [w], [None], [A], [B], [s], *none, [1], 0.0, []), "width of at least 2"),
                            ((x, [w], [None], [A], [B], [s], [], torch.tensor([0, 3]), torch.tensor([0, 2]), None, [2], 0.0, []),
                             "row_offsets that rise from 0 to the 4 rows"),
                            ((x, [w], [None], [A], [B], [s.double()], *none, [2], 0.0, []), "float32 scale")):
        with pytest.raises(RuntimeError, match=said):
            native.lora_linear(*arguments)


def test_the_operator_runs_on_it():
    eye = torch.eye(40)
    with kernels.use("native"):
        assert torch.equal(ops.lora_linear(eye, eye, eye, eye, torch.ones(40)), 2 * eye)
