"""Groups of clients and a fleet of devices in a run: who is in which group, what each does in a round, and what that takes.

Training is real, time is simulated: before a round trains, the fleet's clock says how long everybody would take and whom the round
loses; those do not train. Without groups all clients are one group of one inner round, so every strategy is judged by one clock.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from flora.capacity import Memory, blocks, most_depth, ranks
from flora.chooser import Benefit, Budget, Cost, choose
from flora.client import LocalClient
from flora.config import RunConfig
from flora.errors import ConfigError
from flora.fleet import DeviceClass, Fleet, GroupWork, Round, Work, assign, devices
from flora.group import Group
from flora.grouping import Histograms, near_iid, random_groups, similar_together
from flora.targets import layer_index

Shapes = Mapping[str, tuple[int, int]]
Party = LocalClient | Group
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass
class Hierarchy:
    """members: clients' names by group, none without groups; fleet: their devices, or None; left_out: clients whose device holds no
    rank, and why. benefit: of the chooser, fitted to the rounds so far."""
    config: RunConfig
    shapes: Shapes
    clients: Mapping[str, LocalClient]
    members: Mapping[str, Sequence[str]]
    steps: Mapping[str, int]
    fleet: Fleet | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    benefit: Benefit | None = None

    def everybody(self) -> list[Party]:
        """Who may answer the server: the clients, or their groups with the config's inner rounds and depth."""
        own = self.config.groups
        return self._groups(dict.fromkeys(self.members, (own.inner_rounds, own.depth))) if own else list(self.clients.values())

    def parties(self, received: Mapping[str, int] | None = None) -> list[Party]:
        """Who is due in the next round: everybody, or the groups that fit, with the inner rounds and depths that are chosen.

        received: bytes down by party, as `clock` will count them."""
        if not self.members or not self.config.groups.choose:
            return self.everybody()
        own = self.config.groups
        budget = Budget(self.config.round_deadline, own.bytes_mb and 1e6 * own.bytes_mb)
        return self._groups(choose(self.members, self._cost(received or {}), budget, self.benefit))

    def shrink(self, clients: Sequence[LocalClient]) -> None:
        """Takes over these clients, some of which have pruned their ranks: the clock counts what they train from now on."""
        self.clients = {**self.clients, **{client.name: client for client in clients}}

    def _groups(self, chosen: Mapping[str, tuple[int, int | None]]) -> list[Party]:
        own = self.config.groups
        return [Group(name, [self.clients[c] for c in self.members[name]], inner, depth, own.rank, own.inner)
                for name, (inner, depth) in chosen.items()]

    def clock(self, number: int, parties: Sequence[Party], received: Mapping[str, int], train: str,
              enough: int | None = None) -> tuple[list[Party], Round | None]:
        """The round as the fleet's clock has it, and the parties without whom it loses; None without a fleet.

        received: bytes down by party; train: what trains (Broadcast.train); enough: answers that end the round."""
        if self.fleet is None:
            return list(parties), None
        work = {p.name: self._group(p, received.get(p.name, 0)) for p in parties if isinstance(p, Group)}
        flat = [p for p in parties if isinstance(p, LocalClient)]
        if flat:
            work["everybody"] = GroupWork({c.name: self._work(c.name, None, received.get(c.name, 0), train) for c in flat})
        found = self.fleet.round(number, work, self.config.round_deadline, enough)
        left = []
        for party in parties:
            if isinstance(party, Group):
                stay = [client for client in party.members if client.name not in found.lost]
                left += [replace(party, members=stay)] if stay else []
            elif party.name not in found.lost:
                left.append(party)
        return left, found

    def observe(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Fits the chooser's benefit to rows of metrics.jsonl: what groups took off the loss on their clients' held-out rows."""
        for row in rows if self.benefit is not None else ():
            if row["kind"] == "client" and row.get("eval_loss_before") and row.get("eval_loss_after") is not None:
                self.benefit.observe(row["client"], row["inner_rounds"], row["depth"] or len(blocks(self.shapes)),
                                     row["eval_loss_before"], row["eval_loss_after"])

    def _numbers(self, depth: int | None, train: str = "AB") -> int:
        """Numbers a rank of the factors that travel, in the blocks that train."""
        top = set(blocks(self.shapes)[-depth:]) if depth else None
        return sum(out * ("B" in train) + inn * ("A" in train) for name, (out, inn) in self.shapes.items()
                   if top is None or layer_index(name) in top)

    def _work(self, client: str, depth: int | None, down: float, train: str = "AB", first: float | None = None) -> Work:
        every, rank = len(blocks(self.shapes)), self.clients[client].rank
        width = BYTES[self.config.adapter_dtype]
        up = {"core": rank * rank * len(self.shapes), "weight": sum(o * i for o, i in self.shapes.values())}.get(
            train, rank * self._numbers(depth, train))
        return Work(self.steps[client], depth or every, down, width * up, every - (depth or every), first)

    def _inside(self, names: Sequence[str], depth: int | None, received: float) -> dict[str, Work]:
        """Every member's inner round: before the first it takes the broadcast, before a later one what its group has made (the
        stack of all, or its own rank of an average). It sends its adapters."""
        width = BYTES[self.config.adapter_dtype] * self._numbers(depth)
        stack = sum(self.clients[name].rank for name in names)
        return {name: self._work(name, depth, width * (stack if self._stacks else self.clients[name].rank), first=received)
                for name in names}

    @property
    def _stacks(self) -> bool:
        """Whether groups go on from stacks (florist's is cut: counted as if whole); else from factors of the clients' ranks."""
        return self.config.groups.inner in ("flora", "florist")

    def _answer(self, names: Sequence[str], inner_rounds: int, depth: int | None) -> int:
        """Bytes of what a group of these sends the server."""
        ranks = [self.clients[name].rank for name in names]
        rank = self.config.groups.rank or (inner_rounds * sum(ranks) if self._stacks else max(ranks))
        return BYTES[self.config.adapter_dtype] * self._numbers(depth) * rank

    def _group(self, group: Group, received: float) -> GroupWork:
        """The group's own messages cross the backhaul."""
        names = [client.name for client in group.clients]
        return GroupWork(self._inside(names, group.depth, received), group.inner_rounds, received,
                         self._answer(names, group.inner_rounds, group.depth))

    def _cost(self, received: Mapping[str, int]) -> Cost:
        home = {client: group for group, names in self.members.items() for client in names}

        @cache
        def inside(group: str, depth: int) -> dict[str, Work]:
            return self._inside(self.members[group], depth, received.get(group, 0))

        def work(client: str, depth: int) -> Work:
            return inside(home[client], depth)[client]

        def backhaul(names: Sequence[str], inner_rounds: int, depth: int) -> tuple[float, float]:
            return received.get(home[names[0]], 0), self._answer(names, inner_rounds, depth)

        memory, every = _memory(self.config), len(blocks(self.shapes))
        fits = {c: most_depth(self.fleet.devices[c], self.shapes, self.clients[c].rank, memory) for c in self.clients}
        return Cost(self.fleet, work, every, fits, backhaul)


def _memory(config: RunConfig) -> Memory:
    return Memory(config.fleet_memory.base_mb, config.fleet_memory.activation_mb)


def hierarchy_of(config: RunConfig, shapes: Shapes, clients: Sequence[LocalClient], found: Histograms,
                 steps: Mapping[str, int]) -> Hierarchy:
    """The groups and the fleet of a run. found: histograms of the clients' rows; steps: optimiser steps of a client in a round.

    A device bounds its client's rank; who cannot hold rank 1 is left out, and named. Raises ConfigError.
    """
    own, fleet, out = config.groups, None, {}
    held = {client.name: client for client in clients}
    if config.fleet:
        kinds = [DeviceClass(**kind.model_dump()) for kind in config.fleet]
        given = assign(list(held), devices(kinds, config.seed))
        depth = (own.depth if own and not own.choose else 1 if own else None) or len(blocks(shapes))
        fit, out = ranks(given, shapes, depth, _memory(config), max(client.rank for client in clients))
        held = {name: replace(held[name], rank=min(held[name].rank, rank), alpha=held[name].alpha * min(1, rank / held[name].rank))
                for name, rank in fit.items()}
        fleet = Fleet({name: given[name] for name in held}, config.seed, config.backhaul_mbps)
    groups: dict[str, list[str]] = {}
    if own:
        if own.choose and fleet is None:
            raise ConfigError("groups.choose: expected a fleet, whose clock it asks; got none. Give fleet, or leave choose out.")
        compute = {name: 1.0 / fleet.kind(name).seconds_per_layer_step for name in held} if fleet else None
        there = {name: found[name] for name in held}
        made = {"near_iid": lambda: near_iid(there, own.count, compute, config.seed),
                "random": lambda: random_groups(there, own.count, config.seed),
                "similar": lambda: similar_together(there, own.count)}[own.by]()
        groups = {f"group-{i}": names for i, names in enumerate(made)}
    benefit = Benefit(len(blocks(shapes))) if own and own.choose else None
    return Hierarchy(config, shapes, held, groups, steps, fleet, out, benefit)


def clock_row(found: Round | None, before: float) -> dict[str, Any]:
    """What the server's row says of a round's simulated time; before: seconds of all rounds so far."""
    if found is None:
        return {}
    return {"simulated_seconds": found.seconds, "simulated_total": before + found.seconds, "lost": len(found.lost)}
