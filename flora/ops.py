"""The operators as users call them: schemas, fake kernels, autograd, and the checks of what comes in.

Every operator is defined once in the library `flora` (torch.library), so `torch.compile` sees it whole; inside, the device
picks a backend (flora.kernels). The autograd.Function stands outside the operator; its forward keeps `h` for the backward.
"""
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from operator import index
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora import kernels
from flora.errors import AdapterError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_LIB = torch.library.Library("flora", "DEF")
_SEGMENTS = "Tensor[] frozen, Tensor? row_offsets, Tensor? rank_offsets, Tensor? frozen_ranges"
_LIB.define(f"lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor scale, {_SEGMENTS}, "
            "SymInt width, float dropout, Tensor? keys) -> (Tensor, Tensor)")
_LIB.define("lora_linear_backward(Tensor dy, Tensor? x, Tensor h, Tensor weight, Tensor A, Tensor B, Tensor scale, "
            f"{_SEGMENTS}, float dropout, Tensor? keys, bool[] needs) -> (Tensor, Tensor, Tensor)")
_LIB.define("merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor scale) -> ()")
_LIB.define("stack_(Tensor(a!) out_A, Tensor(b!) out_B, Tensor(c!) out_scale, Tensor[] As, Tensor[] Bs, "
            "Tensor[] scales) -> ()")


def _implement(op: str, written: int = 0) -> None:
    """Registers the operator's body: the backend of the first argument's device, autocast off, versions of what is
    written in place (the first `written` arguments) bumped."""
    def body(*args):
        device = args[0].device
        casts = torch.is_autocast_enabled(device.type)          # asking costs less than entering the block
        with torch.autocast(device.type, enabled=False) if casts else nullcontext():
            result = kernels.resolve(op, device)(*args)
        if written:
            torch.autograd.graph.increment_version(args[:written])
        return result
    _LIB.impl(op, body, "CompositeExplicitAutograd")


for _op, _written in (("lora_linear", 0), ("lora_linear_backward", 0), ("merge_", 1), ("stack_", 3)):
    _implement(_op, _written)


@torch.library.register_fake("flora::lora_linear", lib=_LIB)
def _(x, weight, bias, A, B, scale, frozen, row_offsets, rank_offsets, frozen_ranges, width, dropout, keys):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], width)


@torch.library.register_fake("flora::lora_linear_backward", lib=_LIB)
def _(dy, x, h, weight, A, B, scale, frozen, row_offsets, rank_offsets, frozen_ranges, dropout, keys, needs):
    return (dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else dy.new_empty(0),
            A.new_empty(A.shape) if needs[1] else A.new_empty(0), B.new_empty(B.shape) if needs[2] else B.new_empty(0))


for _in_place in ("merge_", "stack_"):
    torch.library.register_fake(f"flora::{_in_place}", lambda *args: None, lib=_LIB)


class HasRanks(Protocol):
    """Anything with the three tensors of an adapter."""
    A: Tensor
    B: Tensor
    scale: Tensor


class Frozen:
    """Ranks that do not train, shared by the clients of a call; validated once.

    A (F, in), B (out, F), scale (F,); ranges: for each client (start, stop) in those buffers, which may overlap; None:
    every row uses all of them. Raises AdapterError for a range outside the buffers.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: Tensor, ranges: Sequence[Sequence[int]] | Tensor | None = None):
        self.A, self.B, self.scale, self.ranges = A.detach(), B.detach(), scale.detach(), None
        if ranges is not None:
            listed = ranges.tolist() if isinstance(ranges, Tensor) else [tuple(pair) for pair in ranges]
            good = all(len(pair) == 2 and 0 <= pair[0] <= pair[1] <= A.shape[0] for pair in listed)
            _check("frozen ranges", good, f"a pair 0 <= start <= stop <= {A.shape[0]} for each client", listed)
            self.ranges = torch.tensor(listed, dtype=torch.int64).reshape(-1, 2)


def _offsets(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """The offsets as an int64 tensor on the host, checked: K + 1 of them, first 0, never falling."""
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise AdapterError(f"{name}: expected ints on the host (a sequence or a CPU tensor); got a tensor on "
                           f"{values.device}. Keep offsets on the host: reading them there costs no synchronisation.")
    try:
        listed = [index(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError:
        listed = []
    _check(name, bool(listed) and listed[0] == 0 and all(a <= b for a, b in pairwise(listed)),
           "K + 1 ints that start at 0 and never fall", values)
    return torch.tensor(listed, dtype=torch.int64)


class Segments:
    """Which rows and which ranks belong to which client, validated once and reused for every call of a cohort.

    row_offsets, rank_offsets: K + 1 ints on the host, first 0, last the number of rows or ranks. A client may have no rows.
    Raises AdapterError for offsets that fall, do not start at 0, or differ in number.
    """

    def __init__(self, row_offsets: Sequence[int] | Tensor, rank_offsets: Sequence[int] | Tensor):
        self.row_offsets, self.rank_offsets = _offsets("row_offsets", row_offsets), _offsets("rank_offsets", rank_offsets)
        if len(self.row_offsets) != len(self.rank_offsets):
            raise AdapterError(f"expected as many row_offsets as rank_offsets (clients + 1); got {len(self.row_offsets)} "
                               f"and {len(self.rank_offsets)}")
        self.num_clients = len(self.row_offsets) - 1
        rows, ranks = self.row_offsets.tolist(), self.rank_offsets.tolist()
        self.num_rows, self.num_ranks = rows[-1], ranks[-1]
        self.max_rank = max((b - a for a, b in pairwise(ranks)), default=0)


def row_keys(*parts: int | Tensor) -> Tensor:
    """Mixes ints and int64 tensors (broadcast together) into keys for dropout: (client, step, sequence, position).

    Returns int64 of the broadcast shape. Each part goes through SplitMix64's finaliser: neighbours' keys are unrelated.
    """
    def mix(z: Tensor) -> Tensor:
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        number = part if isinstance(part, Tensor) else (part + (1 << 63)) % (1 << 64) - (1 << 63)       # as int64
        state = mix(state + number - 0x61C8864680B583EB)
    return state


def _check(what: str, good: bool, expected: str, got: object) -> None:
    if not good:
        raise AdapterError(f"{what}: expected {expected}; got {got}")


def _check_ranks(what: str, ranks: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int], device: torch.device) -> None:
    """A (R, in), B (out, R), scale (R,) for a weight of this shape (out, in), floating point, on this device."""
    (A, B, scale), (N, K) = ranks, shape                        # messages are composed only where one is needed
    if (A.dim() == 2 and A.shape[1] == K and B.shape == (N, A.shape[0]) and scale.shape == (A.shape[0],)
            and all(tensor.dtype in FLOATS and tensor.device == device for tensor in ranks)):
        return
    _check(f"{what} A", A.dim() == 2 and A.shape[1] == K, f"(rank, {K}), the weight being ({N}, {K})", tuple(A.shape))
    R = A.shape[0]
    _check(f"{what} B", B.dim() == 2 and tuple(B.shape) == (N, R), f"({N}, {R})", tuple(B.shape))
    _check(f"{what} scale", tuple(scale.shape) == (R,), f"a vector ({R},), one number a rank", tuple(scale.shape))
    for name, tensor in (("A", A), ("B", B), ("scale", scale)):
        _check_dtype(f"{what} {name}", tensor)
        _check(f"{what} {name}", tensor.device == device, f"a tensor on {device}", tensor.device)


def _check_dtype(what: str, tensor: Tensor) -> None:
    _check(what, tensor.dtype in FLOATS, "float32, float64, float16 or bfloat16", tensor.dtype)


def _check_weight(weight: Tensor) -> None:
    _check_dtype("weight", weight)
    _check("weight", weight.dim() == 2, "a matrix (out, in)", tuple(weight.shape))


def _check_writable(what: str, tensor: Tensor) -> None:
    owned = all(size < 2 or stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    _check(what, owned, "a tensor that owns each of its elements (clone it first)", f"strides {tensor.stride()}, expanded")


def _frozen_operand(frozen: HasRanks | Sequence | None, weight: Tensor,
                    segments: Segments | None) -> tuple[list[Tensor], Tensor | None]:
    """The frozen ranks as a list of tensors (empty: none) and their ranges (None: all rows use all)."""
    if frozen is None:
        return [], None
    if not isinstance(frozen, Frozen):
        given = (frozen.A, frozen.B, frozen.scale) if hasattr(frozen, "A") else frozen
        _check("frozen", isinstance(given, Sequence) and len(given) in (3, 4), "a Frozen, an Adapter or (A, B, scale)", type(given))
        frozen = Frozen(*given)
    _check_ranks("frozen", (frozen.A, frozen.B, frozen.scale), tuple(weight.shape), weight.device)
    if frozen.ranges is not None:
        clients = segments.num_clients if segments else 1
        _check("frozen ranges", frozen.ranges.shape[0] == clients, f"{clients} pairs, one a client", frozen.ranges.shape[0])
    return [frozen.A, frozen.B, frozen.scale.float()], frozen.ranges


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, weight, bias, scale, frozen, segments, dropout, keys):
        y, h = torch.ops.flora.lora_linear(x, weight, bias, A, B, scale, frozen, *segments, dropout, keys)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, h if ctx.needs_input_grad[2] else h.new_empty(0), A, B,
                              weight, scale, keys, *segments[:3], *frozen)
        ctx.dropout = dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, A, B, weight, scale, keys, row_offsets, rank_offsets, ranges, *frozen = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        dx, dA, dB = torch.ops.flora.lora_linear_backward(
            dy.contiguous(), x, h, weight, A, B, scale, frozen, row_offsets, rank_offsets, ranges, ctx.dropout, keys, needs)
        grads = [grad if need else None for grad, need in zip((dx, dA, dB), needs, strict=True)]
        return *grads, None, None, None, None, None, None, None


def lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor | None = None, *,
                row_offsets: Sequence[int] | Tensor | Segments | None = None,
                rank_offsets: Sequence[int] | Tensor | None = None, frozen: HasRanks | Sequence | None = None,
                dropout: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias + ((dropout(x) Aᵀ) · scale) Bᵀ, without ΔW; K clients of different ranks in one call.

    x (..., in); weight (out, in), frozen; A (R, in), B (out, R), any float dtypes, cast to x's for the products, their
    gradients in their own dtype; scale fp32 (R,), bias (out,): no gradient, as none for weight. Returns (..., out) in x's dtype
    (autocast's, where it is on).

    row_offsets, rank_offsets: K + 1 ints on the host, or one Segments as row_offsets: rows row_offsets[k]:row_offsets[k + 1]
    of x flattened to (M, in) use ranks rank_offsets[k]:rank_offsets[k + 1]. Without them every row uses all R ranks.
    frozen: an Adapter or Frozen: ranks that add to the output without dropout and get no gradient.
    dropout: on the input of A alone, keyed per row: seed is an int, or int64 (M,) keys (see row_keys); None draws one.
    Raises AdapterError for shapes, dtypes, devices or offsets that do not fit. Differentiable once.
    """
    _check_weight(weight)
    _check("x", x.dim() >= 1 and x.shape[-1] == weight.shape[1], f"(..., {weight.shape[1]})", tuple(x.shape))
    _check_dtype("x", x)
    _check("x", x.device == weight.device, f"a tensor on {weight.device}, where weight is", x.device)
    _check_ranks("adapter", (A, B, scale), tuple(weight.shape), weight.device)
    _check("bias", bias is None or tuple(bias.shape) == (weight.shape[0],), f"({weight.shape[0]},)",
           bias is not None and tuple(bias.shape))
    _check("dropout", 0.0 <= dropout < 1.0, "a probability in [0, 1)", dropout)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = x.reshape(-1, x.shape[-1])
    segments = row_offsets if isinstance(row_offsets, Segments) else None
    if segments is not None:
        _check("rank_offsets", rank_offsets is None, "none beside Segments, which hold them", rank_offsets)
    elif row_offsets is not None or rank_offsets is not None:
        _check("offsets", row_offsets is not None and rank_offsets is not None, "row_offsets and rank_offsets, or neither",
               "one of the two")
        segments = Segments(row_offsets, rank_offsets)
    if segments is not None:
        _check("row_offsets", segments.num_rows == flat.shape[0], f"{flat.shape[0]} as the last (rows of x)", segments.num_rows)
        _check("rank_offsets", segments.num_ranks == A.shape[0], f"{A.shape[0]} as the last (ranks of A)", segments.num_ranks)
    frozen_tensors, ranges = _frozen_operand(frozen, weight, segments)
    offsets = (segments.row_offsets, segments.rank_offsets) if segments else (None, None)
    packed = (*offsets, ranges, segments.max_rank if segments else A.shape[0])
    y = _LoRALinear.apply(flat, A, B, weight.detach(), None if bias is None else bias.detach(), scale.detach().float(),
                          frozen_tensors, packed, float(dropout), _keys(seed, flat) if dropout > 0 else None)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _keys(seed: int | Tensor | None, x: Tensor) -> Tensor:
    """int64 (M,) keys of the rows: given, or derived from a seed and the row's number."""
    rows = x.shape[0]
    if isinstance(seed, Tensor) and seed.dim() > 0:
        _check("seed", tuple(seed.shape) == (rows,) and seed.dtype == torch.int64, f"int64 keys ({rows},), one a row of x",
               f"{seed.dtype} {tuple(seed.shape)}")
        return seed.to(x.device)
    if seed is None:
        seed = torch.randint(1 << 62, ())
    _check("seed", isinstance(seed, int) or (isinstance(seed, Tensor) and seed.dtype == torch.int64),
           "an int, an int64 tensor or None", seed)
    part = seed.to(x.device) if isinstance(seed, Tensor) else seed
    return row_keys(part, torch.arange(rows, device=x.device))


def merge_(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """W += B diag(scale) A in place, summed in fp32 over all ranks and rounded once; no dense ΔW.

    weight (out, in), any strides (a transposed view for Conv1D); A (R, in), B (out, R), scale (R,). Returns weight.
    Writes under no_grad and bumps the version counter. Raises AdapterError for shapes, dtypes or devices that do not fit.
    """
    _check_weight(weight)
    _check_ranks("adapter", (A, B, scale), tuple(weight.shape), weight.device)
    _check_writable("weight", weight)
    torch.ops.flora.merge_(weight.detach(), A.detach(), B.detach(), scale.detach().float())
    return weight


def stack_(out_A: Tensor, out_B: Tensor, out_scale: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor],
           scales: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenates ranks into preallocated buffers: out_A (R, in), out_B (out, R), out_scale (R,), R = Σ r_k.

    As[k] (r_k, in), Bs[k] (out, r_k), scales[k] (r_k,), any float dtypes; a copy where the dtypes agree. Returns the buffers.
    Raises AdapterError where the ranks do not add up to R or a shape differs.
    """
    _check("As, Bs, scales", len(As) == len(Bs) == len(scales), "lists of one length", (len(As), len(Bs), len(scales)))
    _check("out_A and out_B", out_A.dim() == out_B.dim() == 2, "two matrices", (tuple(out_A.shape), tuple(out_B.shape)))
    outs, shape = (out_A, out_B, out_scale), (out_B.shape[0], out_A.shape[1])
    _check_ranks("out", outs, shape, out_A.device)
    for k, ranks in enumerate(zip(As, Bs, scales, strict=True)):
        _check_ranks(f"adapter {k}", ranks, shape, out_A.device)
    total = sum(A.shape[0] for A in As)
    _check("out_A", total == out_A.shape[0], f"{total} ranks, the sum of the adapters' ranks", out_A.shape[0])
    _check("out_scale", out_scale.dtype == torch.float32, "float32", out_scale.dtype)
    for name, tensor in zip(("out_A", "out_B", "out_scale"), outs, strict=True):
        _check_writable(name, tensor)
    torch.ops.flora.stack_(*(t.detach() for t in outs), *([t.detach() for t in each] for each in (As, Bs, scales)))
    return outs
