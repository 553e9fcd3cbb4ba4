"""The server's side of a round: who is sampled, which updates count, what is sent next, what a client missed."""
import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from flora.adapter import Adapter, Adapters, fresh_adapters, truncate
from flora.client import LocalClient
from flora.downlink import Downlink, lighter
from flora.errors import FloraError, MessageError, StrategyError
from flora.group import Group, concatenated, groups_in, leaves, refuse_rule
from flora.inbox import Inbox, Trust
from flora.messages import Broadcast, Update
from flora.seeds import derive
from flora.strategies import aggregate, strategy_named
from flora.strategies.robust import Sifted, sift
from flora.stream import Stream

HISTORY = 4
NOTHING_SIFTED = Sifted([], {}, {})


class Server:
    """Holds the broadcast that is due, and makes the next one of a round's updates. It needs no model.

    broadcast: the first one (Strategy.begin, or a checkpoint's); clients: all of the run, a group (group.py) being one, where the
    strategy can aggregate what it answers; fraction: share of them sampled a round (at least one); weighting: "examples", "uniform"
    or "tokens". The order of updates does not matter: they are sorted as the clients are, so a sum has the same bits in whatever
    order replies come.
    options: of the strategy's aggregate, such as start="warm"; what a run knows is filled in (weights, ranks, scale, seed, sent:
    the start that the round trained from).
    stream: takes updates in as they come, in bounded memory, with strategy flora; sums then depend on the order of arrival in
    their last bits, and the stream's own weighting holds. downlink: the form in which merges are sent (None: the stack).
    shapes: (out, in) of the layers, by name. trust: what it takes from its clients. downlink_error: relative error of the downlink
    in the last round; before: the broadcast that was due before this one; sifted: what trust.robust made of the last round.
    """

    def __init__(self, strategy: str, clients: Sequence[LocalClient | Group], broadcast: Broadcast, fraction: float = 1.0,
                 weighting: str = "examples", seed: int = 0, stream: Stream | None = None,
                 options: Mapping[str, object] | None = None, downlink: Downlink | None = None,
                 shapes: Mapping[str, tuple[int, int]] | None = None, trust: Trust | None = None):
        self.strategy = strategy_named(strategy)
        refuse_rule(self.strategy, clients)
        if stream is not None and strategy != "flora":
            raise StrategyError(f"expected strategy flora with a stream, which sums ΔW; got {strategy}. Leave the stream out.")
        if stream is not None and downlink is not None and downlink.how != "stack":
            raise StrategyError(f"expected no downlink with a stream, which sends dense sums; got {downlink.how}. Leave one out.")
        if stream is not None and options:
            raise StrategyError(f"expected no options with a stream, which has its own; got {sorted(options)}. Leave one out.")
        self._clients, self.fraction, self.weighting, self.seed = list(clients), fraction, weighting, seed
        self.broadcast, self.stream, self.options = broadcast, stream, dict(options or {})
        self.downlink, self.downlink_error = downlink or Downlink(), 0.0
        self.before: Broadcast | None = None
        self.shapes, self.trust, self.sifted = dict(shapes or {}), trust or Trust(), NOTHING_SIFTED
        self.trust.check(self.strategy, broadcast, weighting, self.options, stream is not None)
        self._inbox = self._new_inbox()
        self._merges: dict[int, Adapters] = {}
        self.changed = 0                                        # the last version that changed the base
        self._layers: set[str] = set()                          # that any broadcast has changed
        self.remember(broadcast)

    @property
    def clients(self) -> list[LocalClient | Group]:
        """Who may answer. Setting them forgets what the open round has received."""
        return self._clients

    @clients.setter
    def clients(self, clients: Sequence[LocalClient | Group]) -> None:
        self._clients = list(clients)
        self._inbox = self._new_inbox()

    def sample(self, number: int) -> list[LocalClient | Group]:
        """The clients of round `number` (from 0), by fraction and seed; always the same for the same round. In the run's order."""
        if self.trust.sample is not None:
            names = set(self.trust.sample([client.name for client in self.clients], number))
            return [client for client in self.clients if client.name in names]
        count = max(1, round(self.fraction * len(self.clients)))
        chosen = random.Random(derive(self.seed, "sample", number)).sample(range(len(self.clients)), count)
        return [self.clients[i] for i in sorted(chosen)]

    def receive(self, update: Update | bytes, sender: str | None = None) -> None:
        """Takes in one update of the round that is open, or its bytes. sender: who it came from (None: who it says).

        Raises StrategyError or MessageError, and takes in nothing of it, for what the round must not get: another base version, an
        unknown client or a second update of one, other layers, shapes or ranks, numbers that are not finite (inbox.py).
        """
        self._inbox.add(update, self.broadcast, sender)
        if self.stream:
            name, taken = self._inbox.updates.popitem()
            self.stream.add(taken)
            self._inbox.done.add(name)

    def take(self, arrived: Mapping[str, Update | bytes]) -> dict[str, str]:
        """Receives what arrived, by client; gives the reasons of those that were refused, by client."""
        refused = {}
        for name, message in arrived.items():
            try:
                self.receive(message, name)
            except (StrategyError, MessageError) as error:
                refused[name] = str(error)
        return refused

    def short(self) -> str:
        """Why the open round cannot be closed: too few updates; "" where it can."""
        count = len(self.stream.clients if self.stream else self._inbox.updates)
        if count < self.trust.min_clients:
            return f"expected answers of at least {self.trust.min_clients} clients (min_clients); got {count}"
        robust = self.trust.robust
        if robust is not None and count < robust.needs(count):
            return f"expected at least {robust.needs(count)} answers for robust {robust.how} to judge {count} by; got {count}"
        return ""

    @property
    def received(self) -> list[Update]:
        """What the open round has taken in, in the order of arrival."""
        return [*self._inbox.updates.values()]

    def discard(self) -> None:
        """Forgets what the open round has received: it failed. The base and the broadcast are as they were."""
        self._inbox = self._new_inbox()
        if self.stream:
            self.stream.discard()

    def close(self, updates: Sequence[Update] = (), weights: Mapping[str, Tensor] | None = None) -> Broadcast:
        """Aggregates what was received, and these, into the next broadcast. Where that is too little (short), the broadcast stays,
        and the round is forgotten.

        weights: the base's by layer, before this merge, for a downlink that may send them. Raises StrategyError as receive does;
        then nothing of these counts, and what was received before is still there.
        """
        if self.stream:
            return self._close_stream(updates)
        before = dict(self._inbox.updates)
        try:
            for update in updates:
                self.receive(update)
            if self.short():
                self.discard()
                return self.broadcast
            sifted = self._sift()
            following = self._combined(sifted.updates)
            following, error = lighter(replace(following, run=self.broadcast.run), self.downlink, weights)
        except Exception:
            self._inbox.updates = before
            raise
        self.downlink_error, self.sifted = error, sifted
        self.discard()
        return self._send(following)

    def _new_inbox(self) -> Inbox:
        weighting: Any = self.options.get("weights", self.weighting)
        return Inbox(self.clients, self.shapes, self.strategy, self.options, self.trust, weighting)

    def _sift(self) -> Sifted:
        """The updates of the round in the clients' order, those that are late at their weight, and judged together."""
        place = {client.name: i for i, client in enumerate(self.clients)}
        late = self.trust.staleness is not None
        have = self._inbox.weighed(self.weighting, self.broadcast) if late else [*self._inbox.updates.values()]
        ordered = sorted(have, key=lambda update: place[update.client])
        robust = self.trust.robust
        return Sifted(ordered, {}, {}) if robust is None else sift(ordered, robust, self.broadcast.start,
                                                                    self.strategy.groups != "any")

    def _combined(self, updates: Sequence[Update]) -> Broadcast:
        if self.trust.combine is not None:
            return self.trust.combine(updates, self.broadcast)
        return aggregate(updates, self.strategy.name, **self._facts(), **self.options)

    def _facts(self) -> dict[str, object]:
        """The options of the strategy that the run itself decides, but for those that were given."""
        clients = leaves(self.clients)
        late = self.trust.staleness is not None                 # _sift has weighed them
        facts = {"weights": "examples" if late else self.weighting, "ranks": [client.rank for client in clients], "seed": self.seed,
                 "scale": sum(client.alpha / client.rank for client in clients) / len(clients),
                 "sent": self.broadcast.start}
        return {name: fact for name, fact in facts.items() if name in self.strategy.options and name not in self.options}

    def shrink(self, updates: Sequence[Update]) -> None:
        """Notes the ranks of clients that prune their own for good (Strategy.prunes, HetLoRA)."""
        if self.strategy.prunes:
            left = {u.client: max((a.rank for a in u.adapters.values()), default=1) for u in updates}
            self.clients = [replace(c, rank=min(cast(int, c.rank), left.get(c.name, cast(int, c.rank)))) for c in self.clients]

    def rehearse(self) -> None:
        """Aggregates updates of one small layer that have the ranks and scales of this run's clients.

        Raises StrategyError for what the strategy would refuse after a round of training: mixed ranks, mixed alpha, options.
        """
        if self.strategy.dense and self.downlink.how != "stack":
            raise StrategyError(f"downlink {self.downlink.how}: expected a strategy that sends an update to merge (flora, fedex); "
                                f"got {self.strategy.name}, which sends weights. Leave downlink out.")
        if self.strategy.dense:
            return
        shapes = {"rehearsal": (4, 4)}
        clients, updates = leaves(self.clients), []
        start = self.strategy.begin(shapes, [client.rank for client in clients], self.seed).start
        for client in clients:
            held = start or fresh_adapters(shapes, client.rank, client.alpha, client.name)
            cut = {name: truncate(a, client.rank) for name, a in held.items()}
            own = {name: Adapter(a.A, a.B, client.alpha / client.rank) for name, a in cut.items()}
            updates.append(Update(own, len(client.rows), {"tokens": 1}, client=client.name))
        for group in groups_in(self.clients):
            names = {client.name for client in group.clients}
            aggregate([update for update in updates if update.client in names], group.inner)
        known = {"sent": start} if "sent" in self.strategy.options else {}
        made = aggregate(updates, self.strategy.name, **{**self._facts(), **known, **self.options})
        if self.downlink.how != "stack" and made.merge is None:
            raise StrategyError(f"downlink {self.downlink.how}: expected a strategy that sends an update to merge (flora, fedex); "
                                f"got {self.strategy.name}, which sends a start. Leave downlink out.")

    def _close_stream(self, updates: Sequence[Update]) -> Broadcast:
        """The same for a stream, which cannot give an update back: an error discards the whole round."""
        try:
            for update in updates:
                self.receive(update)
        except FloraError:
            self.discard()
            raise
        if self.short():
            self.discard()
            return self.broadcast
        self._inbox = self._new_inbox()
        return self._send(cast(Stream, self.stream).close())

    def _send(self, broadcast: Broadcast) -> Broadcast:
        """Makes this the broadcast that is due."""
        self.before, self.broadcast = self.broadcast, broadcast
        self.remember(broadcast)
        return broadcast

    def remember(self, broadcast: Broadcast) -> None:
        """Keeps what this version changed, for catch_up: of every broadcast, and, in order, those before a checkpoint.
        Up to HISTORY times the numbers in the weights; of a version of which layers went as weights no merge would do."""
        if broadcast.merge is not None or broadcast.base is not None:
            self.changed = broadcast.version
        self._layers |= {*(broadcast.merge or ()), *(broadcast.base or ())}
        if broadcast.base is not None:
            self._merges = {}
        elif broadcast.merge is not None:
            self._merges[broadcast.version] = broadcast.merge
        while len(self._merges) > 1 and _size(self._merges.values()) > HISTORY * _dense(self._merges.values()):
            del self._merges[min(self._merges)]

    def catch_up(self, version: int, weights: Mapping[str, Tensor] | None = None) -> Broadcast:
        """What brings a client whose base is at `version` to the broadcast that is due: the merges it missed, concatenated.

        weights: the base's present weights by layer (flora.nn.weights of the server's model), sent in their place where they are
        fewer bytes, or where merges that old are no longer held. Raises StrategyError where neither can be sent.
        """
        now = self.broadcast
        if version > now.version:
            raise StrategyError(f"expected a base of version {now.version} at most; got {version}, which this server never sent")
        if not self._layers:
            return now                                              # a strategy that never merges: nothing was missed
        missed = [merge for number, merge in sorted(self._merges.items()) if number > version]
        if version >= now.version - 1 or self._layers <= set(now.base or ()):
            return now
        whole = bool(missed) and set(range(version + 1, now.version + 1)) <= set(self._merges)
        if weights is not None and (not whole or _bytes(missed) > sum(w.nbytes for w in weights.values())):
            return replace(now, merge=None, base=weights)
        if not whole:
            raise StrategyError(f"expected the merges of versions {version + 1} to {now.version}; this server holds "
                                f"{sorted(self._merges) or 'none'}. Give weights: those of the server's model.")
        return replace(now, merge=concatenated(missed), since=version)


def first_broadcast(strategy: str, shapes: Mapping[str, tuple[int, int]], clients: Sequence[LocalClient | Group], seed: int = 0,
                    options: Mapping[str, object] | None = None) -> Broadcast:
    """Strategy.begin for these layers and clients, at the mean of their alpha / rank; options: those of aggregate, of which begin
    may know some."""
    rule, clients = strategy_named(strategy), leaves(clients)
    scale = sum(client.alpha / client.rank for client in clients) / len(clients)
    known = inspect.signature(rule.begin).parameters
    own = {name: value for name, value in (options or {}).items() if name in known}
    return rule.begin(shapes, [client.rank for client in clients], seed, scale, **own)


def for_client(broadcast: Broadcast, rank: int) -> Broadcast:
    """The broadcast as it travels to a client of this rank: it needs no more ranks of the start than it trains."""
    start = broadcast.start and {name: truncate(a, rank) for name, a in broadcast.start.items()}
    return replace(broadcast, start=start)


def _bytes(merges: Sequence[Adapters]) -> int:
    return sum(a.nbytes for merge in merges for a in merge.values())


def _size(merges: Iterable[Adapters]) -> int:
    """Numbers in the factors."""
    return sum(a.A.numel() + a.B.numel() for merge in merges for a in merge.values())


def _dense(merges: Iterable[Adapters]) -> int:
    """Numbers in the weights of their layers."""
    return sum(out * inn for out, inn in {layer: a.shape for merge in merges for layer, a in merge.items()}.values())
