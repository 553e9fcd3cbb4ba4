"""Bytes as they travel, per client: what each end holds already does not travel again (messages.py)."""
from collections.abc import Mapping, Sequence

from flora.client import LocalClient
from flora.group import Group, leaves
from flora.messages import Broadcast, Update, size
from flora.server import Server, for_client


class Traffic:
    """Counts the messages of a run. A client that sits out a round is taken to keep nothing of what it was sent before.

    received: bytes of the broadcast that is due, by client: of those that got it; sent: that broadcast.
    """

    def __init__(self, received: Mapping[str, int] | None = None, sent: Broadcast | None = None):
        self.received, self._sent = dict(received or {}), sent

    def down(self, server: Server, following: Sequence[LocalClient | Group]) -> dict[str, int]:
        """Bytes of the broadcast that is due, by client: to all, where it changes the base, sampled or not; else to those who train
        next (following). After a round that made none, 0 for those that have it."""
        broadcast, before, again = server.broadcast, server.before, server.broadcast is self._sent
        everybody = broadcast.merge is not None or broadcast.base is not None
        known: dict[tuple[int, bool], int] = {}
        sizes = dict.fromkeys(self.received, 0) if again else {}
        for client in [] if silent(server) else server.clients if everybody else following:
            if again and client.name in self.received:
                continue
            held = not again and client.name in self.received and before is not None
            rank = max(one.rank for one in leaves([client]))
            key = (rank, held)
            if key not in known:
                known[key] = size(for_client(broadcast, rank), before if held else None)
            sizes[client.name] = known[key]
        self.received, self._sent = sizes, broadcast
        return sizes

    @staticmethod
    def up(server: Server, updates: Sequence[Update], sent: Broadcast) -> dict[str, int]:
        """Bytes of updates that were trained from the broadcast that was sent, by client."""
        return {} if silent(server) else {update.client: size(update, sent) for update in updates}


def silent(server: Server) -> bool:
    """Nothing travels where everything stays at home, or where there is one party."""
    return server.strategy.home == "AB" or server.strategy.pooled


def total(rows: Sequence[Mapping[str, object]]) -> int:
    """Bytes up and down of a run, by its rows."""
    return sum(row["bytes_up"] + row["bytes_down"] for row in rows if row["kind"] == "server")
