"""The specification of every operator, in plain PyTorch; also the floor that no faster backend may fall below.

    y = x Wᵀ + bias + h Bᵀ,   h = (dropout(x) Aᵀ) · scale        frozen ranks: + ((x Fᵀ) · scale_F) Gᵀ

`A` is (R, K), `B` is (N, R), `scale` is fp32 (R,), `weight` is (N, K), `x` is (M, K). Products run in x's dtype, `scale` is
applied in fp32. ΔW is never formed. With offsets, rows `row_offsets[k]:row_offsets[k + 1]` use the ranks
`rank_offsets[k]:rank_offsets[k + 1]`, and `h` holds them from column 0 on; without offsets there is one segment.
Layers that read the same x come as lists.

Dropout is a pure function of (row key, column), so the backward pass repeats the mask of the forward pass, nothing is
stored, and a row has the same mask in whatever batch it stands. The mixer is the 32-bit finaliser of MurmurHash3.
"""
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flora.memory import gradient_like

_NAMES = ("lora_linear", "lora_linear_backward", "lora_add_", "merge_", "checked_merge_", "stack_")
OPERATORS = dict.fromkeys(_NAMES, ("*",))

_SIGN = 1 << 31
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _signed(value: int) -> int:
    """The int32 that has the bits of an unsigned 32-bit constant."""
    return value - (1 << 32) if value & _SIGN else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 (torch's own is arithmetic)."""
    return (z >> bits) & ((1 << (32 - bits)) - 1)


def _mix32(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 16)) * _signed(0x85EBCA6B)
    z = (z ^ _shift(z, 13)) * _signed(0xC2B2AE35)
    return z ^ _shift(z, 16)


def dropout_mask(keys: Tensor, columns: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 or 1 / (1 - dropout) for each (row, column), a pure function of the row's key and the column.

    keys: int64 (M,). Returns (M, columns) in dtype. An element is dropped where its 24-bit draw is under dropout · 2²⁴.
    """
    low, high = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    column = torch.arange(columns, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B1)
    draw = _shift(_mix32(_mix32(column ^ low) ^ high), 8)
    return (draw >= round(dropout * (1 << 24))).to(dtype) / (1.0 - dropout)


def _segments(rows: int, ranks: int, row_offsets: Tensor | None,
              rank_offsets: Tensor | None) -> Iterator[tuple[int, slice, slice]]:
    """(client, its rows, its ranks); one segment that holds everything where there are no offsets."""
    if row_offsets is None or rank_offsets is None:
        yield 0, slice(0, rows), slice(0, ranks)
        return
    row, rank = row_offsets.tolist(), rank_offsets.tolist()
    for k in range(len(row) - 1):
        yield k, slice(row[k], row[k + 1]), slice(rank[k], rank[k + 1])


def _frozen_ranks(k: int, frozen: Sequence[Tensor], ranges: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The frozen A, B, scale that client k's rows see: a range of the shared buffers, or all of them."""
    A, B, scale = frozen
    if ranges is None:
        return A, B, scale
    start, stop = ranges[k].tolist()
    return A[start:stop], B[:, start:stop], scale[start:stop]


def _shrink(x: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    """(x Aᵀ) · scale, the product in x's dtype and the scaling in fp32 (fp64 for fp64)."""
    return ((x @ A.to(x.dtype).T) * scale).to(x.dtype)


def lora_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor],
                Bs: Sequence[Tensor], scales: Sequence[Tensor], frozen: Sequence[Tensor], row_offsets: Tensor | None,
                rank_offsets: Tensor | None, frozen_ranges: Tensor | None, widths: Sequence[int], dropout: float,
                keys: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """y_l = x W_lᵀ + bias_l + h_l B_lᵀ for every layer l that reads x, and h for the backward pass.

    x (M, K); frozen is () or A, B, scale of each layer's ranks that do not train; widths[l] is the largest rank of a client.
    Returns every y_l (M, N_l), and h (M, Σ widths), each layer's columns after those of the layer before; all in x's dtype.
    """
    return on_base_products(lora_add_, x, weights, biases, As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths,
                            dropout, keys)


def on_base_products(add_: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
                     As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[Tensor], frozen: Sequence[Tensor],
                     row_offsets: Tensor | None, rank_offsets: Tensor | None, frozen_ranges: Tensor | None, widths: Sequence[int],
                     dropout: float, keys: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """lora_linear as torch's own base products and a backend's lora_add_ on top of each."""
    ys, hs = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        hs.append(add_(y, x, As[i], Bs[i], scales[i], frozen[3 * i:3 * i + 3], row_offsets, rank_offsets, frozen_ranges,
                       widths[i], dropout, keys[i] if keys else None))
        ys.append(y)
    return ys, hs[0] if len(hs) == 1 else torch.cat(hs, dim=1)


def base_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ dy_l W_l in dy's dtype, summed in place."""
    dx = dys[0] @ weights[0].to(dys[0].dtype)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight.to(dy.dtype))
    return dx


def lora_add_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, frozen: Sequence[Tensor],
              row_offsets: Tensor | None, rank_offsets: Tensor | None, frozen_ranges: Tensor | None, width: int,
              dropout: float, keys: Tensor | None) -> Tensor:
    """y += h Bᵀ, in place; returns h (M, width)."""
    h = x.new_zeros(x.shape[0], width) if row_offsets is not None else None
    dropped = x * dropout_mask(keys, x.shape[1], dropout, x.dtype) if keys is not None else x
    for k, rows, ranks in _segments(x.shape[0], A.shape[0], row_offsets, rank_offsets):
        part = _shrink(dropped[rows], A[ranks], scale[ranks])
        y[rows].addmm_(part, B[:, ranks].to(x.dtype).T)
        if h is None:
            h = part
        else:
            h[rows, :part.shape[1]] = part
        if frozen:
            fA, fB, fscale = _frozen_ranks(k, frozen, frozen_ranges)
            y[rows].addmm_(_shrink(x[rows], fA, fscale), fB.to(x.dtype).T)
    return h


def lora_linear_backward(dys: Sequence[Tensor], x: Tensor | None, h: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor],
                         Bs: Sequence[Tensor], scales: Sequence[Tensor], frozen: Sequence[Tensor], row_offsets: Tensor | None,
                         rank_offsets: Tensor | None, frozen_ranges: Tensor | None, widths: Sequence[int], dropout: float,
                         keys: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dh_l = (dy_l B_l) · scale_l;  dx = Σ dy_l W_l + dropout(dh_l A_l);  dA_l = dh_lᵀ dropout(x);  dB_l = dy_lᵀ h_l.

    dys[l] (M, N_l); needs says which of dx, all dA, all dB to compute (an empty tensor stands for one that is not).
    weights: () where the base product is another's, and dx is the LoRA path's alone. x may be None where no dA is needed.
    Returns dx (M, K) in dy's dtype, dA_l (R, K), dB_l (N_l, R), laid out as B_l is, in the factors' dtypes.
    """
    L = len(As)
    dx = dys[0].new_empty(0)
    if needs[0]:
        dx = base_gradient(dys, weights) if weights else dys[0].new_zeros(dys[0].shape[0], As[0].shape[1])
    dAs, dBs, start = [], [], 0
    for i in range(L):
        own = (As[i], Bs[i], scales[i], frozen[3 * i:3 * i + 3], row_offsets, rank_offsets, frozen_ranges, dropout,
               keys[i] if keys else None)
        columns = h[:, start:start + widths[i]] if needs[1 + L + i] else h
        dA, dB = _one_backward(dys[i], x, columns, dx, own, (needs[0], needs[1 + i], needs[1 + L + i]))
        dAs.append(dA)
        dBs.append(dB)
        start += widths[i]
    return dx, dAs, dBs


def _one_backward(dy: Tensor, x: Tensor | None, h: Tensor, dx: Tensor, own: tuple,
                  needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
    """One layer's dA and dB; adds its LoRA path to dx."""
    A, B, scale, frozen, row_offsets, rank_offsets, frozen_ranges, dropout, keys = own
    need_x, need_A, need_B = needs
    dA = torch.empty_like(A, memory_format=torch.contiguous_format) if need_A else A.new_empty(0)
    dB = gradient_like(B) if need_B else B.new_empty(0)
    mask = dropout_mask(keys, A.shape[1], dropout, dy.dtype) if keys is not None else None
    for k, rows, ranks in _segments(dy.shape[0], A.shape[0], row_offsets, rank_offsets):
        dy_k = dy[rows]
        dh = _shrink(dy_k, B[:, ranks].T, scale[ranks]) if need_x or need_A else None
        if need_x and mask is None:
            dx[rows].addmm_(dh, A[ranks].to(dy.dtype))
        elif need_x:
            dx[rows].addcmul_(dh @ A[ranks].to(dy.dtype), mask[rows])
        if need_x and frozen:
            fA, fB, fscale = _frozen_ranks(k, frozen, frozen_ranges)
            dx[rows].addmm_(_shrink(dy_k, fB.T, fscale), fA.to(dy.dtype))
        if need_A:
            dA[ranks] = (dh.T @ (x[rows] if mask is None else x[rows] * mask[rows])).to(A.dtype)
        if need_B:
            dB[:, ranks] = (h[rows, :ranks.stop - ranks.start].T @ dy_k).T.to(B.dtype)
    return dA, dB


def _draws(seed: int, rows: range, columns: int, device: torch.device) -> Tensor:
    """32 random bits, as int32, for each element of these rows: a pure function of (seed, row, column)."""
    low, high = _signed(seed & 0xFFFFFFFF), _signed(seed >> 32 & 0xFFFFFFFF)
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device) * _signed(0x9E3779B1)
    column = torch.arange(columns, dtype=torch.int32, device=device) * _signed(0x9E3779B1)
    return _mix32(column ^ (_mix32(row ^ low) ^ high)[:, None])


def round_to(value: Tensor, dtype: torch.dtype, draws: Tensor | None) -> Tensor:
    """value in dtype: to nearest even, or, with draws, up or down with the odds that make the mean exact (16-bit dtypes).

    Magnitudes grow by a random part of the last place that is kept, and the rest is cut off.
    """
    if draws is None or dtype.itemsize > 2:
        return value.to(dtype)
    x = value.float()
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + (draws & 0xFFFF)) & -(1 << 16)).view(torch.float32)
    else:
        tiny = x.abs() * 2.0**24                                  # fp16 under 2⁻¹⁴ has a fixed last place of 2⁻²⁴
        whole = tiny.floor()
        tiny = (whole + (tiny - whole > _shift(draws, 8) * 2.0**-24)) * 2.0**-24
        normal = ((bits + (draws & 0x1FFF)) & -(1 << 13)).view(torch.float32)
        rounded = torch.where(x.abs() < 2.0**-14, tiny.copysign(x), normal)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def add_rounded_(weight: Tensor, residual: Tensor | None, update: Tensor, seed: int | None, first_row: int = 0) -> None:
    """weight (+ residual) += update, rounded once; what rounding left goes into the residual. update: fp32 or fp64.

    v = w + t, t = update + residual; the weight becomes v to nearest and the residual v - weight (by TwoSum, so nothing is
    lost for an fp32 weight either); without a residual the seed rounds the weight, with one it rounds the residual.
    """
    rows = range(first_row, first_row + weight.shape[0])
    draws = None if seed is None else _draws(seed, rows, weight.shape[1], weight.device)
    w = weight.to(update.dtype)
    if residual is None:
        weight.copy_(round_to(w + update, weight.dtype, draws))
        return
    update = update + residual
    rounded = (w + update).to(weight.dtype)
    new = rounded.to(update.dtype)
    moved = new - w
    residual.copy_(round_to((w - (new - moved)) + (update - moved), residual.dtype, draws))
    weight.copy_(rounded)


def merge_(weights: Sequence[Tensor], residuals: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor],
           scales: Sequence[Tensor], counts: Sequence[int], seeds: Sequence[int]) -> None:
    """W_l += Σ_k B_lk diag(s_lk) A_lk, summed over all clients and ranks in fp32 (fp64 for fp64 weights) and rounded once.

    weights[l] (N, K), any strides; counts[l] of the As (r, K), Bs (N, r), scales (r,) are layer l's, after those of the layer
    before. residuals, seeds: empty, or one a layer (see add_rounded_). The scratch is bounded by 256 rows.
    """
    start = 0
    for i, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        mine = slice(start, start + count)
        factors = [(A.to(dtype), B.to(dtype) * scale.to(dtype))
                   for A, B, scale in zip(As[mine], Bs[mine], scales[mine], strict=True)]
        if not residuals and not any(A.shape[0] for A, _ in factors):
            weight = weight[:0]                                     # nothing to add: not even -0 becomes 0
        for first in range(0, weight.shape[0], 256):
            rows = slice(first, first + 256)
            update = weight.new_zeros(weight[rows].shape, dtype=dtype)
            for A, B in factors:
                update.addmm_(B[rows], A)
            add_rounded_(weight[rows], residuals[i][rows] if residuals else None, update, seeds[i] if seeds else None, first)
        start += count


def stack_(out_A: Tensor, out_B: Tensor, out_scale: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor],
           scales: Sequence[Tensor]) -> None:
    """Concatenates the ranks of many adapters into preallocated buffers, in the order given.

    out_A (R, K), out_B (N, R), out_scale (R,), R the sum of the ranks; As[k] (r_k, K), Bs[k] (N, r_k), scales[k] (r_k,).
    """
    start = 0
    for A, B, scale in zip(As, Bs, scales, strict=True):
        stop = start + A.shape[0]
        out_A[start:stop], out_B[:, start:stop], out_scale[start:stop] = A, B, scale
        start = stop


def first_not_finite(tensors: Sequence[Tensor]) -> int:
    """The index of the first tensor that holds a NaN or an infinity; -1 where none does."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled or bool(torch.nn.utils.get_total_norm(filled).isfinite()):
        return -1                                                   # a finite sum has finite terms: a few launches for all of them
    bad = torch.stack([~torch.isfinite(tensor).all() for tensor in tensors])
    return int(bad.int().argmax()) if bool(bad.any()) else -1


def first_misfit(weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[Tensor],
                 counts: Sequence[int]) -> int:
    """The first client whose A (r, in), B (out, r) or scale (r,) does not fit its weight (out, in), or lies elsewhere; -1: none."""
    owners = [weight for weight, count in zip(weights, counts, strict=True) for _ in range(count)]
    for number, (weight, A, B, scale) in enumerate(zip(owners, As, Bs, scales, strict=True)):
        (out, inn), r = weight.shape, A.shape[0] if A.dim() else 0
        if not (A.shape == (r, inn) and B.shape == (out, r) and scale.shape == (r,)
                and all(t.dtype in _FLOATS and t.device == weight.device for t in (A, B, scale))):
            return number
    return -1


def checked_merge_(weights: Sequence[Tensor], residuals: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor],
                   scales: Sequence[Tensor], counts: Sequence[int], seeds: Sequence[int], write: bool) -> tuple[int, int]:
    """What is wrong with the factors of merge_, the first of: (1, client) that does not fit (first_misfit); (2, i) for a NaN or an
    infinity in one of As, Bs and scales, one after another; (3, 0) for a factor that may lie where something is written: here
    always, and nothing is merged. (0, 0): nothing is wrong, and where `write` is set the merge is done."""
    misfit = first_misfit(weights, As, Bs, scales, counts)
    if misfit >= 0:
        return 1, misfit
    bad = first_not_finite([*As, *Bs, *scales])
    return (2, bad) if bad >= 0 else (3, 0)
