"""The server's side of a round, without a model: who is sampled, which updates count, what is sent next."""
import random
from collections.abc import Sequence
from dataclasses import replace

from flora.client import LocalClient
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.seeds import derive
from flora.strategies import aggregate, strategy_named


class Server:
    """Holds the broadcast that is due, and makes the next one of a round's updates.

    broadcast: the first one (Strategy.begin, or a checkpoint's); clients: all of the run; fraction: share of them sampled a
    round (at least one); weighting: "examples" or "uniform". The order of updates does not matter: they are sorted as the
    clients are, so a sum has the same bits in whatever order replies come.
    """

    def __init__(self, strategy: str, clients: Sequence[LocalClient], broadcast: Broadcast, fraction: float = 1.0,
                 weighting: str = "examples", seed: int = 0):
        self.strategy = strategy_named(strategy)
        self.clients, self.fraction, self.weighting, self.seed = list(clients), fraction, weighting, seed
        self.broadcast = broadcast

    def sample(self, number: int) -> list[LocalClient]:
        """The clients of a round (from 0), by fraction and seed; always the same for the same round. In the run's order."""
        count = max(1, round(self.fraction * len(self.clients)))
        chosen = random.Random(derive(self.seed, "sample", number)).sample(range(len(self.clients)), count)
        return [self.clients[i] for i in sorted(chosen)]

    def close(self, updates: Sequence[Update]) -> Broadcast:
        """Aggregates the round's updates into the next broadcast. Without any (all failed) the broadcast stays what it was.

        Raises StrategyError for an update of another base version, of an unknown client, or twice from one client.
        """
        place = {client.name: i for i, client in enumerate(self.clients)}
        names = [update.client for update in updates]
        if len(set(names)) != len(names) or not set(names) <= set(place):
            raise StrategyError(f"expected one update from each of this run's clients at most; got {names}")
        behind = [u.client for u in updates if u.base_version != self.broadcast.version]
        if behind:
            raise StrategyError(f"expected updates trained on version {self.broadcast.version} of the base; got others from "
                                f"{', '.join(behind)}. Leave them out of the round.")
        if not updates:
            return self.broadcast
        ordered = sorted(updates, key=lambda update: place[update.client])
        options = {} if self.strategy.home else {"weights": self.weighting}
        following = aggregate(ordered, self.strategy.name, **options)
        self.broadcast = replace(following, run=self.broadcast.run)
        return self.broadcast
