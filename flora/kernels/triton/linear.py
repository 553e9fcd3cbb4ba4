"""y = x Wᵀ + bias + h Bᵀ in one accumulator, and y += h Bᵀ on top of a base product.

The tiling. A program owns a tile of y, (BLOCK_M, BLOCK_N), and its sum stays in registers: first the ranks, h Bᵀ in steps of
BLOCK_R, then the base product over K in steps of BLOCK_K, then the bias; y is written once and never read. The skinny product
h = (x Aᵀ) · scale comes before, from its own pass over x (shrink.py): formed inside, every column tile would repeat it.

The ranks come first because two things are done to them alone: dropout of the backward pass masks them (dx = dy W +
mask · (dh A)), and in a batch of clients each client's part is kept for its own rows. A tile may hold rows of several clients;
it reads which from a table (tiles.spans), loops over them, and loops over the ranks that each has: nothing is padded to the
largest rank, and no client waits for a tile of its own.

The same kernel is dx = dy W + dh A, with W and A as their transposes: strides, not copies. Programs walk down GROUP rows of
tiles before they go right, so that the tiles of W and of x that they share are still in the L2 cache.
"""
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.triton import rule, tiles
from flora.kernels.triton.common import dot, kept, low_rank, rounded
from flora.kernels.triton.configs import Config
from flora.kernels.triton.launch import cdiv, launch

GROUP = tl.constexpr(8)


@triton.jit
def _tile_of(pid, tiles_m, tiles_n):
    """(row of tiles, column of tiles) of a program: GROUP rows at a time, column by column."""
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = pid - group * GROUP * tiles_n
    return group * GROUP + inside % height, inside // height


@triton.jit(do_not_specialize=["M", "first", "ranks", "layers", "width", "R", "f_first", "f_ranks", "threshold"])
def linear_kernel(x, w, bias, y, h, b, hf, bf, clients, spans, f_clients, keys, M, first, ranks, layers, width, R, f_first, f_ranks,
                  threshold, grow, N, K, sx_m, sx_k, sw_n, sw_k, sy_m, sh_m, sb_n, sb_r, sf_m, sg_n, sg_r, BASE: tl.constexpr,
                  BIAS: tl.constexpr, SEGMENTED: tl.constexpr, FROZEN: tl.constexpr, F_SEGMENTED: tl.constexpr,
                  DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  BLOCK_R: tl.constexpr):
    """One tile of y: written where there is a BASE product, added to where there is none."""
    tile, column = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < M, columns < N
    acc = low_rank(h, b, clients, spans, tile, rows, row_ok, columns, column_ok, first, ranks, layers, width, R, sh_m, sb_n, sb_r,
                   BLOCK_M, BLOCK_N, BLOCK_R, SEGMENTED)
    if DROPOUT:
        acc = tl.where(kept(keys, rows, row_ok, columns, threshold), acc * grow, 0.0)
    if FROZEN:
        acc += low_rank(hf, bf, f_clients, spans, tile, rows, row_ok, columns, column_ok, f_first, f_ranks, 1, 0, 0, sf_m, sg_n,
                        sg_r, BLOCK_M, BLOCK_N, BLOCK_R, F_SEGMENTED)
    if BASE:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_ok = k < K
            far = k.to(tl.int64)                                   # x and w may span more elements than 32 bits count
            x_tile = tl.load(x + rows[:, None] * sx_m + far[None, :] * sx_k, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            w_tile = tl.load(w + columns[None, :].to(tl.int64) * sw_n + far[:, None] * sw_k,
                             mask=k_ok[:, None] & column_ok[None, :], other=0.0)
            acc = dot(x_tile, rounded(w_tile, x_tile.dtype), acc)
    if BIAS:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    out = y + rows[:, None] * sy_m + columns[None, :]
    mask = row_ok[:, None] & column_ok[None, :]
    if not BASE:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, rounded(acc, y.dtype.element_ty), mask=mask)


def add_low_rank(y: Tensor, h: Tensor, b: Tensor, of: tiles.Ranks, width: int, layers: int = 1, *, x: Tensor | None = None,
                 w: Tensor | None = None, bias: Tensor | None = None, frozen: tuple[Tensor, Tensor, tiles.Ranks] | None = None,
                 keys: Tensor | None = None, dropout: float = 0.0, config: Config | None = None) -> Tensor:
    """y = x wᵀ + bias + mask · (h bᵀ) + frozen, or y += the same where x is None.

    y (M, N) with contiguous rows; h (M, layers · width), rows contiguous; b (N, layers · R), any strides; x (M, K), w (N, K).
    frozen: (h of the frozen ranks, their B, their Ranks). keys, dropout: the mask is on h bᵀ alone (backward).
    """
    (M, N), device = y.shape, y.device
    if M == 0 or N == 0:
        return y
    hf, bf, f_of = frozen or (None, None, tiles.Ranks(None, None, 0, 0))
    segmented, f_segmented = of.bounds is not None, f_of.bounds is not None
    K = 0 if x is None else x.shape[1]
    if config is None:
        parts = segmented or keys is not None or frozen is not None
        turned = w is not None and w.stride(1) != 1
        config = rule.blocks(("expand" if x is None else "linear") + ("_parts" if parts else ""), M, N, K,
                             width if segmented else of.ranks, y.dtype, device, turned)
    spans = tiles.spans(of if segmented else f_of, config.block_m, device) if segmented or f_segmented else None
    (sx, sw, sh, sb, sf, sg) = ((0, 0) if t is None else t.stride() for t in (x, w, h, b, hf, bf))
    launch(linear_kernel, (cdiv(M, config.block_m) * cdiv(N, config.block_n),),
           (x, w, bias, y, h, b, hf, bf, tiles.clients(of, device) if segmented else None, spans,
            tiles.clients(f_of, device) if f_segmented else None, keys),
           (M, of.first, of.ranks, layers, width, b.shape[1] // layers, f_of.first, f_of.ranks, round(dropout * (1 << 24)),
            1.0 / (1.0 - dropout)),
           (N, K, *sx, *sw, y.stride(0), sh[0], *sb, sf[0], *sg),
           (x is not None, bias is not None, segmented, frozen is not None, f_segmented, keys is not None, config.block_m,
            config.block_n, config.block_k or 16, config.block_r), config.num_warps, config.num_stages)
    return y
