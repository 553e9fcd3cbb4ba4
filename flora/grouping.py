"""Groups of clients that look alike together: mean over groups of JS(group, all) + balance of compute, made small by swaps.

A group whose rows, taken together, are distributed as everybody's learns in its inner rounds what the whole cohort would. Clients
are put there by their histograms (client -> bin -> count), never by their rows: greedily, the clients that weigh most first, then
swaps of two clients of different groups while one lowers the objective. A group that is a client short holds an empty slot, and a
swap with it is a move. Sizes differ by at most one. All of it is a function of the histograms, the compute and the seed: the order
of the clients changes nothing.

HierFedLoRA (arXiv 2503.21213) groups by label distributions, greedily; its objective is not public in a form we could read, so
this one is our own.
"""
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flora.errors import ConfigError
from flora.seeds import derive

Histograms = Mapping[str, Mapping[Any, float]]
Groups = list[list[str]]
KINDS = ("js", "kl", "l1")
STARTS, FEW = 3, 256            # searches from random starts after the greedy one, the best is kept; for up to so many clients
LEAST = 1e-9                                                    # that a swap must lower the objective by


def histograms(rows: Mapping[str, Sequence[Mapping[str, Any]]], label: str = "label") -> dict[str, dict[str, float]]:
    """Rows of every label, by client: what a client tells the server about its data, and all it tells.

    Rows without the column count for nothing. Raises ConfigError that names the clients without one labelled row: labels and tokens
    of different clients cannot be compared, so there is no falling back for some of them; `token_histograms` needs no labels.
    """
    found = {name: Counter(str(row[label]) for row in own if row.get(label) is not None) for name, own in rows.items()}
    empty = sorted(name for name, counts in found.items() if not counts)
    if empty:
        raise ConfigError(f"expected rows with a {label!r} of every client; got none of {_some(empty)}. Name another label, leave "
                          "these clients out, or group all by token_histograms.")
    return {name: {key: float(counts[key]) for key in sorted(counts)} for name, counts in found.items()}


def token_histograms(tokens: Mapping[str, Iterable[Sequence[int]]], bins: int = 64, seed: int = 0) -> dict[str, dict[int, float]]:
    """Tokens of every hashed bin, by client; for rows without labels. The seed hashes a token id to its bin.

    A client computes its own from its ids and sends `bins` counts. They reveal how many tokens it has and, to whoever knows the
    seed, how often the tokens of each bin occur together: vocabulary / bins of them share one, so a word is not read off, but a
    guess about rare words or a language can be tested. Nothing is noised: there is no differential privacy here. Counts of the
    nearest of some centroids of embeddings, client -> centroid -> count, do as well in the place of these.
    """
    if bins < 2:
        raise ConfigError(f"bins: expected at least 2, which tell clients apart; got {bins}")
    key, found = np.uint64(derive(seed, "token bins")), {}
    for name, rows in tokens.items():
        ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, np.int64) for row in rows)])
        counts = np.bincount(_mixed(ids.astype(np.uint64) ^ key) % np.uint64(bins), minlength=bins)
        found[name] = {i: float(count) for i, count in enumerate(counts)}
    _table(found)
    return found


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: neighbours land far apart."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def total(found: Histograms, names: Iterable[str]) -> dict[Any, float]:
    """The histogram of several clients together."""
    sums: dict[Any, float] = {}
    for name in names:
        for key, count in found[name].items():
            sums[key] = sums.get(key, 0.0) + count
    return sums


def divergence(one: Mapping[Any, float], other: Mapping[Any, float], kind: str = "js") -> float:
    """How far the histogram `one` is from the other, normalised to p and q, by this kind.

    js: Jensen-Shannon, KL(p, m) / 2 + KL(q, m) / 2 with m = (p + q) / 2, base 2: 0 to 1 (not its square root). kl: KL(p, q) =
    Σ p log2(p / q), bits; inf where q lacks a bin of p. l1: Σ |p - q|, 0 to 2.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    _, _, counts = _table({"one": one, "other": other})
    p, q = counts / counts.sum(1, keepdims=True)
    if kind == "l1":
        return float(np.abs(p - q).sum())
    if kind == "js":
        return float(_js(p, q))
    inside = p > 0
    with np.errstate(divide="ignore"):
        return max(0.0, float((p[inside] * np.log2(p[inside] / q[inside])).sum()))


def near_iid(found: Histograms, num_groups: int, compute: Mapping[str, float] | None = None, seed: int = 0) -> Groups:
    """num_groups groups, each near the distribution of all: the lowest Σ_g JS(g, all) / G + Σ_g (compute_g / mean compute - 1)² / G
    found.

    compute: what a client adds to its group, such as steps a second (None: sizes alone are balanced). Greedy, and for up to 256
    clients from three random starts by the seed too, each improved by swaps until none helps; every swap lowers the objective, so
    it ends. Sizes differ by at most one; members and groups come sorted by name. Raises ConfigError for more groups than clients
    or an empty histogram.
    """
    search = _Search(found, num_groups, compute)
    more = STARTS if len(found) <= FEW else 0
    starts = [search.greedy()] + [search.shuffled(derive(seed, "start", n)) for n in range(more)]
    return search.groups(min((search.improved(slots, 1) for slots in starts), key=search.objective))


def random_groups(found: Histograms, num_groups: int, seed: int = 0) -> Groups:
    """Clients dealt at random, sizes differing by at most one."""
    search = _Search(found, num_groups)
    return search.groups(search.shuffled(derive(seed, "random groups")))


def similar_together(found: Histograms, num_groups: int) -> Groups:
    """The worst case: clients of like labels in one group, with swaps that raise the mean divergence as far as they can."""
    search = _Search(found, num_groups)
    return search.groups(search.improved(search.sorted_by_bin(), -1))


def measure(found: Histograms, groups: Groups, compute: Mapping[str, float] | None = None) -> dict[str, float]:
    """Divergences of groups from all clients (found: their histograms): js, kl and l1, means over the groups; worst, the largest
    js; compute, the largest group's over the mean (sizes where none is given). Raises ConfigError for a client in no group, or in
    two."""
    members = sorted(name for group in groups for name in group)
    if members != sorted(found) or not all(groups):
        raise ConfigError(f"expected every client in exactly one group, and no group empty; got {len(members)} places in "
                          f"{len(groups)} groups for {len(found)} clients")
    everyone = total(found, sorted(found))
    parts = [total(found, sorted(group)) for group in groups]
    by_kind = {kind: [divergence(part, everyone, kind) for part in parts] for kind in KINDS}
    amounts = [math.fsum(1.0 if compute is None else compute[name] for name in group) for group in groups]
    return {**{kind: float(np.mean(values)) for kind, values in by_kind.items()}, "worst": max(by_kind["js"]),
            "compute": max(amounts) * len(groups) / math.fsum(amounts)}


def report(found: Histograms, groups: Groups, compute: Mapping[str, float] | None = None, seed: int = 0,
           draws: int = 20) -> dict[str, dict[str, float]]:
    """What `measure` says of these groups of the clients found, of random ones (the mean of so many draws, and the draw of the
    least js), and of similar clients together."""
    at_random = [measure(found, random_groups(found, len(groups), derive(seed, n)), compute) for n in range(max(1, draws))]
    return {"near-IID": measure(found, groups, compute),
            "random": {key: float(np.mean([one[key] for one in at_random])) for key in at_random[0]},
            "random, the best": min(at_random, key=lambda one: one["js"]),
            "similar together": measure(found, similar_together(found, len(groups)), compute)}


class _Search:
    """Clients and empty slots in G groups of one number of slots; `slots` is the group of each, (G * slots a group,)."""

    def __init__(self, found: Histograms, num_groups: int, compute: Mapping[str, float] | None = None):
        self.names, _, counts = _table(found)
        n = len(self.names)
        if num_groups < 1 or num_groups > n:
            raise ConfigError(f"num_groups: expected 1 to {n}, the number of clients; got {num_groups}. Lower it, or bring more "
                              "clients.")
        self.num_groups, self.size = num_groups, -(-n // num_groups)
        empty = num_groups * self.size - n                      # fewer than groups: at most one in each
        self.counts = np.vstack([counts, np.zeros((empty, counts.shape[1]))])
        self.everyone = counts.sum(0) / counts.sum()
        self.empty = np.arange(len(self.counts)) >= n
        self.compute = np.append(_amounts(self.names, compute), np.zeros(empty))
        self.balanced = compute is not None

    def cost(self, counts: np.ndarray, amounts: np.ndarray) -> np.ndarray:
        """A group's part of the objective: (..., bins) and (...,) to (...,)."""
        apart = _js(counts / counts.sum(-1, keepdims=True), self.everyone)
        return apart + (amounts * self.num_groups / self.compute.sum() - 1) ** 2 if self.balanced else apart

    def sums(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = np.stack([self.counts[slots == g].sum(0) for g in range(self.num_groups)])
        return counts, np.bincount(slots, self.compute, self.num_groups)

    def objective(self, slots: np.ndarray) -> float:
        return float(self.cost(*self.sums(slots)).mean())

    def greedy(self) -> np.ndarray:
        """The heaviest clients first, each where it lowers the objective most, among the groups that have the fewest."""
        slots, room = np.full(len(self.counts), -1), np.zeros(self.num_groups, int)
        counts, amounts = np.zeros((self.num_groups, self.counts.shape[1])), np.zeros(self.num_groups)
        for k in sorted(range(len(slots)), key=lambda k: (self.empty[k], -self.counts[k].sum(), k)):
            open_ = np.flatnonzero(room == room.min())
            after = self.cost(counts[open_] + self.counts[k], amounts[open_] + self.compute[k])
            before = np.where(room[open_] > 0, self.cost(np.maximum(counts[open_], LEAST), amounts[open_]), 0.0)
            g = open_[int(np.argmin(after - before))]
            slots[k], room[g], counts[g], amounts[g] = g, room[g] + 1, counts[g] + self.counts[k], amounts[g] + self.compute[k]
        return slots

    def shuffled(self, seed: int) -> np.ndarray:
        order = np.random.RandomState(seed % 2**32).permutation(int((~self.empty).sum()))
        return self._dealt(order)

    def sorted_by_bin(self) -> np.ndarray:
        """Clients by their largest bin, and within one by its share."""
        share = self.counts[~self.empty] / self.counts[~self.empty].sum(1, keepdims=True)
        return self._dealt(np.lexsort((-share.max(1), share.argmax(1))))

    def _dealt(self, order: np.ndarray) -> np.ndarray:
        """Cut an order of the clients into groups; the empty slots go to the last ones, one each."""
        slots = np.empty(len(self.counts), int)
        for g, part in enumerate(np.array_split(order, self.num_groups)):
            slots[part] = g
        short = int(self.empty.sum())
        slots[self.empty] = np.arange(self.num_groups - short, self.num_groups)
        return slots

    def improved(self, slots: np.ndarray, sign: int) -> np.ndarray:
        """Each client in turn makes the swap that lowers sign * objective most, until a pass over all finds none."""
        slots, (counts, amounts), moved = slots.copy(), self.sums(slots), True
        while moved:
            moved = False
            for i in range(len(slots)):
                g, others = slots[i], np.flatnonzero(slots != slots[i])
                short = np.bincount(slots[self.empty], minlength=self.num_groups) > 0
                others = others[~(self.empty[others] & short[g]) & ~(self.empty[i] & short[slots[others]])]
                if not len(others):
                    continue
                to, step, more = slots[others], self.counts[others] - self.counts[i], self.compute[others] - self.compute[i]
                now = self.cost(counts, amounts)
                change = sign * (self.cost(np.maximum(counts[g] + step, 0), amounts[g] + more) - now[g]
                                 + self.cost(np.maximum(counts[to] - step, 0), amounts[to] - more) - now[to])
                if change[best := int(np.argmin(change))] < -LEAST:
                    slots[i], slots[others[best]], moved = to[best], g, True
                    counts, amounts = self.sums(slots)
        return slots

    def groups(self, slots: np.ndarray) -> Groups:
        return sorted([self.names[k] for k in np.flatnonzero((slots == g) & ~self.empty)] for g in range(self.num_groups))


def _js(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon, base 2, over the last axis: the entropy of the middle less the mean of the entropies."""
    return np.maximum(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2, 0.0)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def _table(found: Histograms) -> tuple[list[str], list[Any], np.ndarray]:
    """Names and bins, sorted, and counts (clients, bins). Raises ConfigError for what is no histogram."""
    if not found:
        raise ConfigError("expected the histogram of at least one client; got none")
    names, bins = sorted(found), sorted({key for own in found.values() for key in own}, key=lambda key: (str(type(key)), key))
    counts = np.array([[found[name].get(key, 0.0) for key in bins] for name in names], dtype=np.float64).reshape(len(names), -1)
    bad = [name for name, row in zip(names, counts, strict=True) if not (np.isfinite(row).all() and (row >= 0).all())]
    if bad:
        raise ConfigError(f"expected counts of at least 0 in every histogram; got other numbers of {_some(bad)}")
    empty = [name for name, row in zip(names, counts, strict=True) if not row.sum() > 0]
    if empty:
        raise ConfigError(f"expected a histogram with a count above 0 of every client; got none of {_some(empty)}. Leave these "
                          "clients out, or give them rows.")
    return names, bins, counts


def _amounts(names: Sequence[str], compute: Mapping[str, float] | None) -> np.ndarray:
    """Compute of every client. Raises ConfigError where one has none, or not a positive number."""
    if compute is None:
        return np.ones(len(names))
    bad = [name for name in names if not 0 < compute.get(name, 0.0) < math.inf]
    if bad:
        raise ConfigError(f"compute: expected a positive number for every client; got none for {_some(bad)}")
    return np.array([compute[name] for name in names], dtype=np.float64)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
