"""What the tests of the numbers share: dense fp64 oracles, THE error rule, shapes and ranks, and models made in memory."""
import torch
from torch import Tensor

from flora.adapter import Adapter, Adapters
from flora.kernels import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PAPER_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
dry = False                                              # True: results are not looked at (conftest.compiled)
# (M, N, K): one of everything, primes, and sizes just off the blocks of every kernel
SHAPES = ((1, 1, 1), (7, 13, 11), (65, 127, 129), (33, 64, 48))
RANKS = (1, 3, 8, 40, 64)


def bound(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """2 · error(plain PyTorch, same dtype) + (1e-7 + 2 · eps(dtype) / √numel) · ‖exact‖: the one error rule."""
    eps = torch.finfo(dtype).eps
    error = (plain.double() - exact).norm()
    return float(2 * error + (1e-7 + 2 * eps / max(1, exact.numel()) ** 0.5) * exact.norm())


def check(actual: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None, what: str = "") -> None:
    """Asserts the error rule. exact: fp64, dense; plain: what plain PyTorch gives; dtype: of the products (actual's)."""
    if dry:
        return
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}"
    error, allowed = float((actual.double() - exact).norm()), bound(plain, exact, dtype or actual.dtype)
    assert error <= allowed, f"{what}: error {error:.3e} over the bound {allowed:.3e}, of a norm {float(exact.norm()):.3e}"


def check_adapters(actual: Adapters, plain: Adapters, exact: Adapters, what: str = "") -> None:
    """Asserts the error rule of the ΔW of all layers together, for adapters that were trained in fp32; exact: what was trained in
    fp64."""
    assert list(actual) == list(plain) == list(exact), f"{what}: other layers"
    one, other, true = (torch.cat([a.delta().flatten() for a in some.values()]) for some in (actual, plain, exact))
    check(one, other, true, torch.float32, what)


def relative(actual: Tensor, exact: Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖ in fp64."""
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def adapter(out: int, inn: int, rank: int, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> Adapter:
    """A random adapter with alpha / rank as its scale (alpha = 2 rank where none is given)."""
    A, B = torch.randn(rank, inn, dtype=torch.float64) / inn**0.5, torch.randn(out, rank, dtype=torch.float64)
    return Adapter(A.to(dtype), B.to(dtype), (2 * rank if alpha is None else alpha) / rank)


def ranks_of(client: int, ranges, ranks: int) -> slice:
    """The frozen ranks that a client's rows see."""
    return slice(0, ranks) if ranges is None else slice(*ranges[client])


class Case:
    """One call of lora_linear with everything random: operands, an exact answer and a plain one for it and its gradients."""

    def __init__(self, M, N, K, ranks, *, rows=None, x=torch.float32, weight=None, factor=None, bias=False, frozen=None,
                 ranges=None, dropout=0.0, device="cpu"):
        R, new = sum(ranks), {"dtype": torch.float64, "device": device}
        self.dtype, self.dropout, self.ranges = x, dropout, ranges
        self.x = torch.randn(M, K, **new).to(x)
        self.weight = (torch.randn(N, K, **new) / K**0.5).to(weight or x)
        self.A = (torch.randn(R, K, **new) / K**0.5).to(factor or x)
        self.B = torch.randn(N, R, **new).to(factor or x)
        self.scale = torch.rand(R, device=device) + 0.5
        self.bias = torch.randn(N, **new).to(weight or x) if bias else None
        self.dy = torch.randn(M, N, **new).to(x)
        held = adapter(N, K, frozen or 1, dtype=factor or x)
        self.frozen = Adapter(held.A, held.B, torch.rand(frozen) + 0.5).to(device) if frozen else None
        self.keys = torch.randint(1 << 62, (M,), device=device) if dropout else None
        self.rank_offsets = [sum(ranks[:k]) for k in range(len(ranks) + 1)] if rows is not None else None
        self.row_offsets = [sum(rows[:k]) for k in range(len(rows) + 1)] if rows is not None else None

    def to(self, device):
        """The same case elsewhere."""
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Adapter)):
                setattr(self, name, value.to(device))
        return self

    @property
    def operands(self):
        """What gets a gradient."""
        return self.x, self.A, self.B

    def keywords(self):
        """The keyword arguments of ops.lora_linear."""
        from flora.ops import Frozen

        frozen = self.frozen and Frozen(self.frozen.A, self.frozen.B, self.frozen.scale, self.ranges)
        return {"bias": self.bias, "row_offsets": self.row_offsets, "rank_offsets": self.rank_offsets, "frozen": frozen,
                "dropout": self.dropout, "seed": self.keys}

    def segments(self):
        """(client, its rows, its ranks) of every client."""
        M, R = len(self.x), len(self.A)
        if self.row_offsets is None:
            return [(0, slice(0, M), slice(0, R))]
        pairs = zip(self.row_offsets, self.row_offsets[1:], self.rank_offsets, self.rank_offsets[1:], strict=False)
        return [(k, slice(a, b), slice(c, d)) for k, (a, b, c, d) in enumerate(pairs)]

    def mask(self, dtype):
        """What dropout multiplies x with."""
        if not self.dropout:
            return torch.ones_like(self.x, dtype=dtype)
        return reference.dropout_mask(self.keys, self.x.shape[1], self.dropout, torch.float64).to(dtype)

    def exact(self, x, A, B):
        """Σ over clients of x_k (W + ΔW_frozen)ᵀ + (mask · x_k) ΔW_kᵀ, every ΔW dense, in fp64."""
        weight, mask, parts = self.weight.double(), self.mask(torch.float64), []
        for k, rows, ranks in self.segments():
            seen = weight
            if self.frozen is not None:
                some = ranks_of(k, self.ranges, self.frozen.rank)
                f = self.frozen
                seen = weight + (f.B[:, some].double() * f.scale[some].double()) @ f.A[some].double()
            delta = (B[:, ranks] * self.scale[ranks].double()) @ A[ranks]
            parts.append(x[rows] @ seen.T + (mask[rows] * x[rows]) @ delta.T)
        y = torch.cat(parts)
        return y if self.bias is None else y + self.bias.double()

    def plain(self, x, A, B):
        """What one writes without flora: every client's rows through F.linear and two products, in x's dtype."""
        mask, parts = self.mask(self.dtype), []
        for k, rows, ranks in self.segments():
            bias = None if self.bias is None else self.bias.to(self.dtype)
            y = torch.nn.functional.linear(x[rows], self.weight.to(self.dtype), bias)
            h = (((mask[rows] * x[rows]) @ A[ranks].to(self.dtype).T) * self.scale[ranks]).to(self.dtype)
            y = y + h @ B[:, ranks].to(self.dtype).T
            if self.frozen is not None:
                some, f = ranks_of(k, self.ranges, self.frozen.rank), self.frozen.to(self.dtype)
                y = y + ((x[rows] @ f.A[some].T) * f.scale[some]).to(self.dtype) @ f.B[:, some].T
            parts.append(y)
        return torch.cat(parts)


def output_and_gradients(function, operands, dy):
    """function(*operands) and its gradients for dy, from fresh leaves that keep the operands' strides."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = function(*leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check_case(case: Case, function, plain=None, dtype: torch.dtype | None = None) -> None:
    """The error rule for the output of function(x, A, B) and for the gradient of each of the three."""
    dy = case.dy.to(dtype or case.dtype)
    actual = output_and_gradients(function, case.operands, dy)
    if dry:
        return
    compared = output_and_gradients(plain or case.plain, case.operands, dy)
    exact = output_and_gradients(case.exact, [t.double() for t in case.operands], case.dy.double())
    for what, a, p, e in zip(("y", "dx", "dA", "dB"), actual, compared, exact, strict=True):
        check(a, p, e, dtype or case.dtype, what)


def murmur_mask(keys: list[int], columns: int, dropout: float) -> Tensor:
    """The dropout mask from the definition, in Python's integers: True where an element is kept."""
    def mix(z):
        z = (z ^ z >> 16) * 0x85EBCA6B % 2**32
        z = (z ^ z >> 13) * 0xC2B2AE35 % 2**32
        return z ^ z >> 16

    rows = []
    for key in keys:
        low, high = key % 2**32, (key >> 32) % 2**32
        rows.append([mix(mix(c * 0x9E3779B1 % 2**32 ^ low) ^ high) >> 8 >= round(dropout * 2**24) for c in range(columns)])
    return torch.tensor(rows)


def llama(dtype: torch.dtype = torch.float32, **changes):
    """A Llama of two blocks with tied embeddings, random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32):
    """A GPT-2 of two blocks (Conv1D, weights transposed), random weights, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).to(dtype).eval()


def tokens() -> Tensor:
    """Two rows of ids for either model, the same ones always."""
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))


def randomise(model, dtype: torch.dtype | None = None) -> dict[str, Adapter]:
    """Fills the attached adapters with random numbers, B included, and returns them."""
    import flora

    drawn = {}
    for name, a in flora.adapters(model).items():
        B = torch.randn(a.B.shape) / a.rank
        drawn[name] = Adapter(torch.randn(a.A.shape) / a.A.shape[1] ** 0.5, B, a.scale).to(dtype or a.A.dtype)
    flora.load_adapters(model, drawn)
    return drawn


def check_checked_merge(op, device: str) -> None:
    """checked_merge_ names the first thing that is wrong with a factor, and writes only where nothing is."""
    shapes, counts = ((5, 7), (6, 4)), (2, 1)
    weights = [torch.ones(s, device=device) for s in shapes]
    good = [adapter(*shapes[layer], 3).to(device) for layer, count in enumerate(counts) for _ in range(count)]
    lists = {name: [getattr(a, name) for a in good] for name in ("A", "B", "scale")}

    def said(write=True, residuals=(), **changed):
        factors = [[changed.get(f"{name}{k}", t) for k, t in enumerate(lists[name])] for name in ("A", "B", "scale")]
        before = [w.clone() for w in weights]
        found = tuple(op(weights, list(residuals), *factors, list(counts), [], write))
        moved = any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        assert moved == (write and found == (0, 0)), found
        return found

    new = {"device": device}
    misfits = {"A1": torch.ones(3, 6, **new), "B1": torch.ones(5, 2, **new), "scale1": torch.ones(4, **new),
               "A2": torch.ones(3, 4, dtype=torch.int32, **new), "B0": torch.ones(5, 3, 1, **new),
               "scale0": torch.tensor(1.0, **new)}
    assert all(said(**{name: wrong}) == (1, int(name[-1])) for name, wrong in misfits.items())
    nan = [torch.full_like(lists[name][k], float("nan")) for name, k in (("A", 2), ("B", 0), ("scale", 1))]
    assert [said(A2=nan[0]), said(B0=nan[1]), said(scale1=nan[2])] == [(2, 2), (2, 3), (2, 7)]
    assert said(A0=misfits["A1"], B2=nan[1]) == (1, 0)                              # what does not fit is said first
    wide = torch.ones(9, 4, **new)
    weights[1] = wide[:6]
    assert said(A2=wide[5:8]) == (3, 0) and said(residuals=[torch.zeros(5, 7, **new), wide[3:]], A2=wide[:3]) == (3, 0)
    assert said(A2=wide[6:9]) == (0, 0) and said(write=False) == (0, 0) and said() == (0, 0)
