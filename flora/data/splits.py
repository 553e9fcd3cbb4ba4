"""Hold rows out, for the server and for each client, so that nothing held out was ever trained on, by anybody.

Rows that share text are kept on one side: whole groups are held out (in a conversation, one row's completion is the
next row's context, and the other person's rows are another client's), and a row whose exact text is held out anywhere
leaves every client's training set. What holding a group out would cost is counted before it is done, so no client
that has a row ends without one.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flora.errors import DataError

log = logging.getLogger(__name__)

Row = dict[str, Any]
ONE_IN = 5  # rows, at most, are held out: of each client, and of the pool for the server


@dataclass(frozen=True)
class Splits:
    """Row indices: `train` and `eval` by client, `server` from all of them. No index is in two places."""

    train: dict[str, list[int]]
    eval: dict[str, list[int]]
    server: list[int]


@dataclass
class _Pool:
    """The clients' rows by group and by text, and which of them are lost for training."""

    owner: dict[int, str]
    groups: dict[str, list[int]]  # group -> its rows
    text: dict[int, str]  # row -> digest of its prompt and completion
    same: dict[str, list[int]]  # digest -> the rows that read so
    left: Counter[str]  # client -> rows that it may train on
    gone: set[int] = field(default_factory=set)

    def hold_out(self, group: str) -> bool:
        """Take a group, and what reads like its rows, from training; refuse if a client would have no row left."""
        lost = {twin for i in self.groups[group] for twin in self.same[self.text[i]]} - self.gone
        cost = Counter(self.owner[i] for i in lost)
        if any(self.left[name] <= count for name, count in cost.items()):
            return False
        self.left -= cost
        self.gone |= lost
        return True


def split(
    rows: Sequence[Row],
    clients: dict[str, list[int]],
    seed: int,
    eval_rows_per_client: int,
    server_eval_rows: int,
    group: str | None = None,
) -> Splits:
    """Split every client's rows into train and held out, and hold some of all of them out for the server.

    `group` is a column whose rows stay on one side; None: `conversation` where every row has one, else rows with the same prompt
    and completion. eval_rows_per_client and server_eval_rows are upper bounds, and so is a fifth of the rows; a client with 5 rows
    or more gets at least 1 if its groups allow it. Groups are taken in an order that only the seed and their names give. Raises
    DataError: a missing column, a row of two clients, a client without rows.
    """
    if min(eval_rows_per_client, server_eval_rows) < 0:
        raise DataError(
            f"held-out rows are counted from 0, eval_rows_per_client={eval_rows_per_client} and "
            f"server_eval_rows={server_eval_rows} came; 0 holds none out"
        )
    pool = _pool(rows, clients, group)
    order = sorted(pool.groups, key=lambda name: hashlib.sha256(f"split|{seed}|{name}".encode()).digest())
    server = _for_server(pool, order, min(server_eval_rows, len(pool.owner) // ONE_IN))
    if server_eval_rows and not server:
        log.warning("no rows are held out for the server: the groups are too large, or the rows too few")
    evaluated = _for_clients(pool, order, clients, eval_rows_per_client, set(server))
    train = {name: [i for i in indices if i not in pool.gone] for name, indices in clients.items()}
    return Splits(train, evaluated, sorted(server))


def _for_server(pool: _Pool, order: Sequence[str], wanted: int) -> list[int]:
    """Take groups of anybody's rows while they fit."""
    server: list[int] = []
    for name in order:
        members = pool.groups[name]
        if len(members) <= wanted - len(server) and pool.hold_out(name):
            server += members
    return server


def _for_clients(
    pool: _Pool, order: Sequence[str], clients: dict[str, list[int]], wanted: int, server: set[int]
) -> dict[str, list[int]]:
    """Take groups for each client in turn; a group that one holds out serves all whose rows are in it."""
    own: dict[str, dict[str, list[int]]] = {name: {} for name in clients}  # client -> group -> its rows there
    for key in order:
        for i in pool.groups[key]:
            if i not in server:
                own[pool.owner[i]].setdefault(key, []).append(i)
    held: dict[str, None] = {}  # an ordered set
    for name, indices in clients.items():
        room = min(wanted, len(indices) // ONE_IN)
        have = sum(len(own[name].get(key, ())) for key in held)
        for key, mine in own[name].items():
            if key not in held and len(mine) <= room - have and pool.hold_out(key):
                held[key] = None
                have += len(mine)
        if room and not have:
            # Every group is larger than the room: the smallest costs the least, and its surplus rows are left out.
            smallest = sorted(own[name], key=lambda key: len(own[name][key]))
            first = next((key for key in smallest if pool.hold_out(key)), None)
            held.update({} if first is None else {first: None})
    return {
        name: sorted([i for key in held for i in own[name].get(key, ())][: min(wanted, len(indices) // ONE_IN)])
        for name, indices in clients.items()
    }


def _pool(rows: Sequence[Row], clients: dict[str, list[int]], group: str | None) -> _Pool:
    """Index the clients' rows, refusing what would leak or could not train."""
    owner: dict[int, str] = {}
    for name, indices in clients.items():
        if not indices:
            raise DataError(
                f"client {name!r} has no row to train on; load more rows, lower num_clients, or leave it out"
            )
        for i in indices:
            if i in owner:
                raise DataError(f"row {i} belongs to {owner[i]!r} and to {name!r}; deal every row to one client")
            owner[i] = name
    text = {i: _digest(rows[i]) for i in owner}
    same: dict[str, list[int]] = {}
    for i, key in text.items():
        same.setdefault(key, []).append(i)
    groups: dict[str, list[int]] = {}
    for i, key in _groups(rows, owner, text, group).items():
        groups.setdefault(key, []).append(i)
    return _Pool(owner, groups, text, same, Counter(owner.values()))


def _groups(rows: Sequence[Row], owner: dict[int, str], text: dict[int, str], group: str | None) -> dict[int, str]:
    """Return the group of every row: its value in a column, or what it reads."""
    if group is None:
        has = bool(owner) and all(rows[i].get("conversation") is not None for i in owner)
        return {i: str(rows[i]["conversation"]) for i in owner} if has else text
    for i in owner:
        if group not in rows[i]:
            raise DataError(
                f"row {i} has no column {group!r} to group by; it has {', '.join(rows[i])}: name one of these"
            )
    # A row without a value is a group of its own text.
    return {i: text[i] if rows[i][group] is None else str(rows[i][group]) for i in owner}


def _digest(row: Row) -> str:
    """Return a digest of what a row reads."""
    content = json.dumps([row["prompt"], row["completion"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
