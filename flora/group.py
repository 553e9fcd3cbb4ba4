"""Groups of clients that aggregate among themselves before they answer as one: a Group is a Client.

In an inner round a group's members train and are stacked, Σ p_k ΔW_k with p_k by examples; the next one trains on top of the sum.
That sum is not merged into the base, which other groups share: it rides as frozen ranks on the members' own rows, held once for all
of them. So groups of different pace and depth train in lockstep, inner round by inner round, in one batch of one Cohort.

A group answers with the stack over its inner rounds, which is Σ p_k ΔW_k again. Stacking is associative: one inner round at full
depth is flat FLoRA, and a tree of groups gives the flat answer. A rule that averages factors inside (`inner`) gives neither.

A member is a generator that asks for the training of clients and is sent their updates; a group runs its members' side by side,
so a tree of any height is the same few lines. Members of a group wait for each other, as clients of a round do.

The first inner round has the seed of the run, so its numbers are those of a Cohort; each later one has its own, or all would draw
the same rows and the same fresh ranks.

Reference: HierFedLoRA, arXiv 2503.21213, for groups, a frequency and a depth for each; frozen ranks and stacking are ours.
"""
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from flora.adapter import Adapter, Adapters, all_layers, compress, norm, stack
from flora.client import LocalClient
from flora.cohort import Cohort
from flora.downlink import ROUNDING
from flora.errors import ConfigError, StrategyError
from flora.loop import OnStep
from flora.messages import Broadcast, Update
from flora.parallel import each
from flora.seeds import derive
from flora.strategies import Strategy, aggregate, strategy_named
from flora.targets import blocks_of

Asked: TypeAlias = list[tuple[LocalClient, Adapters | None]]    # who trains next, and the frozen ranks that it sees
Answers: TypeAlias = Mapping[str, Update]


@dataclass(frozen=True)
class Group:
    """Clients, or groups of them, that aggregate `inner_rounds` times before they answer as one client of this name.

    depth: how many blocks nearest the output its clients train (None: all that they would); the least of those above a client
    holds. rank: its answer is compressed to so many ranks a layer (None: the whole stack). inner: the strategy that aggregates
    inside; those that average factors bring their error, and start from one A for all. Raises ConfigError, StrategyError.
    """
    name: str
    members: Sequence["LocalClient | Group"]
    inner_rounds: int = 1
    depth: int | None = None
    rank: int | None = None
    inner: str = "flora"

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError(f"group {self.name!r}: expected at least one member; got none. Leave the group out.")
        need_different_names([self])
        for what, value in (("inner_rounds", self.inner_rounds), ("depth", self.depth), ("rank", self.rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"group {self.name!r}: expected a whole {what} of at least 1; got {value}")
        if not strategy_named(self.inner).groups:
            raise StrategyError(f"group {self.name!r}: expected an inner strategy that can aggregate within a round; got "
                                f"{self.inner}. Use flora.")
        refuse_rule(strategy_named(self.inner), self.members)
        for client in self.clients:
            if client.start is not None:
                raise ConfigError(f"group {self.name!r}: expected clients that start where the group is; got {client.name!r} with "
                                  "a start of its own. Leave its start out.")

    @property
    def clients(self) -> list[LocalClient]:
        """Its clients and those of the groups in it, in order."""
        return leaves(self.members)


def leaves(members: Sequence[LocalClient | Group]) -> list[LocalClient]:
    """All clients in a sequence of clients and groups, in order."""
    return [client for m in members for client in (m.clients if isinstance(m, Group) else [m])]


def groups_in(members: Sequence[LocalClient | Group]) -> Iterator[Group]:
    """All groups in a sequence of clients and groups, those in groups too."""
    for member in members:
        if isinstance(member, Group):
            yield member
            yield from groups_in(member.members)


def need_different_names(members: Sequence[LocalClient | Group]) -> None:
    """Raises ConfigError where two of these clients and groups, or of those in them, have one name."""
    names = [one.name for one in (*groups_in(members), *leaves(members))]
    if len(set(names)) != len(names):
        raise ConfigError(f"expected groups and clients with different names, and a client in one group; got {names}")


def refuse_rule(rule: Strategy, members: Sequence[LocalClient | Group]) -> None:
    """Raises StrategyError where a rule cannot aggregate the answers of the groups among these, as Strategy.groups says."""
    for group in (member for member in members if isinstance(member, Group)):
        if not rule.groups or (rule.groups == "alike" and group.inner != rule.name):
            remedy = f', or give it inner="{rule.name}"' if rule.groups else ""
            raise StrategyError(f"{rule.name}: expected clients whose factors it can combine; got group {group.name!r}, which "
                                f"answers with what {group.inner} makes. Aggregate groups by flora{remedy}.")


def concatenated(parts: Sequence[Adapters]) -> dict[str, Adapter]:
    """The sum of several sets of adapters: for every layer, their ranks one after another."""
    return {layer: stack([part[layer] for part in parts if layer in part]) for layer in all_layers(parts)}


def bounded(adapters: Adapters) -> dict[str, Adapter]:
    """The same ΔW in fewer ranks, up to fp32's rounding, where there are more than min(in, out) / 2: about there frozen ranks begin
    to cost what the base's own product costs."""
    def one(name: str) -> Adapter:
        a = adapters[name]
        if 2 * a.rank <= min(a.shape):
            return a
        less = compress(a, tol=ROUNDING)
        return less if less.rank < a.rank else a

    return dict(zip(adapters, each(one, adapters), strict=True))


def compressed(adapters: Adapters, rank: int) -> tuple[dict[str, Adapter], float]:
    """The best approximation of every layer at this rank, and its relative error in the Frobenius norm, over all layers."""
    def one(name: str) -> tuple[Adapter, float, float]:
        a = adapters[name]
        best = compress(a, rank) if a.rank > rank else a
        return best, 0.0 if best is a else norm(stack([a, best * -1.0])), norm(a)

    found = each(one, adapters)
    lost, whole = (math.hypot(*(entry[i] for entry in found)) for i in (1, 2))
    return {name: best for name, (best, *_) in zip(adapters, found, strict=True)}, lost / whole if whole else 0.0


class GroupCohort(Cohort):
    """A Cohort whose clients may be Groups: made and used as one, one Update a client or group.

    optimizer_states are those of the clients in the groups, and go on through inner rounds too; on_step names these clients, whose
    steps begin at 1 in every inner round. After fit, failures names clients that missed an inner round, with the first reason, and
    groups in which all missed all; seconds has "group": what aggregating inside took. fit also raises ConfigError for a depth over
    the model's blocks, for a client none of whose layers lie within its group's depth, and for groups where one factor trains.
    """
    _now: Cohort | None = None                                  # the inner round that runs
    _round, _version = 0, 0

    @property
    def tokens_per_second(self) -> float:
        """As Cohort's, of the inner round that runs."""
        return self._now.tokens_per_second if self._now else 0.0

    def speed(self, name: str) -> float:
        """Tokens a second of the client of this name, as Cohort counts them, in the inner round that runs."""
        return self._now.speed(name) if self._now else 0.0

    def fit(self, broadcast: Broadcast, frozen: Adapters | Sequence[Adapters | None] | None = None,
            on_step: OnStep | None = None) -> list[Update]:
        """As Cohort.fit; a group takes its inner rounds and answers as one. frozen: for all, or one entry a client or group."""
        self._need(broadcast)
        views = [frozen] * len(self.clients) if frozen is None or isinstance(frozen, Mapping) else list(frozen)
        if len(views) != len(self.clients):
            raise ConfigError(f"frozen: expected one entry a client ({len(self.clients)}); got {len(views)}")
        self.failures, self.seconds, self._round, self._version = {}, {}, 0, broadcast.version
        began, tokens, answers = time.perf_counter(), 0, None
        running = self._together(self.clients, broadcast.start, views, None)
        while True:
            try:
                asked = running.send(answers)
            except StopIteration as done:
                self.rate = tokens / max(1e-9, time.perf_counter() - began)
                return done.value
            answers = self._train(asked, broadcast, on_step)
            tokens += sum(update.metrics["tokens"] for update in answers.values())
            self._round += 1

    def _need(self, broadcast: Broadcast) -> None:
        """Raises ConfigError for groups that this model or broadcast does not fit."""
        need_different_names(self.clients)
        blocks = blocks_of(self.shapes)
        for group in groups_in(self.clients):
            if broadcast.train != "AB":
                raise ConfigError(f'group {group.name!r}: expected a broadcast that trains both factors, "AB"; got one that trains '
                                  f'"{broadcast.train}". Use flora, or leave the groups out.')
            if group.depth is not None and group.depth > len(blocks):
                raise ConfigError(f"group {group.name!r}: expected a depth of at most {len(blocks)}, the blocks that carry adapters"
                                  f"; got {group.depth}")
            for client in group.clients:
                self._within(client, group.depth)

    @property
    def _seed(self) -> int:
        """Of the inner round that is due: the run's own in the first. What is drawn with it is keyed by version too."""
        return derive(self.train_config.seed, "inner", self._round) if self._round else self.train_config.seed

    def _add(self, seconds: Mapping[str, float]) -> None:
        for phase, took in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took

    def _train(self, asked: Asked, broadcast: Broadcast, on_step: OnStep | None) -> dict[str, Update]:
        """One inner round of all that ask for it, in one batch; their updates by name."""
        views = [view for _, view in asked]
        self._now = Cohort(self.model, [client for client, _ in asked], replace(self.train_config, seed=self._seed), self.targets,
                           self.max_tokens_per_batch, self.merge_config, self.optimizer_states)
        self._now.team = self.team
        updates = self._now.fit(replace(broadcast, start=None), views if any(views) else None, on_step)
        self._add(self._now.seconds)
        for name, reason in self._now.failures.items():
            self.failures.setdefault(name, f"inner round {self._round}: {reason}" if self._round else reason)
        return {update.client: update for update in updates}

    def _together(self, members: Sequence[LocalClient | Group], start: Adapters | None, views: Sequence[Adapters | None],
                  depth: int | None) -> Generator[Asked, Answers, list[Update]]:
        """A round of these members side by side: asks for what all ask for; returns their updates, in order."""
        parts = {}
        for member, view in zip(members, views, strict=True):
            part = self._group if isinstance(member, Group) else self._client
            parts[member.name] = part(member, start, view, depth)
        updates, answers = {}, None
        while parts:
            asked: Asked = []
            for name, part in list(parts.items()):
                try:
                    asked += part.send(answers)
                except StopIteration as done:
                    updates[name] = done.value
                    del parts[name]
            if parts:
                answers = yield asked
        return [updates[member.name] for member in members if updates[member.name] is not None]

    def _client(self, client: LocalClient, start: Adapters | None, view: Adapters | None,
                depth: int | None) -> Generator[Asked, Answers, Update | None]:
        """A client's part in a round: it trains once. None where it failed."""
        begun = client if client.start is not None else replace(client, start=start)
        answers = yield [(self._within(begun, depth), view)]
        return answers.get(client.name)

    def _within(self, client: LocalClient, depth: int | None) -> LocalClient:
        """The client with the layers that a depth leaves it. Raises ConfigError where that is none."""
        if depth is None:
            return client
        last = blocks_of(self.shapes)[-depth:]
        layers = [block for block in last if client.layers is None or block in client.layers]
        if not layers:
            raise ConfigError(f"client {client.name!r}: expected layers among the blocks that its group trains, {last}; got "
                              f"{list(client.layers)}. Give it others, or the group more depth.")
        return replace(client, layers=layers)

    def _group(self, group: Group, start: Adapters | None, view: Adapters | None,
               depth: int | None) -> Generator[Asked, Answers, Update | None]:
        """A group's part in a round: its inner rounds, then its answer. None where no member ever gave an update."""
        depth = min((d for d in (depth, group.depth) if d is not None), default=None)
        rule, clients = strategy_named(group.inner), group.clients
        ranks, scale = [client.rank for client in clients], sum(client.alpha / client.rank for client in clients) / len(clients)
        if start is None:
            start = rule.begin(self.shapes, ranks, derive(self._seed, group.name, self._version, "begin"), scale).start
        merges: list[Adapters] = []
        rounds: list[list[Update]] = []
        seen = view
        for _ in range(group.inner_rounds):
            updates = yield from self._together(group.members, start, [seen] * len(group.members), depth)
            if not updates:
                continue
            facts = {"ranks": ranks, "scale": scale, "seed": derive(self._seed, group.name, self._version), "sent": start}
            clock = time.perf_counter()
            made = aggregate(updates, rule.name, **{name: fact for name, fact in facts.items() if name in rule.options})
            merges, start = [*merges, made.merge or {}], made.start
            seen = bounded(concatenated([view or {}, *merges]))
            rounds.append(updates)
            self._add({"group": time.perf_counter() - clock})
        if not rounds:
            self.failures[group.name] = "expected an update of at least one member; all failed"
            return None
        trained = all_layers([update.adapters for updates in rounds for update in updates])
        whole = concatenated([*merges, start or {}])
        return answer(group, {name: whole[name] for name in trained}, rounds)


def answer(group: Group, adapters: Adapters, rounds: Sequence[Sequence[Update]]) -> Update:
    """A group's update, of those of its members by inner round. Examples: of all who gave one; steps, tokens, seconds: sums; loss:
    the mean over all steps; last_loss: of the last inner round, by examples; compress_error: the largest, its own or a member's."""
    updates = [update for given in rounds for update in given]
    sums = {name: sum(u.metrics[name] for u in updates) for name in ("steps", "tokens", "seconds")}
    examples = {update.client: update.num_examples for update in updates}
    metrics = {"loss": sum(u.metrics["loss"] * u.metrics["steps"] for u in updates) / sums["steps"],
               "last_loss": (sum(u.metrics["last_loss"] * u.num_examples for u in rounds[-1])
                             / sum(u.num_examples for u in rounds[-1])),
               **sums, "tokens_per_second": sums["tokens"] / max(1e-9, sums["seconds"]), "inner_rounds": len(rounds)}
    errors = [u.metrics["compress_error"] for u in updates if "compress_error" in u.metrics]
    if group.rank is not None:
        adapters, error = compressed(adapters, group.rank)
        errors.append(error)
    if errors:
        metrics["compress_error"] = max(errors)
    return Update(adapters, sum(examples.values()), metrics, updates[0].base_version, group.name)
