"""What arrives in a round that is open: every update is judged alone, and one that is refused takes nothing from the others.

A strategy refuses a whole round where its updates do not fit together. So what one client could do to make them not fit is looked
for here, where only that client pays: another name, version, layer, shape or rank, numbers that are not finite, a factor that was
not to train, a scale other than the one that was sent.
"""
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flora.adapter import Adapters, truncate
from flora.client import LocalClient
from flora.errors import StrategyError
from flora.group import Group
from flora.messages import Broadcast, Limits, Update, decode
from flora.strategies import Strategy, check_update
from flora.strategies.robust import Robust


@dataclass(frozen=True)
class Trust:
    """What a server takes from its clients. min_clients: answers without which a round is not aggregated; robust: how those are
    judged together (None: not at all); staleness: what an update counts for each round that it is late, in (0, 1] (None: it is
    refused); limits: of messages that come as bytes. combine(updates, sent): the next broadcast, in the place of the strategy's own
    sum (None), such as one under masks or noise; with min_clients=0 of no update too. sample(names, round): who takes part (None: a
    fixed share)."""
    min_clients: int = 1
    robust: Robust | None = None
    staleness: float | None = None
    limits: Limits | None = None
    combine: Callable[[Sequence[Update], Broadcast], Broadcast] | None = None
    sample: Callable[[Sequence[str], int], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.min_clients < (1 if self.combine is None else 0):
            raise StrategyError(f"expected min_clients of at least 1; got {self.min_clients}")
        if self.staleness is not None and not 0.0 < self.staleness <= 1.0:
            raise StrategyError(f"expected a staleness in (0, 1], the weight of an update that is a round late; got "
                                f"{self.staleness}")


class Inbox:
    """The updates of the open round, by client, in order of arrival.

    clients: who may answer; shapes: (out, in) by layer of what they may (empty: whatever they send); rule: the strategy that will
    combine them, with these options; done: names of updates that were taken out again (a stream has summed them).
    """

    def __init__(self, clients: Sequence[LocalClient | Group], shapes: Mapping[str, tuple[int, int]], rule: Strategy,
                 options: Mapping[str, object], trust: Trust):
        self.shapes, self.rule, self.trust = dict(shapes), rule, trust
        self.updates: dict[str, Update] = {}
        self.done: set[str] = set()
        self.clients = {client.name: client for client in clients}
        known = inspect.signature(rule.aggregate).parameters.get("mixed_alpha")
        self._one_scale = rule.home == "B" or (known is not None and options.get("mixed_alpha", known.default) == "refuse")

    def add(self, message: Update | bytes, due: Broadcast, sender: str | None = None) -> None:
        """Takes in one update, or its bytes. due: the broadcast that it answers; sender: who it came from (None: who it says).

        Raises StrategyError or MessageError, and takes in nothing of it, for whatever the round must not get.
        """
        update = message if isinstance(message, Update) else self._read(message, due)
        who = update.client
        if sender not in (None, who):
            raise StrategyError(f"expected an update of {sender!r}, who sent it; got one of {who!r}. Leave it out.")
        again = who in self.updates or who in self.done
        if again or who not in self.clients:
            raise StrategyError(f"expected one update from each of this run's clients at most; got {who!r}, which "
                                f"{'has sent one already' if again else 'is not among them'}. Leave it out.")
        late = due.version - update.base_version
        if late < 0 or (late and (self.trust.staleness is None or due.train != "AB")):
            raise StrategyError(f"expected updates trained on version {due.version} of the base; got others from {who} (version "
                                f"{update.base_version}). Leave them out of the round.")
        if self.shapes:
            check_update(update, who, self.shapes)
            self._check_ranks(update, due)
            self._check_start(update, due.start or {}, due.train)
        self.updates[who] = update

    def _read(self, message: bytes, due: Broadcast) -> Update:
        return decode(message, self.shapes or None, self.trust.limits, due, kind="update")

    def _check_ranks(self, update: Update, due: Broadcast) -> None:
        """Of a client: its own rank, or less where clients may differ. A group answers with a stack of any."""
        client = self.clients[update.client]
        if isinstance(client, Group):
            return
        for layer, a in update.adapters.items():
            if a.rank > client.rank or (a.rank < client.rank and not self.rule.mixed_ranks):
                raise StrategyError(f"client {client.name}, {layer}: expected rank {client.rank}, its own; got {a.rank}. Leave the "
                                    "client out.")

    def _check_start(self, update: Update, start: Adapters, train: str) -> None:
        """What did not train is as it was sent; a rule that averages factors takes one scale."""
        frozen = {"A": "B", "B": "A"}.get(train)
        for layer, a in update.adapters.items():
            if layer not in start or start[layer].rank < a.rank:
                continue
            sent = truncate(start[layer], a.rank)
            if self._one_scale and not torch.equal(a.scale.cpu(), sent.scale.cpu()):
                raise StrategyError(f"client {update.client}, {layer}: expected the scale that it was sent; got another. Leave the "
                                    "client out.")
            if frozen and not self.rule.home and not torch.equal(getattr(a, frozen).cpu(), getattr(sent, frozen).cpu()):
                raise StrategyError(f"client {update.client}, {layer}: expected the {frozen} that it was sent, as only {train} "
                                    "trains; got another. Leave the client out.")

    def weighed(self, weights: str, due: Broadcast) -> list[Update]:
        """The updates with num_examples = what they count, staleness included, as if all were of this round."""
        counts = {"examples": lambda u: u.num_examples, "uniform": lambda u: 1, "tokens": lambda u: u.metrics.get("tokens", 0)}
        return [replace(u, num_examples=counts[weights](u) * (self.trust.staleness or 1.0) ** (due.version - u.base_version),
                        base_version=due.version) for u in self.updates.values()]
