"""Every backend, every form of it, every gradient: the error rule on shapes off every block size, for every kind of call."""
import contextlib
import itertools

import oracles
import pytest
import torch
from oracles import Case, check, check_case, output_and_gradients

from flora import kernels, ops
from flora.errors import BackendError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMS = ("triton addmm", "triton skinny", "triton fused", "triton both")
# Where there is a GPU, the Triton kernels run there, compiled, and are among what `-m gpu` asks for; else under the interpreter.
GPU = torch.cuda.is_available()
BOTH = pytest.param("triton both", marks=[pytest.mark.gpu] * GPU)
ADDMM = pytest.param("triton addmm", marks=[pytest.mark.gpu] * GPU)
ONE_OF_EACH = ("reference", "native", BOTH)
pytestmark = [pytest.mark.usefixtures("compiled")] * GPU
MIXED = {"ranks": (1, 3, 8, 40, 64), "rows": (21, 0, 1, 40, 9)}
RANGES = [(0, 9), (3, 9), (3, 9), (4, 4), (0, 2)]
KINDS = {
    **{f"rank {r}": ((65, 67, 71, [r]), {"bias": r % 2 == 0}) for r in oracles.RANKS},
    "one of everything": ((1, 1, 1, [1]), {}), "primes": ((7, 13, 11, [3]), {}), "rank is in": ((33, 70, 48, [48]), {}),
    "rank is out": ((33, 40, 72, [40]), {}), "rank over both": ((9, 20, 24, [40]), {}), "many ranks": ((18, 35, 33, [100]), {}),
    "K in parts": ((20, 17, 1100, [5]), {}), "rows in chunks": ((1100, 19, 21, [6]), {}),
    "clients": ((71, 67, 35, MIXED["ranks"]), {"rows": MIXED["rows"], "bias": True}),
    "one client": ((40, 31, 29, [5]), {"rows": (40,)}),
    "many clients": ((17, 33, 35, [1 + k % 4 for k in range(17)]), {"rows": (1,) * 17}),
    "clients in chunks": ((1110, 19, 21, (4, 20)), {"rows": (1100, 10)}),
    "dropout": ((65, 33, 70, [8]), {"dropout": 0.3}), "frozen": ((33, 71, 67, [8]), {"frozen": 5, "bias": True}),
    "frozen range": ((33, 31, 29, [8]), {"frozen": 9, "ranges": [(2, 7)]}),
    "clients, dropout": ((71, 33, 35, MIXED["ranks"]), {"rows": MIXED["rows"], "dropout": 0.4}),
    "clients, frozen for all": ((71, 33, 35, MIXED["ranks"]), {"rows": MIXED["rows"], "frozen": 6}),
    "everything": ((71, 67, 35, MIXED["ranks"]), {"rows": MIXED["rows"], "frozen": 9, "ranges": RANGES, "dropout": 0.2,
                                                  "bias": True}),
}
LARGE = {"q_proj": ((4096, 4096, 4096, [16]), {}), "down": ((2048, 4096, 11008, [64]), {}),
         "large clients": ((8192, 4096, 4096, oracles.PAPER_RANKS), {"rows": (819,) * 9 + (821,)}),
         "large dropout": ((4096, 4096, 4096, [16]), {"dropout": 0.1}),
         "fp32 factors": ((4096, 4096, 4096, [16]), {"factor": FP32}),
         "clients, fp32 factors": ((5120, 11008, 4096, [16] * 10), {"rows": (512,) * 10, "factor": FP32}),
         "stack of 1024": ((2048, 2048, 2048, [1024]), {})}
FEW = ("rank 40", "clients", "everything")


@contextlib.contextmanager
def backend(name):
    """Forces a backend, and a form of the triton one."""
    kind, _, form = name.partition(" ")
    module, why = kernels._load(kind)
    if module is None:
        pytest.skip(f"{kind} cannot run here ({why}): its numbers were not tested")
    if not torch.cuda.is_available() and kind == "triton" and not module.WHEN_FORCED:
        pytest.skip("no GPU and TRITON_INTERPRET is not 1: the Triton kernels were not tested")
    with kernels.use(kind), contextlib.ExitStack() as stack:
        if kind == "triton":
            from flora.kernels.triton import rule
            index = FORMS.index(name) if form else 3
            stack.enter_context(rule.use(rule.FORMS[index]))
        yield


def place(name):
    """The device of a backend's tensors."""
    return "cuda" if GPU and name.startswith("triton") else "cpu"


def make(kind, name="", **options):
    shape, given = {**KINDS, **LARGE}[kind]
    return Case(*shape, **{**given, "device": place(name), **options})


def linear(case, **changes):
    return lambda x, A, B: ops.lora_linear(x, case.weight, A, B, case.scale, **{**case.keywords(), **changes})


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(("reference", "native"), KINDS),
                                            *(itertools.product(FORMS[3:], KINDS) if not GPU else ()),
                                            *(itertools.product(FORMS[:3], FEW) if not GPU else ())])
def test_every_kind_of_call_in_fp32(name, kind):
    """On a GPU: test_on_a_gpu."""
    case = make(kind)
    with backend(name):
        check_case(case, linear(case))


@pytest.mark.parametrize("mix", [(FP16, FP16, FP16), (FP16, FP16, FP32), (BF16, BF16, BF16), (BF16, BF16, FP32), (FP32, BF16, FP32),
                                 (BF16, FP32, FP16)], ids=str)
@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dtypes(name, kind, mix):
    """x, weight, factors. Under the interpreter bfloat16 products are made of widened tiles: a GPU's own are not tested here."""
    x, weight, factor = mix
    case = make(kind, name, x=x, weight=weight, factor=factor)
    with backend(name):
        check_case(case, linear(case))


class Group:
    """Layers of several widths that read the same x, with an exact answer and a plain one from the layers' own."""

    def __init__(self, kind, outs, x=FP32, **options):
        (M, _, K, ranks), given = KINDS[kind]
        self.cases = [Case(M, N, K, ranks if "rows" in given else [ranks[0] + k], x=x, **{**given, **options})
                      for k, N in enumerate(outs)]
        for case in self.cases[1:]:
            case.x = self.cases[0].x

    @property
    def operands(self):
        return (self.cases[0].x, *(case.A for case in self.cases), *(case.B for case in self.cases))

    def through(self, name):
        """The layers' own function of that name, as one of all operands, outputs side by side."""
        L = len(self.cases)
        return lambda x, *factors: torch.cat([getattr(case, name)(x, factors[k], factors[L + k])
                                              for k, case in enumerate(self.cases)], dim=1)

    def flora(self, x, *factors):
        L, first = len(self.cases), self.cases[0].keywords()
        frozen = [case.keywords()["frozen"] for case in self.cases]
        ys = ops.lora_linears(x, [c.weight for c in self.cases], factors[:L], factors[L:], [c.scale for c in self.cases],
                              [c.bias for c in self.cases], row_offsets=first["row_offsets"], rank_offsets=first["rank_offsets"],
                              frozen=frozen if frozen[0] else None, dropout=first["dropout"], seeds=[c.keys for c in self.cases])
        return torch.cat(ys, dim=1)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("kind", ["rank 8", "clients", "dropout", "everything"])
@pytest.mark.parametrize("name", ["reference", "native", ADDMM, BOTH])
def test_layers_that_read_the_same_x(name, kind, dtype):
    group = Group(kind, (31, 7, 40), x=dtype, device=place(name))
    dy = torch.randn(len(group.cases[0].x), 78).to(place(name), dtype)
    with backend(name):
        actual = output_and_gradients(group.flora, group.operands, dy)
    plain = output_and_gradients(group.through("plain"), group.operands, dy)
    exact = output_and_gradients(group.through("exact"), [t.double() for t in group.operands], dy.double())
    for what, a, p, e in zip(("y", "dx", *"AAABBB"), actual, plain, exact, strict=True):
        check(a, p, e, dtype, what)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["rank 8", "everything"])
@pytest.mark.parametrize("layout", ["rows", "three axes", "transposed"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_lora_add_on_top_of_any_base_product(name, layout, kind, dtype):
    case = make(kind, name, x=dtype, bias=True)
    keywords = {key: value for key, value in case.keywords().items() if key != "bias"}

    def add(x, A, B):
        y = torch.nn.functional.linear(x, case.weight, case.bias)
        if layout == "three axes":
            y, x = y.reshape(-1, len(y) if len(y) % 5 else 5, y.shape[1]), x.reshape(-1, len(y) if len(y) % 5 else 5, x.shape[1])
        elif layout == "transposed":
            y = y.T.contiguous().T
        given, version = y, y._version
        y = ops.lora_add_(y, x, A, B, case.scale, **keywords)
        assert y is given and y._version > version
        return y.reshape(-1, y.shape[-1])

    with backend(name):
        check_case(case, add)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_only_the_gradients_asked_for(name):
    for kind in ("rank 3", "everything"):
        case = make(kind, name)
        with backend(name):
            whole = output_and_gradients(linear(case), case.operands, case.dy)[1:]
            for wanted in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1)):
                leaves = [t.clone().requires_grad_(bool(w)) for t, w in zip(case.operands, wanted, strict=True)]
                linear(case)(*leaves).backward(case.dy)
                for leaf, grad, w in zip(leaves, whole, wanted, strict=True):
                    assert oracles.relative(leaf.grad, grad) < 1e-6 if w else leaf.grad is None


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_nan_stays_with_its_client_and_calls_repeat(name):
    """The clients share tiles of every block size."""
    case = make("everything", name)
    with backend(name):
        clean = output_and_gradients(linear(case), case.operands, case.dy)
        again = output_and_gradients(linear(case), case.operands, case.dy)
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
        _, rows, ranks = case.segments()[3]
        x, A, B = (t.clone() for t in case.operands)
        x[rows], A[ranks], B[:, ranks] = float("nan"), float("inf"), float("nan")
        dirty = output_and_gradients(linear(case), (x, A, B), case.dy)
    for kind, (good, bad) in enumerate(zip(clean, dirty, strict=True)):
        good, bad = (good.T, bad.T) if kind == 3 else (good, bad)
        other = torch.ones(len(good), dtype=torch.bool, device=good.device)
        other[(rows, rows, ranks, ranks)[kind]] = False
        assert torch.equal(good[other], bad[other])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_any_strides_and_no_rows(name):
    def spread(t):
        large = torch.full((2 * t.shape[0], 2 * t.shape[1]), float("nan"), device=t.device)
        large[::2, 1::2] = t
        return large[::2, 1::2]

    with backend(name):
        for kind in FEW:
            case = make(kind, name)
            for field in ("x", "weight", "A", "B", "dy"):
                setattr(case, field, spread(getattr(case, field)))
            check_case(case, linear(case))
        case = Case(0, 5, 7, [3, 2], rows=(0, 0), frozen=2, bias=True, dropout=0.5, device=place(name))
        y, dx, dA, dB = output_and_gradients(linear(case), case.operands, case.dy)
        assert y.shape == (0, 5) and dx.shape == (0, 7) and not dA.any() and not dB.any()


def test_a_forced_backend_refuses_what_it_cannot_compute():
    case = Case(4, 3, 5, [2], x=torch.float64, device=place("triton"))
    with backend("triton"), pytest.raises(BackendError, match="'triton', which cannot: triton: no float64 kernels"):
        linear(case)(*case.operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *LARGE])
@pytest.mark.parametrize("name", FORMS)
def test_on_a_gpu(name, kind, dtype):
    """The Triton kernels compiled, in bfloat16 with its own products, on large shapes, every form."""
    case = make(kind, name, x=dtype)
    with backend(name):
        check_case(case, linear(case))
