"""Devices of some classes, and the simulated seconds of a round on them: real training, simulated time.

The clock of a round is a heap of events. A group begins when the broadcast has crossed the backhaul; in each inner round every
member takes the group's broadcast, trains, and sends its update over its own links; the inner round ends when the last member is
back, and the group's update crosses the backhaul after the last one. The round ends with the slowest group. A device that vanishes
is noticed at once, and the group goes on without it. Under a deadline the inner round i of n ends at (i + 1) / n of what the
backhaul leaves, at the latest: who is not back is late and lost for the round. Links are a member's own: no server is congested.

Chance is a function of (seed, round, client) alone, so neither the order of clients nor who else takes part changes a device's
round.
"""
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora.errors import ConfigError
from flora.seeds import derive

FORWARD = 0.5           # of a trained block's time that a frozen one takes: its backward is one product, as its forward is
ARRIVED, VANISHED, LATE = range(3)                              # events, in the order in which they count at one moment


@dataclass(frozen=True)
class DeviceClass:
    """Devices of one kind. seconds_per_layer_step: of one optimiser step in one block that trains, forward and backward; memory_mb:
    for training, in 10^6 bytes; up_mbps, down_mbps: 10^6 bits a second; availability: the probability that it stays for a round;
    jitter: σ of the log-normal (median 1) that multiplies its seconds of training, and another one its transfers, anew every round.
    """
    name: str
    count: int
    seconds_per_layer_step: float
    memory_mb: float
    up_mbps: float
    down_mbps: float
    availability: float = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        def need(name: str, good: bool, expected: str) -> None:
            if not good:
                raise ConfigError(f"device class {self.name!r}: {name}: expected {expected}; got {getattr(self, name)!r}")

        need("count", int(self.count) == self.count and self.count >= 1, "at least 1 device; leave a class without devices out")
        for name in ("seconds_per_layer_step", "memory_mb", "up_mbps", "down_mbps"):
            need(name, 0 < getattr(self, name) < math.inf, "a positive number")
        need("availability", 0 < self.availability <= 1, "a probability in (0, 1]")
        need("jitter", 0 <= self.jitter < math.inf, "a number >= 0")


@dataclass(frozen=True)
class Device:
    """One device of a class."""
    name: str
    kind: DeviceClass


@dataclass(frozen=True)
class Work:
    """A client's inner round: optimiser steps, blocks that train, blocks that only run forward, bytes of its messages.

    first_down: bytes down before the first inner round, where it takes the broadcast of all groups (None: as before the others)."""
    steps: int
    depth: int
    bytes_down: float = 0
    bytes_up: float = 0
    frozen: int = 0
    first_down: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0 or self.depth < 1 or min(self.bytes_down, self.bytes_up, self.frozen, self.first_down or 0) < 0:
            raise ConfigError(f"expected a depth of at least 1, and steps, bytes and frozen of at least 0; got {self}")

    def down(self, first: bool) -> float:
        """Bytes before the first inner round, or before a later one."""
        return self.bytes_down if not first or self.first_down is None else self.first_down


@dataclass(frozen=True)
class GroupWork:
    """A group's round: every member's work in each of its inner rounds, and the bytes of the group's own messages."""
    members: Mapping[str, Work]
    inner_rounds: int = 1
    bytes_down: float = 0
    bytes_up: float = 0

    def __post_init__(self) -> None:
        if not self.members or self.inner_rounds < 1 or min(self.bytes_down, self.bytes_up) < 0:
            raise ConfigError("a group: expected members, inner_rounds of at least 1 and bytes of at least 0; got "
                              f"{len(self.members)} members, {self.inner_rounds}, {self.bytes_down} and {self.bytes_up}")


@dataclass
class Spent:
    """A client's seconds in a round: train + transfer + wait, from 0 to the end of the round, or to its loss. start: of its first
    download; finish: when its last update arrived, or it was lost."""
    train: float = 0.0
    transfer: float = 0.0
    wait: float = 0.0
    start: float = 0.0
    finish: float = 0.0


@dataclass(frozen=True)
class Round:
    """seconds: until the last group's update is there; clients; lost: "vanished" or "late", by client; groups: when each one's
    update was there (without those that lost everybody); stragglers: whom each of these waited for in its last inner round."""
    seconds: float
    clients: Mapping[str, Spent]
    lost: Mapping[str, str]
    groups: Mapping[str, float]
    stragglers: Mapping[str, str]


def devices(classes: Sequence[DeviceClass], seed: int = 0) -> list[Device]:
    """Every class's devices, device-0 and on, in an order drawn by the seed. Raises ConfigError for none, or a name twice."""
    names = [kind.name for kind in classes]
    if not classes or len(set(names)) < len(names):
        raise ConfigError(f"fleet: expected at least one class, each with its own name; got {', '.join(names) or 'none'}")
    kinds = [kind for kind in classes for _ in range(kind.count)]
    order, width = np.random.RandomState(derive(seed, "devices") % 2**32).permutation(len(kinds)), len(str(len(kinds) - 1))
    return [Device(f"device-{k:0{width}d}", kinds[i]) for k, i in enumerate(order)]


def assign(clients: Sequence[str], found: Sequence[Device]) -> dict[str, Device]:
    """A device out of those found for every client, in order. Raises ConfigError where there are not as many."""
    if len(clients) != len(found):
        raise ConfigError(f"fleet: expected one device a client ({len(clients)}); got {len(found)}. Change the counts of the "
                          "classes, or num_clients.")
    return dict(zip(clients, found, strict=True))


def phases(kind: DeviceClass, work: Work, first: bool = False) -> tuple[float, float, float]:
    """Seconds of a device's download, training and upload in an inner round, without chance."""
    return (8e-6 * work.down(first) / kind.down_mbps,
            work.steps * kind.seconds_per_layer_step * (work.depth + FORWARD * work.frozen), 8e-6 * work.bytes_up / kind.up_mbps)


@dataclass(frozen=True)
class Fleet:
    """Clients' devices by client, and the link between group servers and the server (None: it takes no time)."""
    devices: Mapping[str, Device]
    seed: int = 0
    backhaul_mbps: float | None = None

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigError("fleet: expected at least one device; got none")
        if self.backhaul_mbps is not None and not self.backhaul_mbps > 0:
            raise ConfigError(f"fleet: backhaul_mbps: expected a positive number; got {self.backhaul_mbps}")

    def kind(self, client: str) -> DeviceClass:
        """The class of a client's device. Raises ConfigError where it has none."""
        if client not in self.devices:
            raise ConfigError(f"fleet: expected a device for client {client!r}; got devices for "
                              f"{', '.join(sorted(self.devices)[:8])}")
        return self.devices[client].kind

    def backhaul(self, count: float) -> float:
        """Seconds of `count` bytes between a group's server and the server."""
        return 0.0 if self.backhaul_mbps is None else 8e-6 * count / self.backhaul_mbps

    def expected(self, group: GroupWork, caution: float = 0.0) -> float:
        """Seconds of a group's round without chance: the backhaul, and its slowest member in every inner round.

        caution: every device is so many standard deviations of its jitter slower than its median."""
        def slowest(first: bool) -> float:
            return max(sum(phases(kind, work, first)) * math.exp(caution * kind.jitter)
                       for client, work in group.members.items() for kind in [self.kind(client)])

        first, later = slowest(True), slowest(False)
        return self.backhaul(group.bytes_down) + first + (group.inner_rounds - 1) * later + self.backhaul(group.bytes_up)

    def round(self, number: int, groups: Mapping[str, GroupWork], deadline: float | None = None,
              enough: int | None = None) -> Round:
        """The clock of round `number`. enough: an inner round ends when so many of a group's members are back, and the others are
        late.

        Raises ConfigError for a client in two groups or without a device, and for a deadline that nobody would meet without chance.
        """
        names = [client for group in groups.values() for client in group.members]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"fleet: expected clients, each in one group; got {', '.join(sorted(names)) or 'none'}")
        least = min(self.expected(GroupWork({client: work}, group.inner_rounds, group.bytes_down, group.bytes_up))
                    for group in groups.values() for client, work in group.members.items())
        if deadline is not None and not deadline >= least:
            raise ConfigError(f"deadline: expected at least {least:.3g} s, which the fastest client takes; got {deadline:g}. Raise "
                              "it, or lower steps, depth or inner_rounds.")
        return _Clock(self, number, groups, deadline, enough).run()


@dataclass
class _State:
    """A group in a round: members not lost, those still at work in this inner round, when it began, who came last."""
    alive: set[str]
    limits: list[float]
    working: set[str] = field(default_factory=set)
    inner: int = 0
    began: float = 0.0
    last: str = ""


class _Clock:
    """The events of one round: (seconds, what, group, client, inner round)."""

    def __init__(self, fleet: Fleet, number: int, groups: Mapping[str, GroupWork], deadline: float | None, enough: int | None):
        self.fleet, self.groups, self.enough = fleet, groups, math.inf if enough is None else enough
        self.events: list[tuple[float, int, str, str, int]] = []
        self.states, self.lost, self.done = {}, {}, {}
        self.phases: dict[str, list[tuple[float, float, float]]] = {}     # of the first inner round, of each later one
        self.gone: dict[str, float] = {}                        # in inner rounds; inf where it stays
        self.spent = {client: Spent() for name in sorted(groups) for client in sorted(groups[name].members)}
        for name, group in groups.items():
            began, n = fleet.backhaul(group.bytes_down), group.inner_rounds
            room = math.inf if deadline is None else deadline - fleet.backhaul(group.bytes_up) - began
            room = max(0.0, room)
            more = max(8e-6 * (work.down(True) - work.bytes_down) / fleet.kind(c).down_mbps for c, work in group.members.items())
            more = min(max(0.0, more), room)                    # what the broadcast takes longer than a stack
            self.states[name] = _State(set(group.members), [began + more + (room - more) * (i + 1) / n for i in range(n)])
            for client, work in group.members.items():
                kind, draw = fleet.kind(client), np.random.RandomState(derive(fleet.seed, "fleet", number, client) % 2**32)
                train, link = np.exp(kind.jitter * draw.standard_normal(2))
                both = [phases(kind, work, first) for first in (True, False)]
                self.phases[client] = [(down * link, steps * train, up * link) for down, steps, up in both]
                leaves, when = draw.random_sample(2)
                self.gone[client] = n * when if leaves >= kind.availability else math.inf

    def run(self) -> Round:
        for name in sorted(self.groups):
            self.begin(name, self.fleet.backhaul(self.groups[name].bytes_down))
        while self.events:
            now, what, name, client, inner = heapq.heappop(self.events)
            state = self.states[name]
            if inner != state.inner:
                continue                                        # everybody was back before this limit
            for one in sorted(state.working) if what == LATE else [client]:
                self.stop(state, one, now, what)
            for one in sorted(state.working) if len(state.alive) - len(state.working) >= self.enough else []:
                self.stop(state, one, now, LATE)
            if not state.working:
                self.close(name, now)
        end = max(self.done.values(), default=max(spent.finish for spent in self.spent.values()))
        for client, spent in self.spent.items():
            spent.wait = (spent.finish if client in self.lost else end) - spent.train - spent.transfer
        return Round(end, self.spent, self.lost, self.done, {name: self.states[name].last for name in self.done})

    def begin(self, name: str, now: float) -> None:
        state = self.states[name]
        state.began, state.working = now, set(state.alive)
        for client in sorted(state.alive):
            if state.inner == 0:
                self.spent[client].start = now
            share = self.gone[client] - state.inner             # of this inner round's work, when it vanishes
            event = (VANISHED, share) if share < 1 else (ARRIVED, 1.0)
            took = event[1] * sum(self.phases[client][min(1, state.inner)])
            heapq.heappush(self.events, (now + took, event[0], name, client, state.inner))
        if state.limits[state.inner] < math.inf:
            heapq.heappush(self.events, (max(now, state.limits[state.inner]), LATE, name, "", state.inner))

    def stop(self, state: _State, client: str, now: float, what: int) -> None:
        """A member is back, or lost: what it has done since the inner round began is counted."""
        down, train, up = self.phases[client][min(1, state.inner)]
        spent, worked = self.spent[client], now - state.began
        spent.train += min(max(worked - down, 0.0), train)
        spent.transfer += min(worked, down) + min(max(worked - down - train, 0.0), up)
        spent.finish = now
        state.working.discard(client)
        if what == ARRIVED:
            state.last = client
        else:
            state.alive.discard(client)
            self.lost[client] = "vanished" if what == VANISHED else "late"

    def close(self, name: str, now: float) -> None:
        """An inner round is over."""
        state, group = self.states[name], self.groups[name]
        state.inner += 1
        if state.alive and state.inner < group.inner_rounds:
            self.begin(name, now)
        elif state.alive:
            self.done[name] = now + self.fleet.backhaul(group.bytes_up)
