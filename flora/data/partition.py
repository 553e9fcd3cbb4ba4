"""Deal rows to clients: by person, evenly, or with skewed labels. The same seed gives the same clients everywhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora.errors import DataError
from flora.seeds import derive

Row = dict[str, Any]
_DRAWS = 20  # of a Dirichlet partition, before it is called impossible


@dataclass(frozen=True)
class Partition:
    """A rule, exactly one of four: `by` a column, `iid`, `dirichlet_alpha` or `shards`; the last two need `label`.

    by="sender": one client per value of the column, those with the most rows. iid: evenly, at random.
    dirichlet_alpha: each label's rows are dealt in proportions drawn from a symmetric Dirichlet over the clients, whose
    sizes so differ too (Yurochkin et al., arXiv 1905.12022); small is skewed. With equal_sizes every client has as many
    rows, and draws its own labels' shares from Dirichlet(alpha * shares of all) (Hsu et al., arXiv 1909.06335).
    shards: rows sorted by label, cut, that many shards a client (McMahan et al., arXiv 1602.05629).
    """

    by: str | None = None
    iid: bool = False
    dirichlet_alpha: float | None = None
    label: str | None = None
    shards: int | None = None
    equal_sizes: bool = False

    def __post_init__(self) -> None:
        rules = ("by", "iid", "dirichlet_alpha", "shards")
        given = [name for name in rules if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise DataError(
                f"a partition has exactly one rule, {len(given)} came ({', '.join(given) or 'none'}); "
                f"give one of {', '.join(rules)}"
            )
        if given[0] in ("dirichlet_alpha", "shards") and self.label is None:
            raise DataError(f"the rule {given[0]} needs label: the column whose values are to be skewed")
        if self.dirichlet_alpha is not None and not 0 < self.dirichlet_alpha < math.inf:
            raise DataError(f"dirichlet_alpha should be above 0 and finite, it is {self.dirichlet_alpha}")
        if self.equal_sizes and self.dirichlet_alpha is None:
            raise DataError(f"equal_sizes goes with dirichlet_alpha, {given[0]} came; the other rules need it not: leave it out")
        if self.shards is not None and self.shards < 1:
            raise DataError(f"shards should be at least 1, it is {self.shards}")


def partition(rows: Sequence[Row], num_clients: int, spec: Partition, seed: int) -> dict[str, list[int]]:
    """Deal rows to num_clients clients by a rule; return client name -> row indices, ascending, no row twice.

    Raises DataError: a missing column, more clients than people or rows, a client that would be left without a row.
    """
    if num_clients < 1:
        raise DataError(f"num_clients should be at least 1, it is {num_clients}")
    if not rows:
        raise DataError("there are no rows to deal to clients; load some first")
    if spec.by is not None:
        return _by_column(rows, num_clients, spec.by)
    if num_clients > len(rows):
        raise DataError(f"{num_clients} clients cannot share {len(rows)} rows; lower num_clients or load more rows")
    # RandomState, because its stream is frozen: numpy promises that of no other generator.
    draw = np.random.RandomState(derive(seed, "partition") % 2**32)
    if spec.iid:
        dealt = [part.tolist() for part in np.array_split(draw.permutation(len(rows)), num_clients)]
    elif spec.dirichlet_alpha is not None:
        deal = _own_shares if spec.equal_sizes else _dirichlet
        dealt = deal(_labels(rows, spec.label), num_clients, spec.dirichlet_alpha, draw)
    else:
        dealt = _shards(_labels(rows, spec.label), num_clients, spec.shards or 1, draw)
    width = len(str(num_clients - 1))
    return {f"client-{k:0{width}d}": sorted(indices) for k, indices in enumerate(dealt)}


def _by_column(rows: Sequence[Row], num_clients: int, column: str) -> dict[str, list[int]]:
    """Give each of the values with the most rows its rows; ties go by name, rows without a value to nobody."""
    people: dict[str, list[int]] = {}
    for i, value in enumerate(_column(rows, column)):
        if value is not None:
            people.setdefault(str(value), []).append(i)
    if num_clients > len(people):
        raise DataError(
            f"{num_clients} clients were asked for, but {column!r} has {len(people)} distinct values in {len(rows)} "
            f"rows; lower num_clients to at most {len(people)} or load more rows"
        )
    largest = sorted(people, key=lambda name: (-len(people[name]), name))[:num_clients]
    return {name: people[name] for name in largest}


def _dirichlet(labels: list[str], num_clients: int, alpha: float, draw: np.random.RandomState) -> list[list[int]]:
    """Deal each label's rows in proportions drawn from a symmetric Dirichlet, drawn anew if a client has no row."""
    by_label = [[i for i, value in enumerate(labels) if value == label] for label in sorted(set(labels))]
    for _ in range(_DRAWS):
        dealt: list[list[int]] = [[] for _ in range(num_clients)]
        for indices in by_label:
            mine = draw.permutation(indices)
            for k, part in enumerate(np.split(mine, _cuts(len(mine), num_clients, alpha, draw))):
                dealt[k].extend(part.tolist())
        if all(dealt):
            return dealt
    raise DataError(
        f"the partition leaves {sum(not part for part in dealt)} of {num_clients} clients without a row at "
        f"dirichlet_alpha={alpha}, in each of {_DRAWS} draws; raise dirichlet_alpha, lower num_clients, load more "
        f"rows, or set equal_sizes"
    )


def _cuts(size: int, num_clients: int, alpha: float, draw: np.random.RandomState) -> np.ndarray:
    """Draw proportions and return where they cut `size` rows, (num_clients - 1,)."""
    share = draw.standard_gamma(alpha, num_clients)
    if share.sum() == 0:  # a tiny alpha underflows; its limit is one client that takes all
        share[draw.randint(num_clients)] = 1
    cuts: np.ndarray = np.rint(np.cumsum(share / share.sum())[:-1] * size).astype(int)
    return cuts


def _own_shares(labels: list[str], num_clients: int, alpha: float, draw: np.random.RandomState) -> list[list[int]]:
    """Give every client as many rows, of labels in shares of its own; who comes when a label is used up gets others."""
    names = sorted(set(labels))
    pools = [draw.permutation([i for i, value in enumerate(labels) if value == name]).tolist() for name in names]
    base = alpha * np.array([len(pool) for pool in pools]) / len(labels)
    dealt: list[list[int]] = [[] for _ in range(num_clients)]
    for turn, k in enumerate(draw.permutation(num_clients)):
        share = draw.standard_gamma(base)
        room = len(labels) // num_clients + (turn < len(labels) % num_clients)
        while room:
            left = np.array([len(pool) for pool in pools])
            weight = np.where(left > 0, share, 0.0)
            weight = weight if weight.sum() > 0 else left       # none of its labels is left, or a tiny alpha underflows
            counts = np.minimum(draw.multinomial(room, weight / weight.sum()), left)
            for pool, count in zip(pools, counts.tolist(), strict=True):
                dealt[k] += [pool.pop() for _ in range(count)]
            room -= int(counts.sum())
    return dealt


def _shards(labels: list[str], num_clients: int, shards: int, draw: np.random.RandomState) -> list[list[int]]:
    """Sort rows by label (in random order within one), cut equal shards, and deal them."""
    if num_clients * shards > len(labels):
        raise DataError(
            f"{num_clients} clients x {shards} shards need as many rows, there are {len(labels)}; "
            f"lower shards or num_clients"
        )
    order = sorted(draw.permutation(len(labels)).tolist(), key=lambda i: labels[i])
    cut = np.array_split(order, num_clients * shards)
    hands = draw.permutation(num_clients * shards).reshape(num_clients, shards)
    return [[i for shard in hand for i in cut[shard].tolist()] for hand in hands]


def _labels(rows: Sequence[Row], column: str | None) -> list[str]:
    """Return the label of every row, refusing a row without one."""
    values = _column(rows, column or "label")
    for i, value in enumerate(values):
        if value is None:
            raise DataError(f"row {i} has no {column!r}; the rule needs a label in every row: drop such rows first")
    return [str(value) for value in values]


def _column(rows: Sequence[Row], column: str) -> list[object]:
    """Return one column; None where a row lacks it. Refuse a column that no row has."""
    if not any(column in row for row in rows):
        found = sorted({key for row in rows for key in row})
        raise DataError(f"the rows have no column {column!r}; they have {', '.join(found)}: name one of these")
    return [row.get(column) for row in rows]
