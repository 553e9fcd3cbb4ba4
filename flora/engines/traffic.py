"""Bytes as they travel, per client: what each end holds already does not travel again (messages.py)."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from flora.client import LocalClient
from flora.messages import Broadcast, Update, size
from flora.server import Server, for_client

MOST_HELD = 32                                                  # versions remembered as held by somebody


class Traffic:
    """Counts the messages of a run. held: what every client holds at first (None: nothing)."""

    def __init__(self, clients: Iterable[LocalClient], held: Broadcast | None = None):
        self._held: dict[str, Broadcast] = {} if held is None else {client.name: _start(held) for client in clients}

    def down(self, server: Server, following: Sequence[LocalClient]) -> dict[str, int]:
        """Bytes of the broadcast that is due, by client: to all, where it changes the base, sampled or not; else to those who train
        next (following)."""
        if silent(server):
            return {}
        broadcast, known = server.broadcast, {}
        everybody = broadcast.merge is not None or broadcast.base is not None
        sizes = {}
        for client in server.clients if everybody else following:
            held = self._held.get(client.name)
            key = (client.rank, None if held is None else held.version)
            if key not in known:
                known[key] = size(for_client(broadcast, client.rank), held)
            sizes[client.name] = known[key]
        self._held |= dict.fromkeys(sizes, _start(broadcast))
        versions = sorted({held.version for held in self._held.values()})
        if len(versions) > MOST_HELD:
            self._held = {name: held for name, held in self._held.items() if held.version > versions[-MOST_HELD]}
        return sizes

    @staticmethod
    def up(server: Server, updates: Sequence[Update], sent: Broadcast) -> dict[str, int]:
        """Bytes of updates that were trained from the broadcast that was sent, by client."""
        return {} if silent(server) else {update.client: size(update, sent) for update in updates}


def silent(server: Server) -> bool:
    """Nothing travels where everything stays at home, or where there is one party."""
    return server.strategy.home == "AB" or server.strategy.pooled


def _start(broadcast: Broadcast) -> Broadcast:
    return replace(broadcast, merge=None, base=None)


def total(rows: Sequence[Mapping[str, object]]) -> int:
    """Bytes up and down of a run, by its rows."""
    return sum(row["bytes_up"] + row["bytes_down"] for row in rows if row["kind"] == "server")
