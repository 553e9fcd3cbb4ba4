"""Block sizes of the kernels: what is shipped, and which of it a shape gets that no table has (rule.py).

All of it is compiled ahead of time for every card (make aot), so that nothing here spills or outgrows a card's shared memory.
"""
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows, output columns, inner columns, ranks), parts that K is split into, warps, pipeline stages, the oldest
    architecture (compute capability times ten) that it is for, and the bytes of shared memory that a block takes where they are
    more than the 99 KiB that every such card gives (make aot holds both to what the compiler says). Of "outer", block_k is the
    rows of one partial sum: fewer are more parts to write, more are fewer programs."""
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    block_r: int = 16
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    arch: int = 80
    shared: int = 0


# Kernel -> its configurations that the rules below choose from, the first for few rows and for fp32. "_parts": calls with
# clients, dropout or frozen ranks, which hold a tile's sums twice.
SHIPPED = {
    "shrink": (Config(32, 0, 64, 16, 4), Config(64, 0, 128, 16), Config(64, 0, 64, 64), Config(128, 0, 64, 16),
               Config(128, 0, 64, 64), Config(128, 0, 64, 128, num_warps=8, num_stages=2),
               Config(128, 0, 64, 128, num_warps=8, shared=131_072)),
    "linear": (Config(32, 64, 32, 16), Config(64, 64, 64, 16), Config(128, 128, 64, 16, num_warps=8),
               Config(128, 128, 64, 64, num_warps=8), Config(128, 256, 64, 16, num_warps=8, arch=90, shared=147_456)),
    "linear_parts": (Config(32, 32, 32, 16, num_warps=8), Config(64, 64, 64, 16), Config(128, 64, 64, 16, num_warps=8),
                     Config(128, 128, 64, 16, num_warps=8, arch=90)),
    "expand": (Config(32, 64, 0, 16, num_warps=8, num_stages=2), Config(64, 128, 0, 16, num_stages=2),
               Config(64, 128, 0, 64, num_warps=8, num_stages=2)),
    "expand_parts": (Config(64, 32, 0, 16, num_warps=8, num_stages=2), Config(64, 64, 0, 16, num_stages=2),
                     Config(64, 64, 0, 64, num_warps=8, num_stages=2)),
    "outer": (Config(32, 64, 1024, 16, num_stages=2), Config(64, 128, 1024, 16), Config(64, 128, 1024, 64, num_warps=8)),
    "dy_pass": (Config(32, 64, 0, 16, 2, num_stages=2), Config(128, 64, 0, 16, num_warps=8, num_stages=2),
                Config(128, 64, 0, 32, num_warps=8, num_stages=2)),
}
# More of them, which a shape gets only where `flora tune` found them faster.
TRIED = {
    "shrink": (Config(64, 0, 128, 16, num_stages=4), Config(64, 0, 64, 16, num_stages=4),
               Config(128, 0, 128, 16, num_warps=8, shared=118_784), Config(128, 0, 64, 64, num_warps=8)),
    "linear": (Config(128, 128, 64, 16, num_warps=8, num_stages=4, shared=131_072),
               Config(128, 256, 64, 16, num_warps=8, num_stages=4, arch=90, shared=196_608),
               Config(256, 128, 64, 16, num_warps=8, arch=90, shared=147_456),
               Config(256, 128, 64, 16, num_warps=8, num_stages=4, arch=90, shared=196_608)),
    "linear_parts": (Config(128, 128, 64, 16, num_warps=8, num_stages=4, arch=90, shared=131_072),
                     Config(128, 64, 64, 16, num_warps=8, num_stages=4)),
    "expand": (Config(128, 64, 0, 16, num_warps=8, num_stages=2), Config(64, 64, 0, 16, num_stages=2),
               Config(128, 128, 0, 16, num_warps=8, num_stages=2), Config(64, 256, 0, 16, num_warps=8, num_stages=2)),
    "expand_parts": (Config(64, 128, 0, 16, num_warps=8, num_stages=2), Config(128, 64, 0, 16, num_warps=8, num_stages=2)),
    "outer": (Config(64, 128, 512, 16), Config(64, 128, 2048, 16), Config(64, 128, 1024, 16, num_stages=4),
              Config(128, 64, 1024, 16), Config(64, 128, 512, 64, num_warps=8)),
    "dy_pass": (Config(64, 128, 0, 16), Config(128, 128, 0, 16, num_warps=8, shared=126_976), Config(128, 64, 0, 16, num_warps=8),
                Config(256, 64, 0, 16, num_warps=8, shared=118_784), Config(128, 128, 0, 32, num_warps=8, shared=155_648),
                Config(64, 128, 0, 32, num_warps=8, shared=102_400)),
}
# Columns of the partial sums that a program adds up: few, since a program's loop over the parts is what takes long.
GATHERED = 32
# Ranks up to which one pass over dy for dh and dB writes fewer bytes of partial sums than a second pass would read.
ONE_PASS_RANKS = 32


def arch_of(device: torch.device) -> int:
    """Compute capability times ten; that of an H100 under the interpreter, which has every configuration."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_of(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; those of an H100 under the interpreter."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232_448


def fits(config: Config, device: torch.device) -> bool:
    """Whether a card is new enough for a configuration and has the shared memory that it takes."""
    return config.arch <= arch_of(device) and (not config.shared or config.shared <= shared_of(device))


def _small(M: int, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or M < 64


def _by_rank(kernel: str, M: int, columns: int, dtype: torch.dtype) -> Config:
    """The first configuration for few rows and for fp32 (whose tiles are twice as large), else the smallest that holds the
    ranks of a tile, with taller tiles from 2,048 rows on."""
    shipped = SHIPPED[kernel]
    if _small(M, dtype):
        return shipped[0]
    fitting = [config for config in shipped[1:] if config.block_r >= min(columns, 64)]
    tall = [config for config in fitting if config.block_m >= 128] if M >= 2048 else []
    return min(tall or fitting, key=lambda c: (c.block_r, c.block_m))


def _splits(tiles: int, steps: int, device: torch.device) -> int:
    """Parts of a loop of so many steps that give two programs a multiprocessor: of at least four steps, eight parts at most."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(2 * processors // max(1, tiles), 8, steps // 4))


def shrink_config(M: int, K: int, columns: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Splits K where the tiles of h are fewer than the card's multiprocessors want."""
    config = _by_rank("shrink", M, columns, dtype)
    if columns > 64 and config.block_r == 64:
        config = next(c for c in reversed(SHIPPED["shrink"]) if fits(c, device))
    tiles = -(-M // config.block_m) * -(-columns // config.block_r)
    return replace(config, splits=_splits(tiles, K // config.block_k, device))


def linear_config(M: int, N: int, ranks: int, dtype: torch.dtype, parts: bool, device: torch.device) -> Config:
    """The largest tile that fills the card: the widest from 2,048 columns on."""
    shipped = SHIPPED["linear_parts" if parts else "linear"]
    if _small(M, dtype) or M < 1024:
        return shipped[0 if _small(M, dtype) else 1]
    wide = shipped[-1] if N >= 2048 and fits(shipped[-1], device) else shipped[2]
    return shipped[3] if not parts and ranks > 64 else wide


def expand_config(M: int, ranks: int, dtype: torch.dtype, parts: bool) -> Config:
    return _by_rank("expand_parts" if parts else "expand", M, ranks, dtype)


def outer_config(M: int, ranks: int, dtype: torch.dtype) -> Config:
    return _by_rank("outer", M, ranks, dtype)


def dy_pass_config(M: int, N: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Config:
    """For at most ONE_PASS_RANKS ranks; a tile holds all of them. Splits N where the tiles of rows are few."""
    fitting = [c for c in SHIPPED["dy_pass"] if c.block_r >= ranks and (c.block_m < 64) == _small(M, dtype)]
    config = fitting[0] if fitting else SHIPPED["dy_pass"][-1]
    return replace(config, splits=_splits(-(-M // config.block_m), N // config.block_n, device))


def default(kernel: str, M: int, N: int, K: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Config:
    """What a kernel gets for a shape that no table has."""
    kind, parts = kernel.removesuffix("_parts"), kernel.endswith("_parts")
    if kind == "shrink":
        return shrink_config(M, K, ranks, dtype, device)
    if kind == "linear":
        return linear_config(M, N, ranks, dtype, parts, device)
    if kind == "expand":
        return expand_config(M, ranks, dtype, parts)
    return outer_config(M, ranks, dtype) if kind == "outer" else dy_pass_config(M, N, ranks, dtype, device)


def candidates(kernel: str, M: int, N: int, K: int, ranks: int, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """What is worth measuring for a 16-bit shape: the default first, then all that the card has and that no tile of which is more
    than half empty; where a loop can be cut, in one, two, four and eight parts."""
    chosen = default(kernel, M, N, K, ranks, dtype, device)
    found = [chosen]
    for config in (*SHIPPED[kernel], *TRIED[kernel]):
        roomy = config.block_r > 2 * max(ranks, 8) or config.block_m > 2 * M or config.block_n > 2 * max(N, K)
        short = kernel == "dy_pass" and config.block_r < ranks
        small = M >= 2048 and config.block_m < 64
        if roomy or short or small or not fits(config, device):
            continue
        steps = {"shrink": K // max(1, config.block_k), "dy_pass": N // max(1, config.block_n)}.get(kernel, 0)
        found += [replace(config, splits=n) for n in (1, 2, 4, 8) if n == 1 or steps >= 2 * n]
    return list(dict.fromkeys(found))
