"""Host-built tables that tell a kernel whose rows and ranks a tile has; built once per cohort and kept with its offsets."""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flora.errors import BackendError

_KEPT = WeakTensorKeyDictionary()


class Ranks(NamedTuple):
    """Which ranks the rows of a call see: one range for all (first, ranks), or each client its own, by row_offsets.

    bounds: int64 (K, 2) on the host, the first rank and the rank after the last of every client; None: one range.
    tables: what was built of them, kept for as long as the offsets live.
    """
    row_offsets: Tensor | None
    bounds: Tensor | None
    first: int
    ranks: int
    tables: dict[tuple[Any, ...], Any] | None = None


def training_ranks(row_offsets: Tensor | None, rank_offsets: Tensor | None, R: int) -> Ranks:
    """The ranks that train: rank_offsets[k]:rank_offsets[k + 1] for client k."""
    if row_offsets is None:
        return Ranks(None, None, 0, R)
    entries = _KEPT.setdefault(row_offsets, {})
    kept = entries.get(id(rank_offsets))
    if kept is None:                                              # holding rank_offsets keeps its id its own
        bounds = torch.stack((rank_offsets[:-1], rank_offsets[1:]), dim=1)
        kept = entries[id(rank_offsets)] = (rank_offsets, bounds, {})
    return Ranks(row_offsets, kept[1], 0, R, kept[2])             # not kept itself: it holds the key, which would never be freed


def frozen_ranks(row_offsets: Tensor | None, ranges: Tensor | None, F: int) -> Ranks:
    """The frozen ranks that a client's rows see: its range, or all of them."""
    if ranges is None:
        return Ranks(None, None, 0, F)
    if row_offsets is None:
        start, stop = ranges[0].tolist()
        return Ranks(None, None, start, stop - start)
    key = tuple(ranges.flatten().tolist())                    # by value: a call may bring equal ranges in a tensor of its own
    return Ranks(row_offsets, ranges, 0, F, _KEPT.setdefault(row_offsets, {}).setdefault(key, {}))


def _kept(of: Ranks, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
    """build(), remembered with the offsets for as long as they live."""
    found = of.tables.get(key)
    if found is None:
        found = of.tables[key] = build()
    return found


def _listed(of: Ranks) -> list[tuple[int, int, int, int]]:
    """(first row, row after the last, first rank, ranks) of every client."""
    rows = of.row_offsets.tolist()
    return [(a, b, first, stop - first) for a, b, (first, stop) in zip(rows, rows[1:], of.bounds.tolist(), strict=False)]


def _on(device: torch.device, rows: list[tuple[int, ...]], columns: int) -> Tensor:
    """The rows as int32 on a device. Nothing waits for the copy; a CUDA graph would repeat it from memory long freed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError("expected offsets that were used before a CUDA graph is captured, their tables being built at the first "
                           "call; got new ones. Call once with the same Segments before the capture.")
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)
    return table.to(device) if device.type == "cpu" or not rows else table.pin_memory().to(device, non_blocking=True)


class Tiles(NamedTuple):
    """The row tiles of a call: the table that kernels read, how many there are, and Σ ranks over them."""
    table: Tensor
    count: int
    ranks: int


def row_tiles(of: Ranks, block: int, device: torch.device) -> Tiles:
    """int32 (T, 5): tiles of at most `block` rows, each of one client: first row, row after the last, first rank, ranks, and the
    ranks of the tiles before it, which is where its partial sums begin."""
    def build() -> Tiles:
        rows, before = [], 0
        for a, b, first, ranks in _listed(of):
            for row in range(a, b, block):
                rows.append((row, min(b, row + block), first, ranks, before))
                before += ranks
        return Tiles(_on(device, rows, 5), len(rows), before)
    return _kept(of, ("tiles", block, device), build)


def split_rows(of: Ranks, M: int, block: int, device: torch.device, ranks: int = 0) -> tuple[Tensor | None, int, int]:
    """(table or None, how many, Σ of their ranks) of tiles of `block` rows; ranks: of every tile where there are no clients."""
    if of.bounds is not None:
        return row_tiles(of, block, device)
    count = -(-M // block)
    return None, count, count * ranks


def chunk_bounds(of: Ranks, block: int, device: torch.device) -> Tensor:
    """int32 (K, 4): where a client's partial sums begin (the ranks of the row tiles before its own), how many row tiles it has,
    its first rank, its ranks."""
    def build() -> Tensor:
        rows, before = [], 0
        for a, b, first, ranks in _listed(of):
            count = -(-(b - a) // block)
            rows.append((before, count, first, ranks))
            before += count * ranks
        return _on(device, rows, 4)
    return _kept(of, ("chunks", block, device), build)


def clients(of: Ranks, device: torch.device) -> Tensor:
    """int32 (K, 4): first row, row after the last, first rank, ranks of every client."""
    return _kept(of, ("clients", device), lambda: _on(device, _listed(of), 4))


def spans(of: Ranks, block: int, device: torch.device) -> Tensor:
    """int32 (T, 2): the first client with rows in a tile of `block` rows of all, and the client after the last."""
    def build() -> Tensor:
        rows = of.row_offsets.tolist()
        starts = torch.arange(0, max(rows[-1], 1), block)
        low = torch.searchsorted(of.row_offsets[1:].contiguous(), starts, right=True)
        high = torch.searchsorted(of.row_offsets[:-1].contiguous(), torch.clamp(starts + block, max=rows[-1]), right=False)
        return _on(device, torch.stack((low, high), dim=1).tolist(), 2)
    return _kept(of, ("spans", block, device), build)
