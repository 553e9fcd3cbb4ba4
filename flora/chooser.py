"""How many inner rounds a group makes and how many blocks it trains: the best estimated benefit that the budget lets through.

Cost is the fleet's clock with slow devices in the place of chance, so it grows with
inner_rounds * (transfer + steps * (depth + FORWARD * the other blocks)):
under a deadline a deeper group makes fewer inner rounds, and one depth has the most of them that fit (`frontier`). Benefit is

    scale(group) * inner_rounds ** a * (depth / layers) ** b,   0 < a, b < 1,

the share of its loss that a group takes off in a round: more of either always helps, and ever less. a, b and the scales are fitted
on line to the decreases that were observed. The model is our own: HierFedLoRA (arXiv 2503.21213) chooses both together, by an
objective that is not public in a form we could read. Anything with an `estimate` takes the place of Benefit, and any function
with the signature of `choose` takes the place of that.
"""
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flora.errors import ConfigError
from flora.fleet import Fleet, GroupWork, Work

log = logging.getLogger(__name__)
Groups = Mapping[str, Sequence[str]]
LEAST = 1e-4                                                    # decrease that a round counts as that took nothing off
RANGE = (0.05, 0.95)                                            # of the exponents


class Estimate(Protocol):
    """What `choose` asks of a benefit; it must not fall with either number."""

    def estimate(self, group: str, inner_rounds: int, depth: int) -> float:
        """What so many inner rounds of a group at this depth are worth, in any unit."""
        ...


@dataclass(frozen=True)
class Cost:
    """What a group's round takes. work: a client's inner round at a depth; layers: blocks of the model; most_depth: of clients
    whose memory holds fewer (capacity.most_depth); group_bytes: down and up between group server and server, of (members,
    inner_rounds, depth): a stack grows with all three, an average with depth alone (None: not counted). caution: every device is
    taken to be so many standard deviations of its jitter slow, or a deadline that is just met without chance loses half of them."""
    fleet: Fleet
    work: Callable[[str, int], Work]
    layers: int
    most_depth: Mapping[str, int] = field(default_factory=dict)
    group_bytes: Callable[[Sequence[str], int, int], tuple[float, float]] | None = None
    caution: float = 2.0

    def group(self, members: Sequence[str], inner_rounds: int, depth: int) -> GroupWork:
        """What the fleet's clock takes of this group."""
        down, up = (0.0, 0.0) if self.group_bytes is None else self.group_bytes(members, inner_rounds, depth)
        return GroupWork({client: self.work(client, depth) for client in members}, inner_rounds, down, up)

    def seconds(self, members: Sequence[str], inner_rounds: int, depth: int) -> float:
        """The backhaul, and the slowest member inner_rounds times."""
        return self.fleet.expected(self.group(members, inner_rounds, depth), self.caution)

    def bytes(self, members: Sequence[str], inner_rounds: int, depth: int) -> float:
        """Of all members, both ways, in all inner rounds, and over the backhaul."""
        group = self.group(members, inner_rounds, depth)
        inner = math.fsum(w.down(True) + (inner_rounds - 1) * w.bytes_down + inner_rounds * w.bytes_up
                          for w in group.members.values())
        return inner + group.bytes_down + group.bytes_up

    def depths(self, members: Sequence[str]) -> range:
        """What every member's memory holds."""
        return range(1, min([self.layers, *(self.most_depth.get(client, self.layers) for client in members)]) + 1)


@dataclass(frozen=True)
class Budget:
    """Of a round: seconds (the deadline, of every group), bytes (of all groups; a group has its members' share), or both."""
    seconds: float | None = None
    bytes: float | None = None
    most_inner_rounds: int = 8

    def __post_init__(self) -> None:
        given = [value for value in (self.seconds, self.bytes) if value is not None]
        if not given or not all(value > 0 for value in given):
            raise ConfigError(f"budget: expected positive seconds, bytes or both; got {self.seconds} and {self.bytes}")
        if self.most_inner_rounds < 1:
            raise ConfigError(f"most_inner_rounds: expected at least 1; got {self.most_inner_rounds}")


class Benefit:
    """scale(group) * inner_rounds ** a * (depth / layers) ** b, fitted to what was observed.

    Least squares on the logarithm of the relative decrease of the loss, with a and b drawn to their start by `trust` observations'
    weight and every group's scale by a hundredth of one; an observation counts `forget` times as much with each later one of its
    group. A group that never varies its choice teaches its scale alone; what is known of a and b comes from those that do.
    """

    def __init__(self, layers: int, inner_rounds: float = 0.5, depth: float = 0.5, trust: float = 1.0, forget: float = 0.9):
        if layers < 1 or not trust > 0 or not 0 < forget <= 1 or not all(RANGE[0] <= x <= RANGE[1] for x in (inner_rounds, depth)):
            raise ConfigError(f"benefit: expected layers of at least 1, exponents in {RANGE}, trust > 0 and forget in (0, 1]; got "
                              f"{layers}, {inner_rounds} and {depth}, {trust}, {forget}")
        self.layers, self.start, self.trust, self.forget = layers, (inner_rounds, depth), trust, forget
        self.exponents = self.start
        self.scales: dict[str, float] = {}
        self.seen: dict[str, list[tuple[float, float, float]]] = {}     # log inner rounds, log share of depth, log decrease

    def estimate(self, group: str, inner_rounds: int, depth: int) -> float:
        """The relative decrease of the loss that is expected; of a group that nobody has seen, at the scales' geometric mean."""
        known = self.scales.values()
        scale = self.scales.get(group, math.exp(math.fsum(map(math.log, known)) / len(known)) if known else 0.01)
        return scale * inner_rounds ** self.exponents[0] * (depth / self.layers) ** self.exponents[1]

    def observe(self, group: str, inner_rounds: int, depth: int, loss_before: float, loss_after: float) -> None:
        """Fits anew with one more round of a group, from loss_before to loss_after; a loss that did not fall counts as a decrease
        of LEAST. Raises ConfigError for losses that are not finite and positive, and for a depth that is not of this model."""
        if not (0 < loss_before < math.inf and 0 <= loss_after < math.inf):
            raise ConfigError(f"group {group!r}: expected finite losses, a positive one before; got {loss_before} and {loss_after}")
        if inner_rounds < 1 or not 1 <= depth <= self.layers:
            raise ConfigError(f"group {group!r}: expected inner_rounds of at least 1 and a depth from 1 to {self.layers}; got "
                              f"{inner_rounds} and {depth}")
        decrease = max(LEAST, (loss_before - loss_after) / loss_before)
        self.seen.setdefault(group, []).append((math.log(inner_rounds), math.log(depth / self.layers), math.log(decrease)))
        self._fit()

    def _fit(self) -> None:
        names = sorted(self.seen)
        rows, wanted, weights = [], [], []
        for g, name in enumerate(names):
            for age, (inner, depth, decrease) in enumerate(reversed(self.seen[name])):
                rows.append([inner, depth, *(float(h == g) for h in range(len(names)))])
                wanted.append(decrease)
                weights.append(self.forget ** age)
        prior = np.array([*self.start, *[math.log(0.01)] * len(names)])
        hold = np.diag([self.trust, self.trust, *[0.01] * len(names)])
        X, w = np.array(rows), np.array(weights)[:, None]
        found = np.linalg.solve(X.T @ (w * X) + hold, X.T @ (w[:, 0] * np.array(wanted)) + hold @ prior)
        self.exponents = (float(np.clip(found[0], *RANGE)), float(np.clip(found[1], *RANGE)))
        self.scales = {name: math.exp(value) for name, value in zip(names, found[2:], strict=True)}


def choose(groups: Groups, cost: Cost, budget: Budget, benefit: Estimate) -> dict[str, tuple[int, int]]:
    """(inner_rounds, depth) of every group: of the pairs within the budget, the one of the highest estimate.

    Ties (to 12 digits: what is equal on paper is equal) go to the fewer seconds, then the fewer inner rounds. One inner round at
    the largest depth that fits is what is left where no second fits. A group for which even one inner round at depth 1 is too much
    is not in the answer, and a warning names it (`left_out` says why). Raises ConfigError where that is every group.
    """
    chosen = {}
    for name, members in groups.items():
        pairs = _pairs(members, cost, budget, _share(groups, name))
        if pairs:
            chosen[name] = max(pairs, key=lambda p: (_rounded(benefit.estimate(name, *p)), -_rounded(pairs[p]), -p[0]))
    if len(chosen) < len(groups) or not groups:
        out = left_out(groups, cost, budget)
        if not chosen:
            raise ConfigError("budget: expected room for one group at least; got room for none: "
                              f"{'; '.join(out.values()) or 'no groups'}. Raise it, or lower the steps")
        log.warning("left out of the round: %s", "; ".join(out.values()))
    return chosen


def left_out(groups: Groups, cost: Cost, budget: Budget) -> dict[str, str]:
    """Why groups cannot make one inner round at depth 1, by name."""
    out = {}
    for name, members in groups.items():
        if not cost.depths(members):
            slim = sorted(client for client in members if cost.most_depth.get(client, cost.layers) < 1)
            out[name] = f"{name}: the memory of {', '.join(slim[:8])} does not hold one block"
        elif not _pairs(members, cost, budget, _share(groups, name)):
            seconds, count = cost.seconds(members, 1, 1), cost.bytes(members, 1, 1)
            slowest = max(members, key=lambda client: (cost.seconds([client], 1, 1), client))
            out[name] = f"{name}: one inner round at depth 1 takes {seconds:.3g} s (slowest: {slowest}) and {count / 1e6:.3g} MB"
    return out


def frontier(members: Sequence[str], cost: Cost, budget: Budget) -> dict[int, int]:
    """The most inner rounds of these members that fit at every depth: what a deeper group pays in frequency. Depths without one are
    left out."""
    best: dict[int, int] = {}
    for inner_rounds, depth in _pairs(members, cost, budget, 1.0):
        best[depth] = max(inner_rounds, best.get(depth, 0))
    return best


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _share(groups: Groups, name: str) -> float:
    """Of the bytes: as the group's members to all."""
    if not groups[name]:
        raise ConfigError(f"group {name!r}: expected members; got none. Leave it out")
    return len(groups[name]) / sum(map(len, groups.values()))


def _pairs(members: Sequence[str], cost: Cost, budget: Budget, share: float) -> dict[tuple[int, int], float]:
    """(inner_rounds, depth) within the budget, and their seconds."""
    found = {}
    for depth in cost.depths(members):
        for inner_rounds in range(1, budget.most_inner_rounds + 1):
            seconds = cost.seconds(members, inner_rounds, depth)
            late = budget.seconds is not None and seconds > budget.seconds
            if late or (budget.bytes is not None and cost.bytes(members, inner_rounds, depth) > share * budget.bytes):
                break                                           # more inner rounds cost more
            found[inner_rounds, depth] = seconds
    return found
