"""The Triton backend: lora_linear, its backward pass and lora_add_, on NVIDIA GPUs and under Triton's interpreter.

Arguments and results are those of kernels.reference. Here the passes are put together; each is in a file of its own.
"""
import itertools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from flora.errors import BackendError
from flora.kernels.triton import rule, tiles
from flora.kernels.triton.configs import ONE_PASS_RANKS
from flora.kernels.triton.grads import Piece, dy_pass, outer
from flora.kernels.triton.linear import add_low_rank
from flora.kernels.triton.shrink import shrink
from flora.memory import gradient_like

_NAMES = ("lora_linear", "lora_linear_backward", "lora_add_")
OPERATORS = dict.fromkeys(_NAMES, ("cuda",))
WHEN_FORCED = dict.fromkeys(_NAMES, ("cpu",)) if triton.knobs.runtime.interpret else {}
REFUSED = {(device, torch.float64): f"no float64 kernels for {device}" for device in ("cuda", "cpu")}


def _extent(t: Tensor) -> int:
    """One more than the largest offset of an element."""
    if t.is_contiguous():
        return t.numel()
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1


class _Call:
    """What the layers of one call share: whose ranks are whose, and where each layer's columns of h lie.

    The kernels read scales and keys as vectors without gaps, and count the elements of a factor in 32 bits.
    """

    def __init__(self, As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys):
        for factor in (*As, *Bs, *frozen):
            if len(As) * _extent(factor) >= 1 << 31:
                raise BackendError(f"expected factors that span fewer than 2³¹ elements, {len(As)} layers together; got "
                                   f"{tuple(factor.shape)}, strides {factor.stride()}. Split the clients over several calls, or "
                                   "make the factors contiguous.")
        self.L, self.segmented, self.widths = len(As), row_offsets is not None, list(widths)
        self.dropout, self.keys, self.scales = dropout, [key.contiguous() for key in keys], [s.contiguous() for s in scales]
        if self.segmented:
            self.of = [tiles.training_ranks(row_offsets, rank_offsets, As[0].shape[0])] * self.L
        else:
            self.of = [tiles.training_ranks(None, None, width) for width in self.widths]
        self.starts = [0, *itertools.accumulate(self.widths[:-1])]
        self.frozen = [(frozen[3 * i], frozen[3 * i + 1], frozen[3 * i + 2].contiguous()) if frozen else None
                       for i in range(self.L)]
        self.f_of = [f and tiles.frozen_ranks(row_offsets, frozen_ranges, f[0].shape[0]) for f in self.frozen]
        # Layers side by side: with clients, as many equal blocks of ranks; without, one adapter of all their ranks.
        self.total = sum(self.widths)
        self.shared = (self.of[0], self.widths[0], self.L) if self.segmented else (tiles.training_ranks(None, None, self.total),
                                                                                   self.total, 1)

    def columns(self, h: Tensor, layer: int) -> Tensor:
        """The columns of h that are a layer's."""
        return h if self.L == 1 else h.narrow(1, self.starts[layer], self.widths[layer])

    def form(self, op: str, M: int, shape: tuple[int, int], like: Tensor) -> rule.Form:
        return rule.form(op, M, *shape, self.total, self.segmented, bool(self.keys), like.dtype, like.device)

    def side_by_side(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if self.L == 1 else torch.cat(list(tensors))

    def frozen_h(self, layer: int, x: Tensor, factor: Tensor) -> Tensor:
        """The h (or, from dy, the dh) of a layer's frozen ranks."""
        of = self.f_of[layer]
        return shrink(x, factor, self.frozen[layer][2], of, factor.shape[0] if of.bounds is not None else of.ranks)


def _reduced(x: Tensor, call: _Call, As: Sequence[Tensor], form: rule.Form) -> Tensor:
    """h of all layers, (M, Σ widths): one pass over x, unless dropout gives each layer another x."""
    if call.keys and call.L > 1:
        h = x.new_empty(x.shape[0], call.total)
        for i in range(call.L):
            shrink(x, As[i], call.scales[i], call.of[i], call.widths[i], keys=call.keys[i], dropout=call.dropout,
                   out=call.columns(h, i))
        return h
    A, scale = call.side_by_side(As), call.side_by_side(call.scales)
    if form.skinny == "torch":
        return (x @ A.to(x.dtype).T).mul_(scale)
    return shrink(x, A, scale, *call.shared, keys=call.keys[0] if call.keys else None, dropout=call.dropout)


def _expand(y: Tensor, h: Tensor, b: Tensor, of: tiles.Ranks, width: int, layers: int, form: rule.Form, keys: Tensor | None = None,
            dropout: float = 0.0) -> None:
    """y += mask · (h bᵀ), in place."""
    if form.skinny == "torch" and keys is None and of.bounds is None:
        y.addmm_(h, b.to(y.dtype).T)
    else:
        add_low_rank(y, h, b, of, width, layers, keys=keys, dropout=dropout)


def _add_layer(y: Tensor, x: Tensor, h: Tensor, B: Tensor, call: _Call, layer: int, form: rule.Form) -> None:
    """y += h Bᵀ and the frozen ranks of a layer."""
    _expand(y, h, B, call.of[layer], call.widths[layer], 1, form)
    if call.frozen[layer]:
        hf, of = call.frozen_h(layer, x, call.frozen[layer][0]), call.f_of[layer]
        add_low_rank(y, hf, call.frozen[layer][1], of, hf.shape[1])


def lora_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor],
                Bs: Sequence[Tensor], scales: Sequence[Tensor], frozen: Sequence[Tensor], row_offsets: Tensor | None,
                rank_offsets: Tensor | None, frozen_ranges: Tensor | None, widths: Sequence[int], dropout: float,
                keys: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """y_l = x W_lᵀ + bias_l + h_l B_lᵀ for every layer, and h: see kernels.reference.lora_linear."""
    call = _Call(As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys)
    forms = [call.form("forward", x.shape[0], tuple(weight.shape), x) for weight in weights]
    h = _reduced(x, call, As, forms[0])
    ys = []
    for i, (weight, bias, form) in enumerate(zip(weights, biases, forms, strict=True)):
        if form.base == "fused":
            held = None
            if call.frozen[i]:
                held = (call.frozen_h(i, x, call.frozen[i][0]), call.frozen[i][1], call.f_of[i])
            y = add_low_rank(x.new_empty(x.shape[0], weight.shape[0]), call.columns(h, i), Bs[i], call.of[i], call.widths[i], x=x,
                             w=weight, bias=None if bias is None else bias.contiguous(), frozen=held)
        else:
            y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            _add_layer(y, x, call.columns(h, i), Bs[i], call, i, form)
        ys.append(y)
    return ys, h


def lora_add_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, frozen: Sequence[Tensor], row_offsets: Tensor | None,
              rank_offsets: Tensor | None, frozen_ranges: Tensor | None, width: int, dropout: float,
              keys: Tensor | None) -> Tensor:
    """y += h Bᵀ, in place; returns h (M, width)."""
    call = _Call([A], [B], [scale], frozen, row_offsets, rank_offsets, frozen_ranges, [width], dropout,
                 [] if keys is None else [keys])
    form = call.form("forward", x.shape[0], (B.shape[0], A.shape[1]), x)
    h = _reduced(x, call, [A], form)
    target = y if y.stride(1) == 1 else y.contiguous()                # the kernels write whole rows
    _add_layer(target, x, h, B, call, 0, form)
    if target is not y:
        y.copy_(target)
    return h


def lora_linear_backward(dys: Sequence[Tensor], x: Tensor | None, h: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor],
                         Bs: Sequence[Tensor], scales: Sequence[Tensor], frozen: Sequence[Tensor], row_offsets: Tensor | None,
                         rank_offsets: Tensor | None, frozen_ranges: Tensor | None, widths: Sequence[int], dropout: float,
                         keys: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx, every dA and every dB: see kernels.reference.lora_linear_backward. dys: rows contiguous."""
    call = _Call(As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys)
    L, M, K = call.L, dys[0].shape[0], As[0].shape[1]
    need_x, need_As, need_Bs = needs[0], needs[1:L + 1], needs[L + 1:]
    forms = [call.form("backward", M, (B.shape[0], K), dys[0]) for B in Bs]
    dh = dys[0].new_empty(M, call.total)
    dBs = [gradient_like(B) if need else B.new_empty(0) for B, need in zip(Bs, need_Bs, strict=True)]
    for i in range(L):
        wanted = need_x or need_As[i]
        if wanted or need_Bs[i]:
            _through_dy(dys[i], Bs[i], call.scales[i], h, dh, dBs[i], call, i, forms[i], wanted, need_Bs[i])
    dx = _dx(dys, dh, weights, As, call, forms) if need_x else dys[0].new_empty(0)
    return dx, _dAs(x, dh, As, call, forms[0], need_As), dBs


def _through_dy(dy: Tensor, B: Tensor, scale: Tensor, h: Tensor, dh: Tensor, dB: Tensor, call: _Call, i: int, form: rule.Form,
                need_dh: bool, need_dB: bool) -> None:
    """What is summed over a layer's dy: its columns of dh, and dB."""
    of, width, into = call.of[i], call.widths[i], call.columns(dh, i)
    own = call.columns(h, i) if need_dB else None
    if form.skinny == "torch":
        if need_dh:
            torch.mul(dy @ B.to(dy.dtype), scale, out=into)
        if need_dB:
            dB.copy_(dy.T @ own)
    elif need_dh and need_dB and width <= ONE_PASS_RANKS:
        dy_pass(dy, B, scale, own, into, dB, of, width)
    else:
        if need_dh:
            shrink(dy, B.T, scale, of, width, out=into)
        if need_dB:
            outer(own, dy, [Piece(dB.T, 0, 0, of)], of, width)


def _dx(dys: Sequence[Tensor], dh: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], call: _Call,
        forms: Sequence[rule.Form]) -> Tensor:
    """dx = Σ dy_l W_l + mask_l · (dh_l A_l) + the frozen ranks' part."""
    M, K, dtype = dys[0].shape[0], As[0].shape[1], dys[0].dtype
    held = [(call.frozen_h(i, dys[i], f[1].T), f[0].T, call.f_of[i]) if f else None for i, f in enumerate(call.frozen)]
    if call.L == 1 and weights and forms[0].base == "fused":
        return add_low_rank(dys[0].new_empty(M, K), dh, As[0].T, call.of[0], call.widths[0], x=dys[0], w=weights[0].T,
                            frozen=held[0], keys=call.keys[0] if call.keys else None, dropout=call.dropout)
    dx = dys[0] @ weights[0].to(dtype) if weights else dys[0].new_zeros(M, K)
    for dy, weight in zip(dys[1:], weights[1:], strict=bool(weights)):
        dx.addmm_(dy, weight.to(dtype))
    if call.keys:
        for i, A in enumerate(As):
            _expand(dx, call.columns(dh, i), A.T, call.of[i], call.widths[i], 1, forms[i], call.keys[i], call.dropout)
    else:
        _expand(dx, dh, call.side_by_side(As).T, *call.shared, forms[0])
    for part in held:
        if part:
            add_low_rank(dx, part[0], part[1], part[2], part[0].shape[1])
    return dx


def _dAs(x: Tensor | None, dh: Tensor, As: Sequence[Tensor], call: _Call, form: rule.Form, needs: Sequence[bool]) -> list[Tensor]:
    """Every dA = dhᵀ dropout(x): one pass over x for all layers, unless dropout gives each layer another x."""
    dAs = [A.new_empty(A.shape if need else 0) for A, need in zip(As, needs, strict=True)]
    if form.skinny == "torch":
        whole = dh.T @ x if any(needs) else dh
        for dA, need, start, width in zip(dAs, needs, call.starts, call.widths, strict=True):
            if need:
                dA.copy_(whole.narrow(0, start, width))
        return dAs
    pieces = [Piece(dA, i, start, of) for i, (dA, start, of) in enumerate(zip(dAs, call.starts, call.of, strict=True))]
    if call.keys:
        for i, piece in enumerate(pieces):
            if needs[i]:
                outer(call.columns(dh, i), x, [piece._replace(layer=0, column=0)], call.of[i], call.widths[i], keys=call.keys[i],
                      dropout=call.dropout)
    elif any(needs):
        outer(dh, x, [piece for piece, need in zip(pieces, needs, strict=True) if need], *call.shared)
    return dAs
