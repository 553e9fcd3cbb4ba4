"""Host-built tables that tell a kernel whose rows and ranks a tile has; built once per cohort and kept with its offsets."""
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT = WeakTensorKeyDictionary()


class Ranks(NamedTuple):
    """Which ranks the rows of a call see: one range for all (first, ranks), or each client its own, by row_offsets.

    bounds: int64 (K, 2) on the host, the first rank and the rank after the last of every client; None: one range.
    """
    row_offsets: Tensor | None
    bounds: Tensor | None
    first: int
    ranks: int


def training_ranks(row_offsets: Tensor | None, rank_offsets: Tensor | None, R: int) -> Ranks:
    """The ranks that train: rank_offsets[k]:rank_offsets[k + 1] for client k."""
    if row_offsets is None:
        return Ranks(None, None, 0, R)
    return Ranks(row_offsets, _kept(row_offsets, ("bounds",), rank_offsets, lambda: torch.stack(
        (rank_offsets[:-1], rank_offsets[1:]), dim=1)), 0, R)


def frozen_ranks(row_offsets: Tensor | None, ranges: Tensor | None, F: int) -> Ranks:
    """The frozen ranks that a client's rows see: its range, or all of them."""
    if ranges is None:
        return Ranks(None, None, 0, F)
    if row_offsets is None:
        start, stop = ranges[0].tolist()
        return Ranks(None, None, start, stop - start)
    key = ("ranges", *ranges.flatten().tolist())              # by value: a call may bring equal ranges in a tensor of its own
    return Ranks(row_offsets, _kept(row_offsets, key, None, lambda: ranges), 0, F)


def _kept(owner: Tensor, key: tuple, other: Tensor | None, build):
    """build(), remembered with the offsets it belongs to for as long as they live."""
    entries = _KEPT.setdefault(owner, {})
    entry = entries.get((*key, id(other)))
    if entry is None:
        entry = entries[(*key, id(other))] = (other, build())      # holding `other` keeps its id its own
    return entry[1]


def _listed(of: Ranks) -> list[tuple[int, int, int, int]]:
    """(first row, row after the last, first rank, ranks) of every client."""
    rows = of.row_offsets.tolist()
    return [(a, b, first, stop - first) for a, b, (first, stop) in zip(rows, rows[1:], of.bounds.tolist(), strict=False)]


def _on(device: torch.device, rows: list[tuple[int, ...]], columns: int) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


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
    return _kept(of.row_offsets, ("tiles", block, device), of.bounds, build)


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
    return _kept(of.row_offsets, ("chunks", block, device), of.bounds, build)


def clients(of: Ranks, device: torch.device) -> Tensor:
    """int32 (K, 4): first row, row after the last, first rank, ranks of every client."""
    return _kept(of.row_offsets, ("clients", device), of.bounds, lambda: _on(device, _listed(of), 4))


def spans(of: Ranks, block: int, device: torch.device) -> Tensor:
    """int32 (T, 2): the first client with rows in a tile of `block` rows of all, and the client after the last."""
    def build() -> Tensor:
        rows = of.row_offsets.tolist()
        starts = torch.arange(0, max(rows[-1], 1), block)
        low = torch.searchsorted(of.row_offsets[1:].contiguous(), starts, right=True)
        high = torch.searchsorted(of.row_offsets[:-1].contiguous(), torch.clamp(starts + block, max=rows[-1]), right=False)
        return _on(device, torch.stack((low, high), dim=1).tolist(), 2)
    return _kept(of.row_offsets, ("spans", block, device), None, build)
