"""h = (dropout(x) Aᵀ) · scale: the skinny pass, for one adapter, for clients, and for several layers that read the same x.

The rows of a tile are one client's. Layers share the pass: column j of h is rank j mod width of layer j div width, so the x
tile is read once for all of them. Where rows are few, K is split over programs; their partial sums are added in order.
The same kernel gives dh = (dy B) · scale, with Bᵀ as A.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.triton import rule, tiles
from flora.kernels.triton.common import dot, kept, rounded, row_tile
from flora.kernels.triton.configs import Config
from flora.kernels.triton.launch import cdiv, launch


@triton.jit(do_not_specialize=["M", "first", "ranks", "layers", "width", "R", "threshold"])
def shrink_kernel(x, A, scale, h, table, keys, M, first, ranks, layers, width, R, threshold, grow, K, sx_m, sx_k, sa_r, sa_k, sh_p,
                  sh_m, TABLE: tl.constexpr, DROPOUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """One tile (BLOCK_M rows, BLOCK_R columns) of h, over one of SPLITS parts of K."""
    row, stop, first, ranks, _ = row_tile(table, tl.program_id(0), M, first, ranks, BLOCK_M, TABLE)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_ok = rows < stop
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    layer = columns // width
    rank = columns - layer * width
    column_ok = (rank < ranks) & (layer < layers)
    a_rows = layer * R + first + rank
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    step = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    begin = tl.program_id(2) * step
    for start in range(begin, tl.minimum(begin + step, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < K
        x_tile = tl.load(x + rows[:, None] * sx_m + k.to(tl.int64)[None, :] * sx_k, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        if DROPOUT:
            keep = kept(keys, rows, row_ok, k, threshold)
            x_tile = rounded(tl.where(keep, x_tile.to(tl.float32) * grow, 0.0), x_tile.dtype)
        a_tile = tl.load(A + a_rows[None, :] * sa_r + k[:, None] * sa_k, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        acc = dot(x_tile, rounded(a_tile, x_tile.dtype), acc)
    if SPLITS == 1:
        acc *= tl.load(scale + a_rows, mask=column_ok, other=0.0)[None, :]
    acc = tl.where(column_ok[None, :], acc, 0.0)                # 0 · NaN is NaN: what no one owns is written as zero
    out = h + tl.program_id(2) * sh_p + rows[:, None] * sh_m + columns[None, :]
    tl.store(out, rounded(acc, h.dtype.element_ty), mask=row_ok[:, None] & (layer < layers)[None, :])


@triton.jit(do_not_specialize=["M", "first", "ranks", "layers", "width", "R"])
def sum_splits_kernel(parts, scale, h, table, M, first, ranks, layers, width, R, sp_p, sp_m, sh_m, TABLE: tl.constexpr,
                      SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """h = (Σ parts) · scale, the parts in their order."""
    row, stop, first, ranks, _ = row_tile(table, tl.program_id(0), M, first, ranks, BLOCK_M, TABLE)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    layer = columns // width
    rank = columns - layer * width
    mask = (rows < stop)[:, None] & (layer < layers)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for part in range(SPLITS):
        acc += tl.load(parts + part * sp_p + rows[:, None] * sp_m + columns[None, :], mask=mask, other=0.0)
    acc *= tl.load(scale + layer * R + first + rank, mask=(rank < ranks) & (layer < layers), other=0.0)[None, :]
    tl.store(h + rows[:, None] * sh_m + columns[None, :], rounded(acc, h.dtype.element_ty), mask=mask)


def shrink(x: Tensor, A: Tensor, scale: Tensor, of: tiles.Ranks, width: int, layers: int = 1, keys: Tensor | None = None,
           dropout: float = 0.0, out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """(dropout(x) Aᵀ) · scale as (M, layers · width) in x's dtype.

    x (M, K), A (layers · R, K), scale fp32 (layers · R,), any strides. A client's ranks fill the columns from its layer's first
    on; the columns after them are zero.
    """
    (M, K), columns = x.shape, layers * width
    h = x.new_empty(M, columns) if out is None else out
    if M == 0 or columns == 0:
        return h
    config = config or rule.blocks("shrink", M, 0, K, columns, x.dtype, x.device)
    table, grid_m = tiles.split_rows(of, M, config.block_m, x.device)[:2]
    grid, split = (grid_m, cdiv(columns, config.block_r), config.splits), config.splits > 1
    target = torch.empty(M, config.splits, columns, dtype=torch.float32, device=x.device) if split else h
    launch(shrink_kernel, grid, (x, A, scale, target, table, keys),
           (M, of.first, of.ranks, layers, width, A.shape[0] // layers, round(dropout * (1 << 24)), 1.0 / (1.0 - dropout)),
           (K, *x.stride(), *A.stride(), columns if split else 0, target.stride(0)),
           (table is not None, keys is not None, config.splits, config.block_m, config.block_k, config.block_r), config.num_warps,
           config.num_stages)
    if split:
        sum_splits(target, scale, h, table, grid, config, (M, of.first, of.ranks, layers, width, A.shape[0] // layers))
    return h


def sum_splits(parts: Tensor, scale: Tensor, h: Tensor, table: Tensor | None, grid: tuple[int, ...], config: Config,
               numbers: tuple[int, ...]) -> None:
    """h = (Σ parts) · scale; parts (M, splits, columns) fp32, tiled as the kernel that wrote them; numbers: M, first, ranks,
    layers, width and R."""
    launch(sum_splits_kernel, grid[:2], (parts, scale, h, table), numbers, (parts.stride(1), parts.stride(0), h.stride(0)),
           (table is not None, config.splits, config.block_m, config.block_r))
