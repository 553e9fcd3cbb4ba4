"""dA = dhᵀ dropout(x) and dB = dyᵀ h, per client; and dh with dB from one pass over dy.

Sums run over rows, and rows are many where outputs are few: they are cut into chunks, each of one client, whose partial sums
are written in fp32 and then added in order (gather_kernel). No atomics: the same bits every time, also for one client among
others. With few ranks one pass over dy forms dh and a partial dB at once, and dy, the largest operand, is read once.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.triton import rule, tiles
from flora.kernels.triton.common import dot, kept, rounded, row_tile
from flora.kernels.triton.configs import GATHERED, Config
from flora.kernels.triton.launch import cdiv, launch
from flora.kernels.triton.shrink import sum_splits


@triton.jit(do_not_specialize=["M", "ranks", "layers", "width", "threshold"])
def outer_kernel(p, q, parts, table, keys, M, ranks, layers, width, threshold, grow, C, sp_m, sq_m, sq_c, so_r, TABLE: tl.constexpr,
                 DROPOUT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """parts[of the chunk, its layer and rank j, c] = Σ over the chunk's rows of p[row, j] · dropout(q)[row, c]."""
    row, stop, _first, ranks, before = row_tile(table, tl.program_id(0), M, 0, ranks, CHUNK, TABLE)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < C
    j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    layer = j // width
    j_ok = (j - layer * width < ranks) & (layer < layers)
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(row, stop, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_ok = rows < stop
        q_tile = tl.load(q + rows[:, None] * sq_m + columns.to(tl.int64)[None, :] * sq_c, mask=row_ok[:, None] & column_ok[None, :],
                         other=0.0)
        if DROPOUT:
            keep = kept(keys, rows, row_ok, columns, threshold)
            q_tile = rounded(tl.where(keep, q_tile.to(tl.float32) * grow, 0.0), q_tile.dtype)
        p_tile = tl.load(p + rows[:, None] * sp_m + j[None, :], mask=row_ok[:, None] & j_ok[None, :], other=0.0)
        acc = dot(tl.trans(q_tile), p_tile, acc)
    part = before * layers + layer * ranks + j - layer * width
    out = parts + part.to(tl.int64)[None, :] * so_r + columns[:, None]
    tl.store(out, acc, mask=column_ok[:, None] & j_ok[None, :])


@triton.jit(do_not_specialize=["M", "first", "ranks", "width"])
def dy_pass_kernel(dy, b, scale, h, dh, parts, table, M, first, ranks, width, N, sd_m, sb_r, sb_n, sh_m, sg_p, sg_m, so_r,
                   TABLE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """dh = (dy B) · scale of a row tile over one of SPLITS parts of N, and its part of dB = dyᵀ h, from one pass over its dy."""
    row, stop, first, ranks, before = row_tile(table, tl.program_id(0), M, first, ranks, BLOCK_M, TABLE)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_ok = rows < stop
    r = tl.arange(0, BLOCK_R)
    r_ok = r < ranks
    h_tile = tl.load(h + rows[:, None] * sh_m + r[None, :], mask=row_ok[:, None] & r_ok[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    step = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    begin = tl.program_id(1) * step
    for start in range(begin, tl.minimum(begin + step, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_ok = n < N
        dy_tile = tl.load(dy + rows[:, None] * sd_m + n[None, :], mask=row_ok[:, None] & n_ok[None, :], other=0.0)
        b_tile = tl.load(b + (first + r)[None, :] * sb_r + n[:, None] * sb_n, mask=n_ok[:, None] & r_ok[None, :], other=0.0)
        acc = dot(dy_tile, rounded(b_tile, dy_tile.dtype), acc)
        part = dot(tl.trans(dy_tile), h_tile, tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32))
        out = parts + (before + r).to(tl.int64)[None, :] * so_r + n[:, None]
        tl.store(out, part, mask=n_ok[:, None] & r_ok[None, :])
    if SPLITS == 1:
        acc *= tl.load(scale + first + r, mask=r_ok, other=0.0)[None, :]
    acc = tl.where(r_ok[None, :], acc, 0.0)
    tl.store(dh + tl.program_id(1) * sg_p + rows[:, None] * sg_m + r[None, :], rounded(acc, dh.dtype.element_ty),
             mask=row_ok[:, None] & (r < width)[None, :])


@triton.jit(do_not_specialize=["count", "first", "ranks", "total", "column", "layer", "layers"])
def gather_kernel(parts, out, chunks, count, first, ranks, total, column, layer, layers, C, sp_r, so_r, so_c, TABLE: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """out[first + r, c] = Σ over a client's chunks, in order, of their parts for its layer; zero for a client without rows."""
    if TABLE:
        client = chunks + tl.program_id(0) * 4
        before, count, first, ranks = tl.load(client), tl.load(client + 1), tl.load(client + 2), tl.load(client + 3)
        column, total = before * layers + layer * ranks, layers * ranks
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (r < ranks)[:, None] & (c < C)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    part = parts + (column + r).to(tl.int64)[:, None] * sp_r + c[None, :]
    for _ in tl.range(0, count, loop_unroll_factor=8):              # eight loads on their way at once, added in the same order
        acc += tl.load(part, mask=mask, other=0.0)
        part += (tl.zeros((), dtype=tl.int64) + total) * sp_r
    tl.store(out + (first + r).to(tl.int64)[:, None] * so_r + c[None, :] * so_c, rounded(acc, out.dtype.element_ty), mask=mask)


class Piece(NamedTuple):
    """One layer's gradient: out (R, C), the layer's number, the first column of p that is the layer's, whose ranks are whose."""
    out: Tensor
    layer: int
    column: int
    of: tiles.Ranks


def _gather(parts: Tensor, pieces: Sequence[Piece], count: int, total: int, layers: int, block: int) -> None:
    """Adds the partial sums of every layer into its output, which may have any strides; all of the output is written."""
    C = parts.shape[1]
    for out, layer, column, of in pieces:
        chunks = tiles.chunk_bounds(of, block, parts.device) if of.bounds is not None else None
        grid = (1 if chunks is None else len(chunks), cdiv(min(total, out.shape[0]), 16), cdiv(C, GATHERED))
        if grid[0] and grid[1] and C:
            launch(gather_kernel, grid, (parts, out, chunks), (count, of.first, of.ranks, total, column, layer, layers),
                   (C, parts.stride(0), *out.stride()), (chunks is not None, GATHERED, 16))


def outer(p: Tensor, q: Tensor, pieces: Sequence[Piece], of: tiles.Ranks, width: int, layers: int = 1, keys: Tensor | None = None,
          dropout: float = 0.0, config: Config | None = None) -> None:
    """piece.out[rank, c] = Σ over the rows of the rank's client of p[row, piece.column + r] · dropout(q)[row, c].

    p (M, layers · width), its rows contiguous; q (M, C), any strides; outputs of any strides and dtype: dA with p = dh, q = x;
    dBᵀ with p = h, q = dy. The ranks of a client without rows get zeros.
    """
    (M, C), columns = q.shape, layers * width
    config = config or rule.blocks("outer", M, 0, C, columns, q.dtype, q.device)
    table, count, ranks = tiles.split_rows(of, M, config.block_k, q.device, width)
    parts = torch.empty(ranks * layers, C, dtype=torch.float32, device=q.device)
    if count and C and columns:
        launch(outer_kernel, (count, cdiv(C, config.block_n), cdiv(columns, config.block_r)), (p, q, parts, table, keys),
               (M, of.ranks, layers, width, round(dropout * (1 << 24)), 1.0 / (1.0 - dropout)),
               (C, p.stride(0), *q.stride(), parts.stride(0)),
               (table is not None, keys is not None, config.block_k, config.block_m, config.block_n, config.block_r),
               config.num_warps, config.num_stages)
    _gather(parts, pieces, count, width, layers, config.block_k)


def dy_pass(dy: Tensor, b: Tensor, scale: Tensor, h: Tensor, dh: Tensor, dB: Tensor, of: tiles.Ranks, width: int,
            config: Config | None = None) -> None:
    """dh (M, width) = (dy B) · scale and dB (N, R) = dyᵀ h, dy being read once. width: at most configs.ONE_PASS_RANKS."""
    M, N = dy.shape
    config = config or rule.blocks("dy_pass", M, N, 0, width, dy.dtype, dy.device)
    table, count, ranks = tiles.split_rows(of, M, config.block_m, dy.device, width)
    parts = torch.empty(ranks, N, dtype=torch.float32, device=dy.device)
    if not N:
        dh.zero_()                                                  # a sum of nothing: no kernel runs
    if count and N and width:
        splits = config.splits
        target = torch.empty(M, splits, width, dtype=torch.float32, device=dy.device) if splits > 1 else dh
        launch(dy_pass_kernel, (count, splits), (dy, b, scale, h, target, parts, table), (M, of.first, of.ranks, width),
               (N, dy.stride(0), b.stride(1), b.stride(0), h.stride(0), width if splits > 1 else 0, target.stride(0),
                parts.stride(0)),
               (table is not None, splits, config.block_m, config.block_n, config.block_r), config.num_warps, config.num_stages)
        if splits > 1:
            sum_splits(target, scale, dh, table, (count, 1), config, (M, of.first, of.ranks, 1, width, b.shape[1]))
    _gather(parts, [Piece(dB.T, 0, 0, of)], count, width, 1, config.block_m)
