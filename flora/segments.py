"""Whose rows and ranks are whose: offsets of clients, frozen ranks and dropout keys, validated once and reused for every call."""
from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from flora.checks import check, check_ranks
from flora.errors import AdapterError


class HasRanks(Protocol):
    """Anything with the three tensors of an adapter."""
    @property
    def A(self) -> Tensor: ...

    @property
    def B(self) -> Tensor: ...

    @property
    def scale(self) -> Tensor: ...


class Frozen:
    """Ranks that do not train, shared by the clients of a call; validated once.

    A (F, in), B (out, F), scale (F,); ranges: for each client (start, stop) in those buffers, which may overlap; None:
    every row uses all of them. Raises AdapterError for a range outside the buffers.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: Tensor, ranges: Sequence[Sequence[int]] | Tensor | None = None):
        self.A, self.B, self.scale, self.ranges = A.detach(), B.detach(), scale.detach(), None
        if ranges is not None:
            try:
                listed = [tuple(map(index, pair)) for pair in (ranges.tolist() if isinstance(ranges, Tensor) else ranges)]
            except TypeError:                                                 # no pairs, or numbers that are no ints
                listed = None
            good = listed is not None and all(len(pair) == 2 and 0 <= pair[0] <= pair[1] <= A.shape[0] for pair in listed)
            check("frozen ranges", good, f"a pair of ints 0 <= start <= stop <= {A.shape[0]} for each client", ranges)
            self.ranges = torch.tensor(listed, dtype=torch.int64).reshape(-1, 2)


def _offsets(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """The offsets as an int64 tensor on the host, checked: K + 1 of them, first 0, never falling."""
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise AdapterError(f"{name}: expected ints on the host (a sequence or a CPU tensor); got a tensor on "
                           f"{values.device}. Keep offsets on the host: reading them there costs no synchronisation.")
    try:
        listed = [index(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError:
        listed = []
    check(name, bool(listed) and listed[0] == 0 and all(a <= b for a, b in pairwise(listed)),
          "K + 1 ints that start at 0 and never fall", values)
    return torch.tensor(listed, dtype=torch.int64)


class Segments:
    """Which rows and which ranks belong to which client, validated once and reused for every call of a cohort.

    row_offsets, rank_offsets: K + 1 ints on the host, first 0, last the number of rows or ranks. A client may have no rows.
    Raises AdapterError for offsets that fall, do not start at 0, or differ in number.
    """

    def __init__(self, row_offsets: Sequence[int] | Tensor, rank_offsets: Sequence[int] | Tensor):
        self.row_offsets, self.rank_offsets = _offsets("row_offsets", row_offsets), _offsets("rank_offsets", rank_offsets)
        if len(self.row_offsets) != len(self.rank_offsets):
            raise AdapterError(f"expected as many row_offsets as rank_offsets (clients + 1); got {len(self.row_offsets)} "
                               f"and {len(self.rank_offsets)}")
        self.num_clients = len(self.row_offsets) - 1
        rows, ranks = self.row_offsets.tolist(), self.rank_offsets.tolist()
        self.num_rows, self.num_ranks = rows[-1], ranks[-1]
        self.max_rank = max((b - a for a, b in pairwise(ranks)), default=0)


def segments_of(row_offsets: Sequence[int] | Tensor | Segments | None, rank_offsets: Sequence[int] | Tensor | None,
                rows: int, ranks: Sequence[int]) -> Segments | None:
    """The Segments that a call's offsets mean, checked against its rows and the ranks of each of its layers."""
    segments = None
    if isinstance(row_offsets, Segments):
        check("rank_offsets", rank_offsets is None, "none beside Segments, which hold them", rank_offsets)
        segments = row_offsets
    elif row_offsets is not None and rank_offsets is not None:
        segments = Segments(row_offsets, rank_offsets)
    else:
        check("offsets", row_offsets is None and rank_offsets is None, "row_offsets and rank_offsets, or neither",
              "one of the two")
    if segments is not None:                  # formatting a size makes torch.compile compile again for each: only for errors
        if segments.num_rows != rows:
            check("row_offsets", False, f"{rows} as the last (rows of x)", segments.num_rows)
        for R in ranks:
            if segments.num_ranks != R:
                check("rank_offsets", False, f"{R} as the last (ranks of A)", segments.num_ranks)
    return segments


def frozen_operand(frozen: HasRanks | Sequence[Any] | None, shape: tuple[int, int], device: torch.device,
                   segments: Segments | None) -> tuple[list[Tensor], Tensor | None]:
    """The frozen ranks of one layer as a list of tensors (empty: none) and their ranges (None: all rows use all)."""
    if frozen is None:
        return [], None
    if not isinstance(frozen, Frozen):
        given: Any = frozen
        given = (given.A, given.B, given.scale) if hasattr(given, "A") else given
        check("frozen", isinstance(given, Sequence) and len(given) in (3, 4), "a Frozen, an Adapter or (A, B, scale)", type(given))
        frozen = Frozen(*given)
    check_ranks("frozen", (frozen.A, frozen.B, frozen.scale), shape, device)
    if frozen.ranges is not None:
        clients = segments.num_clients if segments else 1
        check("frozen ranges", frozen.ranges.shape[0] == clients, f"{clients} pairs, one a client", frozen.ranges.shape[0])
    return [frozen.A, frozen.B, frozen.scale.float()], frozen.ranges


def sent_to(device: torch.device, t: Tensor) -> Tensor:
    """A CPU tensor on a device, for which nothing waits: through memory that a GPU reads by itself."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def row_keys(*parts: int | Tensor) -> Tensor:
    """Mixes ints and int64 tensors (broadcast together) into keys for dropout: (client, step, sequence, position).

    Returns int64 of the broadcast shape. Each part goes through SplitMix64's finaliser: neighbours' keys are unrelated.
    """
    def mix(z: Tensor) -> Tensor:
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        number = part if isinstance(part, Tensor) else (part + (1 << 63)) % (1 << 64) - (1 << 63)       # as int64
        state = mix(state + number - 0x61C8864680B583EB)
    return state


def keys_of(seed: int | Tensor | None, rows: int, device: torch.device) -> Tensor:
    """int64 (M,) keys of the rows: given, or derived from a seed and the row's number.

    Without a seed one is drawn where x is, by that device's generator: torch.manual_seed repeats it, and nothing waits for a copy.
    """
    if isinstance(seed, Tensor) and seed.dim() > 0:
        check("seed", tuple(seed.shape) == (rows,) and seed.dtype == torch.int64, f"int64 keys ({rows},), one a row of x",
              f"{seed.dtype} {tuple(seed.shape)}")
        return seed.to(device)
    if seed is None:
        seed = torch.randint(1 << 62, (), device=device)
    check("seed", isinstance(seed, int) or (isinstance(seed, Tensor) and seed.dtype == torch.int64),
          "an int, an int64 tensor or None", seed)
    part = seed.to(device) if isinstance(seed, Tensor) else seed
    return row_keys(part, torch.arange(rows, device=device))
