"""Device functions that several kernels share: the product, the dropout mask, the ranks of the clients in a tile."""
import triton
import triton.language as tl

# The interpreter multiplies bfloat16 tiles wrongly and truncates where a GPU rounds to bfloat16: both are mended here.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Values in this dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def _mix32(z):
    z = (z ^ (z >> 16)) * 0x85EBCA6B
    z = (z ^ (z >> 13)) * 0xC2B2AE35
    return z ^ (z >> 16)


@triton.jit
def kept(keys, rows, row_ok, columns, threshold):
    """True where dropout keeps (row, column): kernels.reference.dropout_mask, in registers. keys: int64 by row."""
    key = tl.load(keys + rows, mask=row_ok, other=0)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    column = columns.to(tl.uint32) * 0x9E3779B1
    draw = _mix32(_mix32(column[None, :] ^ low[:, None]) ^ high[:, None]) >> 8
    return draw.to(tl.int32) >= threshold


@triton.jit
def row_tile(table, tile, M, first, ranks, BLOCK_M: tl.constexpr, TABLE: tl.constexpr):
    """(first row, row after the last, first rank, ranks, ranks of the tiles before) of a tile: from the table (tiles.row_tiles),
    or counted off where one client has all rows."""
    if TABLE:
        row, stop = tl.load(table + tile * 5), tl.load(table + tile * 5 + 1)
        first, ranks = tl.load(table + tile * 5 + 2), tl.load(table + tile * 5 + 3)
        before = tl.load(table + tile * 5 + 4)
    else:
        row, stop, before = tile * BLOCK_M, tl.minimum(M, tile * BLOCK_M + BLOCK_M), tile * ranks
    return row, stop, first, ranks, before


@triton.jit
def _add_ranks(acc, h, b, rows, row_ok, columns, column_ok, first, ranks, sh_m, sb_n, sb_r, BLOCK_R: tl.constexpr):
    """acc + h[rows, :ranks] b[columns, first:first + ranks]ᵀ, by steps of BLOCK_R ranks; the last one is masked, not padded."""
    for start in range(0, ranks, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_ok = r < ranks
        h_tile = tl.load(h + rows[:, None] * sh_m + r[None, :], mask=row_ok[:, None] & r_ok[None, :], other=0.0)
        b_tile = tl.load(b + columns[None, :] * sb_n + (first + r)[:, None] * sb_r, mask=r_ok[:, None] & column_ok[None, :],
                         other=0.0)
        acc = dot(h_tile, rounded(b_tile, h_tile.dtype), acc)
    return acc


@triton.jit
def low_rank(h, b, clients, spans, tile, rows, row_ok, columns, column_ok, first, ranks, layers, width, R, sh_m, sb_n, sb_r,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SEGMENTED: tl.constexpr):
    """h Bᵀ of a tile whose rows may be several clients', summed over layers.

    clients (K, 4) int32: first row, row after the last, first rank, ranks; spans (T, 2): the clients that have rows in a tile.
    A client's ranks are multiplied with the tile and kept for its own rows alone: a NaN of one never meets a row of another.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if SEGMENTED:
        for client in range(tl.load(spans + tile * 2), tl.load(spans + tile * 2 + 1)):
            low, high = tl.load(clients + client * 4), tl.load(clients + client * 4 + 1)
            first, ranks = tl.load(clients + client * 4 + 2), tl.load(clients + client * 4 + 3)
            own = row_ok & (rows >= low) & (rows < high)
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for layer in range(layers):
                part = _add_ranks(part, h + layer * width, b, rows, own, columns, column_ok, layer * R + first, ranks, sh_m, sb_n,
                                  sb_r, BLOCK_R)
            acc = tl.where(own[:, None], part, acc)
    else:
        acc = _add_ranks(acc, h, b, rows, row_ok, columns, column_ok, first, ranks, sh_m, sb_n, sb_r, BLOCK_R)
    return acc
