"""What arrives in a round that is open: every update is judged alone, and one that is refused takes nothing from the others.

A strategy refuses a whole round where its updates do not fit together. So what one client could do to make them not fit is looked
for here, where only that client pays: another name, version, layer, shape or rank, numbers that are not finite, a factor that was
not to train, a scale other than the one that was sent.
"""
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flora.adapter import Adapters, truncate
from flora.checks import FLOATS
from flora.client import LocalClient
from flora.errors import StrategyError
from flora.group import Group
from flora.messages import Broadcast, Limits, Update, decode
from flora.strategies import LARGEST, Strategy, check_update
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

    def check(self, rule: Strategy, first: Broadcast, weighting: str | float, options: Mapping[str, object], streams: bool) -> None:
        """Raises StrategyError for what a strategy cannot be guarded by. first: what its run begins with; weighting, options: those
        of the run."""
        if self.robust is not None:
            self.robust.refuse(rule, first)
        if streams and any(one is not None for one in (self.robust, self.staleness, self.combine)):
            raise StrategyError("expected no robust, staleness or combine with a stream, which forgets what it has summed; got "
                                "one. Leave the stream out.")
        weighs, start = "weights" in rule.options and isinstance(weighting, str), options.get("start")
        splits = rule.splits or start == "warm"
        if self.staleness is not None and (splits or not weighs or first.train != "AB" or rule.home):
            raise StrategyError("staleness: expected a strategy that weighs clients, trains both factors in every round and does "
                                f"not split its sum; got {rule.name}, weighting {weighting}, start {start}. Leave late updates out "
                                "(late: drop).")


class Inbox:
    """The updates of the open round, by client, in order of arrival.

    clients: who may answer; shapes: (out, in) by layer of what they may (empty: whatever they send); rule: the strategy that will
    combine them, with these options; weighting: what they count; done: names of updates that were taken out again (a stream has
    summed them).
    """

    def __init__(self, clients: Sequence[LocalClient | Group], shapes: Mapping[str, tuple[int, int]], rule: Strategy,
                 options: Mapping[str, object], trust: Trust, weighting: str | float = "examples"):
        self.shapes, self.rule, self.trust, self.weighting = dict(shapes), rule, trust, weighting
        self.updates: dict[str, Update] = {}
        self.done: set[str] = set()
        self.clients = {client.name: client for client in clients}
        known = inspect.signature(rule.aggregate).parameters.get("mixed_alpha")
        refuses = known is not None and options.get("mixed_alpha", known.default) == "refuse"
        self._one_scale = refuses or trust.combine is not None or rule.home == "B"

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
        if late < 0 or (late and self.trust.staleness is None):
            raise StrategyError(f"expected updates trained on version {due.version} of the base; got others from {who} (version "
                                f"{update.base_version}). Leave them out of the round.")
        self._check_kind(update)
        if self.shapes:
            check_update(update, who, self.shapes)
            self._check_ranks(update, due)
            self._check_start(update, due.start or {}, due.train)
        self.updates[who] = update

    def _read(self, message: bytes, due: Broadcast) -> Update:
        return decode(message, self.shapes or None, self.trust.limits, due, kind="update")

    def _check_kind(self, update: Update) -> None:
        """Adapters, or weights, as the rule takes them, of a layer at least; the tokens, where they weigh."""
        who, held = update.client, update.base if self.rule.dense else update.adapters
        if bool(update.base) != self.rule.dense or not held:
            raise StrategyError(f"client {who}: expected {'weights' if self.rule.dense else 'adapters'} of a layer at least, and "
                                f"nothing else; got {len(update.adapters)} adapters and {len(update.base or ())} weights. Leave "
                                "the client out.")
        odd = {str(t.dtype) for a in update.adapters.values() for t in (a.A, a.B) if t.dtype not in FLOATS}
        if odd:
            raise StrategyError(f"client {who}: expected factors of float32, float64, float16 or bfloat16, which can be summed; "
                                f"got {', '.join(sorted(odd))}. Leave the client out.")
        tokens = update.metrics.get("tokens", 0)
        if self.weighting == "tokens" and not 1 <= tokens < LARGEST:
            raise StrategyError(f'client {who}: expected metrics["tokens"] of at least 1, which weigh it; got {tokens}. Leave the '
                                "client out.")

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
        frozen = {"A": "B", "B": "A", "core": "B"}.get(train)
        for layer, a in update.adapters.items():
            if layer not in start or start[layer].rank < a.rank:
                continue
            sent = truncate(start[layer], a.rank)
            if self._one_scale and not torch.equal(a.scale.cpu(), sent.scale.cpu()):
                raise StrategyError(f"client {update.client}, {layer}: expected the scale that it was sent; got another. Leave the "
                                    "client out.")
            if frozen and not self.rule.home and not _same(getattr(a, frozen), getattr(sent, frozen)):
                raise StrategyError(f"client {update.client}, {layer}: expected the {frozen} that it was sent, as only {train} "
                                    "trains; got another. Leave the client out.")

    def weighed(self, weights: str, due: Broadcast) -> list[Update]:
        """The updates with num_examples = what they count, staleness included, as if all were of this round."""
        counts = {"examples": lambda u: u.num_examples, "uniform": lambda u: 1, "tokens": lambda u: u.metrics.get("tokens", 0)}
        return [replace(u, num_examples=counts[weights](u) * (self.trust.staleness or 1.0) ** (due.version - u.base_version),
                        base_version=due.version) for u in self.updates.values()]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
