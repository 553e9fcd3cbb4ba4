"""Block sizes of the kernels: what is shipped, and which of it a shape gets.

SHIPPED is compiled ahead of time for every card (make aot), so that nothing here spills or outgrows a card's shared memory.
"""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows, output columns, inner columns, ranks), parts that K is split into, warps and pipeline stages."""
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    block_r: int = 16
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


# Kernel -> its configurations. The first of each is the one for few rows, and for fp32.
SHIPPED = {
    "shrink": (Config(32, 0, 64, 16, 4), Config(64, 0, 128, 16), Config(64, 0, 128, 64), Config(128, 0, 64, 16),
               Config(128, 0, 64, 64), Config(128, 0, 64, 128, num_warps=8)),
    "linear": (Config(32, 64, 32, 16), Config(64, 64, 64, 16), Config(128, 128, 64, 16, num_warps=8),
               Config(128, 256, 64, 16, num_warps=8), Config(128, 128, 64, 64, num_warps=8)),
    "expand": (Config(32, 64, 0, 16, num_stages=2), Config(64, 128, 0, 16, num_stages=2), Config(64, 128, 0, 64, num_stages=2)),
    "outer": (Config(32, 64, 0, 16, num_stages=2), Config(64, 128, 0, 16), Config(64, 128, 0, 64, num_warps=8)),
    "dy_pass": (Config(32, 64, 0, 16, num_stages=2), Config(128, 64, 0, 16, num_warps=8, num_stages=2),
                Config(128, 64, 0, 32, num_warps=8, num_stages=2)),
}
# Rows of one partial sum of dA and dB: fewer rows are more parts to write, more rows are fewer programs.
CHUNK_ROWS = 1024
# Ranks up to which one pass over dy for dh and dB writes fewer bytes of partial sums than a second pass would read.
ONE_PASS_RANKS = 32


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _fits(config: Config, columns: int) -> bool:
    return config.block_r >= columns or config.block_r >= 64


def _choose(kernel: str, M: int, columns: int, dtype: torch.dtype, large: int = 2048) -> Config:
    """The first configuration for few rows and for fp32 (whose tiles are twice as large), else the smallest that holds the
    ranks of a tile, with taller tiles from `large` rows on."""
    shipped = SHIPPED[kernel]
    if dtype == torch.float32 or M < 64:
        return shipped[0]
    fitting = [config for config in shipped[1:] if _fits(config, columns)]
    tall = [config for config in fitting if config.block_m >= 128] if large <= M else []
    return min(tall or fitting, key=lambda c: (c.block_r, c.block_m))


def shrink_config(M: int, K: int, columns: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Splits K until there are two tiles a multiprocessor, in parts of at least four steps."""
    config = _choose("shrink", M, columns, dtype)
    tiles = -(-M // config.block_m) * -(-columns // config.block_r)
    wanted = max(1, 2 * _multiprocessors(device) // tiles)
    splits = max(1, min(wanted, config.splits if device.type == "cpu" else 8, K // (4 * config.block_k)))
    return Config(**{**config.__dict__, "splits": splits})


def linear_config(M: int, N: int, ranks: int, dtype: torch.dtype, segmented: bool) -> Config:
    """Tiles that hold two clients' sums at once (segmented) must be 128 columns wide at most, or they spill."""
    if dtype == torch.float32 or M < 64:
        return SHIPPED["linear"][0]
    if M < 1024:
        return SHIPPED["linear"][1]
    return SHIPPED["linear"][2 if segmented or N < 2048 else 3]


def expand_config(M: int, ranks: int, dtype: torch.dtype) -> Config:
    return _choose("expand", M, ranks, dtype)


def outer_config(M: int, ranks: int, dtype: torch.dtype) -> Config:
    return _choose("outer", M, ranks, dtype)


def dy_pass_config(M: int, ranks: int, dtype: torch.dtype) -> Config:
    fitting = [c for c in SHIPPED["dy_pass"][1:] if c.block_r >= ranks]
    return SHIPPED["dy_pass"][0] if dtype == torch.float32 or M < 64 or not fitting else fitting[0]
