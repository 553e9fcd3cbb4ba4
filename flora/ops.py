"""The operators as users call them: schemas, fake kernels, autograd.

Every operator is defined once in the library `flora` (torch.library), so `torch.compile` sees it whole; inside, the device
picks a backend (flora.kernels). The autograd.Function stands outside the operator; its forward keeps `h` for the backward.
Layers that read the same x are one call: x is read once for all of their h, and their dx accumulate in place.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora.checks import FLOATS, check, check_dtype, check_no_leaf, check_ranks, check_reverse, check_weight, check_writable
from flora.library import LIB, implement
from flora.memory import gradient_like
from flora.merges import Rounding, add_many_, check_many, merge_, merge_many_, stack_
from flora.segments import Frozen, HasRanks, Segments, frozen_operand, keys_of, row_keys, segments_of

__all__ = ["lora_linear", "lora_linears", "lora_add_", "merge_", "merge_many_", "add_many_", "check_many", "stack_",
           "Rounding",
           "Segments", "Frozen", "row_keys", "FLOATS"]

_SEGMENTS = "Tensor[] frozen, Tensor? row_offsets, Tensor? rank_offsets, Tensor? frozen_ranges"
LIB.define(f"lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] As, Tensor[] Bs, Tensor[] scales, {_SEGMENTS}, "
            "SymInt[] widths, float dropout, Tensor[] keys) -> (Tensor[], Tensor)")
LIB.define("lora_linear_backward(Tensor[] dys, Tensor? x, Tensor h, Tensor[] weights, Tensor[] As, Tensor[] Bs, "
            f"Tensor[] scales, {_SEGMENTS}, SymInt[] widths, float dropout, Tensor[] keys, bool[] needs) "
            "-> (Tensor, Tensor[], Tensor[])")
LIB.define(f"lora_add_(Tensor(a!) y, Tensor x, Tensor A, Tensor B, Tensor scale, {_SEGMENTS}, SymInt width, float dropout, "
            "Tensor? keys) -> Tensor")
for _op, _written in (("lora_linear", 0), ("lora_linear_backward", 0), ("lora_add_", 1)):
    implement(_op, _written)


@torch.library.register_fake("flora::lora_linear", lib=LIB)
def _(x: Tensor, weights: Sequence[Tensor], biases: Any, As: Any, Bs: Any, scales: Any, frozen: Any, row_offsets: Any,
      rank_offsets: Any, frozen_ranges: Any, widths: Sequence[int], *rest: Any) -> tuple[list[Tensor], Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights], x.new_empty(x.shape[0], sum(widths))


@torch.library.register_fake("flora::lora_linear_backward", lib=LIB)
def _(dys: Sequence[Tensor], x: Any, h: Any, weights: Any, As: Sequence[Tensor], Bs: Sequence[Tensor],
      *rest: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    L, dy, needs = len(As), dys[0], rest[-1]
    dAs = [A.new_empty(A.shape if need else 0) for A, need in zip(As, needs[1:L + 1], strict=True)]
    dBs = [gradient_like(B) if need else B.new_empty(0) for B, need in zip(Bs, needs[L + 1:], strict=True)]
    return dy.new_empty((dy.shape[0], As[0].shape[1]) if needs[0] else 0), dAs, dBs


@torch.library.register_fake("flora::lora_add_", lib=LIB)
def _(y: Any, x: Tensor, A: Any, B: Any, scale: Any, frozen: Any, row_offsets: Any, rank_offsets: Any, frozen_ranges: Any,
      width: int, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], width)


def _forward_order(As: Sequence[Tensor], Bs: Sequence[Tensor], weights: Any, biases: Any, scales: Any, frozen: Any, segments: Any,
                   *rest: Any) -> tuple[Any, ...]:
    """The arguments of the forward operator after x, in its order."""
    return weights, biases, As, Bs, scales, frozen, *segments, *rest


def _save(ctx: Any, x: Any, h: Any, factors: Any, weights: Any, scales: Any, frozen: Any, segments: Any, widths: Any,
          dropout: float, keys: Any, x_at: int = 0) -> None:
    """Keeps for the backward pass what the gradients asked for need: x for the As alone, h for the Bs alone."""
    L = len(scales)
    ctx.wanted = [ctx.needs_input_grad[x_at], *ctx.needs_input_grad[len(ctx.needs_input_grad) - 2 * L:]]
    x, h = x if any(ctx.wanted[1:L + 1]) else None, h if any(ctx.wanted[L + 1:]) else h.new_empty(0)
    ctx.save_for_backward(x, h, *segments, *weights, *factors, *scales, *keys, *frozen)
    ctx.counts, ctx.widths, ctx.dropout = (len(weights), L, L, L, len(keys), len(frozen)), widths, dropout


def _gradients(ctx: Any, dys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """dx and the gradients of all As, then all Bs; None where one was not asked for."""
    x, h, row_offsets, rank_offsets, ranges, *rest = ctx.saved_tensors
    parts: list[list[Tensor]] = []
    start = 0
    for count in ctx.counts:
        parts.append(list(rest[start:start + count]))
        start += count
    weights, As, Bs, scales, keys, frozen = parts
    dx, dAs, dBs = torch.ops.flora.lora_linear_backward(
        [dy.contiguous() for dy in dys], x, h, weights, As, Bs, scales, frozen, row_offsets, rank_offsets, ranges, ctx.widths,
        ctx.dropout, keys, ctx.wanted)
    return tuple(g if need else None for g, need in zip((dx, *dAs, *dBs), ctx.wanted, strict=True))


class _LoRALinear(torch.autograd.Function):
    """Inputs: x, eight without a gradient, the As, the Bs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Any, biases: Any, scales: Any, frozen: Any, segments: Any, widths: Any,
                dropout: float, keys: Any, *factors: Tensor) -> tuple[Tensor, ...]:
        L = len(scales)
        ys, h = torch.ops.flora.lora_linear(x, *_forward_order(factors[:L], factors[L:], weights, biases, scales, frozen, segments,
                                                               widths, dropout, keys))
        _save(ctx, x, h, factors, weights, scales, frozen, segments, widths, dropout, keys)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dx, *grads = _gradients(ctx, dys)
        return dx, *[None] * 8, *grads


class _LoRAAdd(torch.autograd.Function):
    """Inputs: y, which is written in place (first: autograd's rule for views) and whose gradient passes through untouched; x,
    six without a gradient, A, B."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, scale: Tensor, frozen: Any, segments: Any, width: int, dropout: float, keys: Any,
                A: Tensor, B: Tensor) -> Tensor:
        h = torch.ops.flora.lora_add_(y, x, A, B, scale, frozen, *segments, width, dropout, keys)
        ctx.mark_dirty(y)
        _save(ctx, x, h, (A, B), (), (scale,), frozen, segments, [width], dropout, () if keys is None else (keys,), 1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dA, dB = _gradients(ctx, (dy,))
        return dy, dx, *[None] * 6, dA, dB


def lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, bias: Tensor | None = None, *,
                row_offsets: Sequence[int] | Tensor | Segments | None = None,
                rank_offsets: Sequence[int] | Tensor | None = None, frozen: HasRanks | Sequence[Any] | None = None,
                dropout: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias + ((dropout(x) Aᵀ) · scale) Bᵀ, without ΔW; K clients of different ranks in one call.

    x (..., in); weight (out, in), frozen; A (R, in), B (out, R), any float dtypes, cast to x's for the products, their
    gradients in their own dtype; scale fp32 (R,), bias (out,): no gradient, as none for weight. Returns (..., out) in x's dtype
    (autocast's, where it is on).

    row_offsets, rank_offsets: K + 1 ints on the host, or one Segments as row_offsets: rows row_offsets[k]:row_offsets[k + 1]
    of x flattened to (M, in) use ranks rank_offsets[k]:rank_offsets[k + 1]. Without them every row uses all R ranks.
    frozen: an Adapter or Frozen: ranks that add to the output without dropout and get no gradient.
    dropout: on the input of A alone, keyed per row: seed is an int, or int64 (M,) keys (see row_keys); None draws one on x's
    device, which torch.manual_seed repeats.
    Raises AdapterError for shapes, dtypes, devices or offsets that do not fit. Differentiable once.
    """
    return lora_linears(x, [weight], [A], [B], [scale], [bias], row_offsets=row_offsets, rank_offsets=rank_offsets,
                        frozen=None if frozen is None else [frozen], dropout=dropout, seeds=[seed])[0]


def lora_linears(x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[Tensor],
                 biases: Sequence[Tensor | None] | None = None, *, row_offsets: Sequence[int] | Tensor | Segments | None = None,
                 rank_offsets: Sequence[int] | Tensor | None = None, frozen: Sequence[HasRanks | Sequence[Any]] | None = None,
                 dropout: float = 0.0, seeds: Sequence[int | Tensor | None] | None = None) -> tuple[Tensor, ...]:
    """lora_linear of several layers that read the same x (q, k and v; gate and up), in one call: the y of each.

    Lists over layers (biases, seeds: None for none); otherwise as lora_linear. What is gained: x is read once for the h of all
    layers and once for all dA, and dx is summed in place instead of once a layer. frozen: for every layer or for none, with the
    same ranges.
    """
    L, device = len(weights), x.device
    biases, seeds = biases or [None] * L, seeds or [None] * L
    check("lists of layers", 0 < L == len(As) == len(Bs) == len(scales) == len(biases) == len(seeds), "one entry a layer in each",
          (L, len(As), len(Bs), len(scales), len(biases), len(seeds)))
    check_dtype("x", x)
    check("x", x.dim() >= 1, "(..., in)", tuple(x.shape))
    shapes = []
    for weight, A, B, scale, bias in zip(weights, As, Bs, scales, biases, strict=True):
        check_weight(weight)
        N, K = weight.shape
        if x.shape[-1] != K:
            check("x", False, f"(..., {K})", tuple(x.shape))
        if device != weight.device:
            check("x", False, f"a tensor on {weight.device}, where weight is", device)
        check_ranks("adapter", (A, B, scale), (N, K), device)
        if bias is not None and bias.shape != (N,):
            check("bias", False, f"({N},)", tuple(bias.shape))
        shapes.append((N, K))
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:   # which meta cannot ask
        x = x.to(torch.get_autocast_dtype(device.type))
    check_reverse(x, *As, *Bs)
    flat = _rows(x)
    held, segments, widths, keys = _routing(flat, As, shapes, row_offsets, rank_offsets, frozen, dropout, seeds)
    fixed = ([weight.detach() for weight in weights], [None if bias is None else bias.detach() for bias in biases],
             [scale.detach().float() for scale in scales], held, segments, widths, float(dropout), keys)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (flat, *As, *Bs)):
        ys = _LoRALinear.apply(flat, *fixed, *As, *Bs)
    else:
        ys, _ = torch.ops.flora.lora_linear(flat, *_forward_order(As, Bs, *fixed))
    if x.dim() == 2:
        return tuple(ys)
    return tuple(y.reshape(*x.shape[:-1], shape[0]) for y, shape in zip(ys, shapes, strict=True))


def _rows(t: Tensor) -> Tensor:
    """t as a matrix of its last axis. reshape(-1, n) cannot say how many rows there are where n is 0."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def lora_add_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, *,
              row_offsets: Sequence[int] | Tensor | Segments | None = None, rank_offsets: Sequence[int] | Tensor | None = None,
              frozen: HasRanks | Sequence[Any] | None = None, dropout: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """y += ((dropout(x) Aᵀ) · scale) Bᵀ in place: the LoRA path alone, on top of any base product; returns y.

    For a base that lora_linear cannot multiply with: 4-bit, 8-bit, FP8, an expert. y (..., out) is what the base gave for
    x (..., in), in any float dtype, which is that of the products; the rest as lora_linear. Gradients flow to x, A, B, and to
    y unchanged. Raises AdapterError for shapes, dtypes, devices or offsets that do not fit. Differentiable once.
    """
    check_dtype("x", x)
    check_dtype("y", y)
    check("x", x.dim() >= 1, "(..., in)", tuple(x.shape))
    check("y", y.dim() == x.dim() and y.shape[:-1] == x.shape[:-1], f"{(*x.shape[:-1], 'out')}, x being {tuple(x.shape)}",
          tuple(y.shape))
    check("y", y.device == x.device, f"a tensor on {x.device}, where x is", y.device)
    check_writable("y", y)
    shape = (y.shape[-1], x.shape[-1])
    check_ranks("adapter", (A, B, scale), shape, x.device)
    check_reverse(y, x, A, B)
    if not torch.compiler.is_compiling():
        check_no_leaf("y", y)
        shared = torch._C._is_alias_of(x, y)                                # type: ignore[attr-defined]
        x = x.clone() if shared else x                                      # it is read after y is written, and for the backward
    flat = _rows(x.to(y.dtype))
    held, segments, [width], keys = _routing(flat, [A], [shape], row_offsets, rank_offsets, None if frozen is None else [frozen],
                                             dropout, [seed])
    fixed = (scale.detach().float(), held, segments, width, float(dropout), keys[0] if keys else None)
    if y.dim() == 2:
        written: Tensor = _LoRAAdd.apply(y, flat, *fixed, A, B)
        return written
    if y.is_contiguous():
        _LoRAAdd.apply(_rows(y), flat, *fixed, A, B)
        return y
    return y.copy_(_LoRAAdd.apply(_rows(y).clone(), flat, *fixed, A, B).view(y.shape))


def _routing(x: Tensor, As: Sequence[Tensor], shapes: Sequence[tuple[int, int]], row_offsets: Any, rank_offsets: Any,
             frozen: Sequence[HasRanks | Sequence[Any]] | None, dropout: float, seeds: Sequence[int | Tensor | None],
             ) -> tuple[list[Tensor], tuple[Tensor | None, ...], list[int], list[Tensor]]:
    """What the layers of a call share: frozen tensors, (row_offsets, rank_offsets, frozen ranges), the columns of h that each
    layer has, and a key for every row and layer where there is dropout."""
    check("dropout", 0.0 <= dropout < 1.0, "a probability in [0, 1)", dropout)
    segments = segments_of(row_offsets, rank_offsets, x.shape[0], [A.shape[0] for A in As])
    if frozen is not None and (len(frozen) != len(As) or any(one is None for one in frozen)):
        check("frozen", False, f"{len(As)} entries, one a layer and none of them None", [type(one).__name__ for one in frozen])
    given = frozen or ()
    pairs = [frozen_operand(one, shape, x.device, segments) for one, shape in zip(given, shapes, strict=len(given) > 0)]
    ranges = pairs[0][1] if pairs else None
    for _, other in pairs[1:]:
        same = other is ranges or (other is not None and ranges is not None and torch.equal(other, ranges))
        check("frozen ranges", same, f"those of the first layer, {ranges}", other)
    offsets = (segments.row_offsets, segments.rank_offsets) if segments else (None, None)
    widths = [segments.max_rank if segments else A.shape[0] for A in As]
    keys = [keys_of(seed, x.shape[0], x.device) for seed in seeds] if dropout > 0 else []
    return [tensor for tensors, _ in pairs for tensor in tensors], (*offsets, ranges), widths, keys
