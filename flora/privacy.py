"""Differential privacy of whole clients: what one round tells about any one of them is bounded, whatever that client sends.

The server is trusted. It releases a sum over clients, of which each has a contribution that is clipped to norm C on its own:

    start or base + (Σ_k clip_C(d_k) + N(0, (z C)²)) / m,          m = q K, the number of clients expected in a round

with the noise on every number that is released. d_k is ΔW_k itself (flora: in the Frobenius norm over all layers jointly), or how
far the factors that trained moved from the start that was sent (rules that average factors). Nothing else depends on clients:
weights are equal, m, layers and ranks are public, a client without a finite update counts as zero, and a round in which nobody was
sampled is released too, as noise. What follows (SVDs, the next start, merging) works on the release alone.

Neighbours: two runs with the same public list of clients, ranks and settings, in one of which one client never takes part.
`accountant.epsilon` says what rounds add up to. Reference: DP-FedAvg, arXiv 1710.06963; docs/security-privacy.md has the proofs.
"""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flora import accountant
from flora.adapter import Adapter, Adapters, of_dense
from flora.errors import ConfigError, StrategyError
from flora.frames import core, frame
from flora.keystream import normal, words
from flora.messages import Broadcast, Update
from flora.proven import refuse_unproven
from flora.strategies import strategy_named
from flora.strategies.base import one_rank
from flora.strategies.frozen import refactored, trained_in

ROUNDING = 1e-12                                                # of ‖B‖ ‖A‖: more than fp64 loses in a QR or a product
BLOCK = 1 << 22                                                 # numbers of noise drawn at a time


@dataclass(frozen=True)
class ClientPrivacy:
    """clip: C, the norm that a client's contribution has at most; noise_multiplier: z, noise in units of C; delta: of (ε, δ).

    rank: strategy flora: of what is sent of a layer's noisy sum (None: q Σ r_k, up to the smaller side of the weight; public).
    Raises ConfigError.
    """
    clip: float
    noise_multiplier: float
    delta: float = 1e-5
    rank: int | None = None

    def __post_init__(self) -> None:
        for name, value, good, expected in (
                ("clip", self.clip, 0.0 < self.clip < math.inf, "a positive, finite norm"),
                ("noise_multiplier", self.noise_multiplier, 0.0 <= self.noise_multiplier < math.inf, "a number >= 0"),
                ("delta", self.delta, 0.0 < self.delta < 1.0, "a probability in (0, 1), well under 1 / clients"),
                ("rank", self.rank, self.rank is None or self.rank >= 1, "at least 1, or None")):
            if not good:
                raise ConfigError(f"{name}: expected {expected}; got {value}")


@dataclass(frozen=True)
class Population:
    """What is public of a run: (out, in) of its layers, the ranks of all its clients, and the probability q of being sampled."""
    shapes: Mapping[str, tuple[int, int]]
    ranks: Sequence[int]
    fraction: float = 1.0

    @property
    def expected(self) -> float:
        """m = q K."""
        return self.fraction * len(self.ranks)


@dataclass(frozen=True)
class _Noise:
    """N(0, (z C)²) of this round: by key, run and version, so a resumed run repeats it and no two rounds share it."""
    size: float
    key: bytes = field(repr=False)
    place: str = ""

    def add_(self, total: Tensor, name: str) -> None:
        """On every number of total (fp64, contiguous), under a label of its own."""
        flat = total.view(-1)
        for first in range(0, len(flat) if self.size else 0, BLOCK):
            part = flat[first:first + BLOCK]
            part.add_(normal(self.key, f"noise/{self.place}/{name}/{first}", part.shape).to(part.device), alpha=self.size)


def epsilon(privacy: ClientPrivacy, rounds: int, q: float = 1.0) -> float:
    """ε at privacy.delta after so many rounds in which each client is sampled with probability q. Raises ConfigError."""
    return accountant.epsilon(privacy.noise_multiplier, privacy.delta, rounds, q)


def poisson_sample(names: Sequence[str], q: float, key: bytes, number: int) -> list[str]:
    """Which of the names take part in round `number`: each with probability q by itself, so their number varies and may be 0. In
    the order given.

    The draws come from the key: who takes part must stay as secret as it, or ε holds for q = 1 only. Raises ConfigError.
    """
    if not 0.0 < q <= 1.0:
        raise ConfigError(f"q: expected a probability in (0, 1]; got {q}")
    return [name for name in names if int(words(key, f"sample/{number}/{name}", 1)[0] >> 11) * 2.0**-53 < q]


def private_broadcast(updates: Sequence[Update], strategy: str, sent: Broadcast, privacy: ClientPrivacy, population: Population,
                      key: bytes) -> Broadcast:
    """The next broadcast, of version sent.version + 1, in which one client shows no more than `privacy` allows.

    strategy: one of RULES; updates: of the clients that were sampled, trained on `sent`, in any order; none is a round too, and has
    to be released. key: 32 secret bytes of this run alone; with sent.run and sent.version it gives the noise, so the same round is
    the same bits. Raises StrategyError for a rule or updates that the guarantee is not proven for.
    """
    refuse_unproven(strategy)
    if not strategy_named(strategy).mixed_ranks:
        one_rank(population.ranks)
    _check(updates, sent, population)
    rule = RULES[strategy]
    noise = _Noise(privacy.noise_multiplier * privacy.clip, key, f"{sent.run}/{sent.version}")
    ordered = sorted(updates, key=lambda update: update.client)     # sums then have the same bits in whatever order replies came
    following = rule(ordered, sent, (privacy, population, noise))
    return replace(following, version=sent.version + 1, run=sent.run)


def _check(updates: Sequence[Update], sent: Broadcast, population: Population) -> None:
    """Raises StrategyError for updates of another version or of one client twice, and for layers that are not the run's."""
    names = [update.client for update in updates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StrategyError(f"expected one update of each client, whose part is clipped once; got several of {twice}. Name every "
                            "client, and leave the second ones out.")
    for update in updates:
        if update.base_version != sent.version:
            raise StrategyError(f"client {update.client}: expected an update of version {sent.version}, which this round releases; "
                                f"got version {update.base_version}: the guarantee counts a client once a round, by its own "
                                "sampling. Leave late updates out.")
        for name, a in update.adapters.items():
            if tuple(population.shapes.get(name, ())) != a.shape:
                raise StrategyError(f"client {update.client}, {name}: expected a layer of this run's shapes "
                                    f"({population.shapes.get(name, 'no such layer')}); got {a.shape}")


def clip_factor(parts: Sequence[tuple[float, float]], clip: float) -> float:
    """min(1, C / √Σ (norm + slack)²): what a client's whole contribution is multiplied by, 1 exactly where it is short enough.

    parts: the norm of each layer, and a bound on the rounding of that norm and of the sum. Factors that are huge and cancel would
    leave rounding longer than C; so they count by their own size. Zero where there are no finite numbers.
    """
    total = math.hypot(*(size + slack for size, slack in parts))
    return 0.0 if not math.isfinite(total) else clip / total if total > clip else 1.0


def delta_norm(a: Adapter) -> tuple[float, float]:
    """‖ΔW‖_F of one layer and a bound on its rounding, in fp64, from the R factors of B · scale and Aᵀ: nothing dense."""
    R_B = torch.linalg.qr(a.B.detach().double() * a.scale.double(), mode="r").R
    R_A = torch.linalg.qr(a.A.detach().double().T, mode="r").R
    return float((R_B @ R_A.T).norm()), ROUNDING * float(R_B.norm()) * float(R_A.norm())


Facts = tuple[ClientPrivacy, Population, _Noise]


def _release_deltas(updates: Sequence[Update], sent: Broadcast, facts: Facts) -> Broadcast:
    """merge: Σ_k c_k ΔW_k / m + noise, dense in one layer at a time, then its best part at a public rank: no client's factors
    travel. c_k: one factor of a client, from the norm over all its layers."""
    privacy, population, noise = facts
    if sent.start is not None or sent.train != "AB":
        raise StrategyError('flora: expected clients that start from fresh adapters; got a start. The guarantee is not proven for '
                            'start "warm" or "shared": leave start out.')
    factors = [clip_factor([delta_norm(a) for a in u.adapters.values()], privacy.clip) for u in updates]
    rank = privacy.rank or math.ceil(population.fraction * sum(population.ranks))
    merge = {}
    for name, shape in population.shapes.items():
        total = torch.zeros(shape, dtype=torch.float64)
        for update, c in zip(updates, factors, strict=True):
            a = update.adapters.get(name)
            if a is not None and c:
                a = a.to("cpu")
                total.addmm_(a.B.detach().double() * (a.scale.double() * c), a.A.detach().double())
        noise.add_(total, name)
        merge[name] = of_dense(total / population.expected, min(rank, *shape))[0].to(torch.float32)
    return Broadcast(merge=merge)


def _trained(a: Adapter, sent: Broadcast, layer: str) -> dict[str, Tensor]:
    """What trained of an adapter, in fp64 with ranks outermost: A (r, in), B (r, out), or the core (r, r) of Fed-SB."""
    if sent.train == "core":
        return {"core": core(Adapter(a.A.double(), a.B, a.scale), frame(a.shape, a.rank, sent.frame, layer)[0])}
    return {f: (a.A if f == "A" else a.B.T).detach().to("cpu", torch.float64) for f in sent.train}


def _moves(update: Update, sent: Broadcast) -> dict[str, dict[str, Tensor]]:
    """How far each layer's trained factors moved from the start, in the ranks that the client has."""
    out = {}
    for layer, a in update.adapters.items():
        begun = sent.start.get(layer) if sent.start else None
        if begun is None or a.rank > begun.rank or not torch.equal(a.scale, begun.scale[:a.rank]):
            raise StrategyError(f"client {update.client}, {layer}: expected an adapter trained from the start that was sent, at "
                                "its scale and of no higher rank, since moves from it are what is clipped; got another. Start from "
                                "Broadcast.start, with one alpha / r for all.")
        start = _trained(begun, sent, layer)
        out[layer] = {part: now - start[part][:a.rank] for part, now in _trained(a, sent, layer).items()}
    return out


def _release_factors(updates: Sequence[Update], sent: Broadcast, facts: Facts) -> dict[str, Adapter]:
    """The start with f_i times rank i + Σ_k c_k (moves of k) / m + noise in the factors that trained; the others as they were sent.

    f_i: the share of all clients of the run that have rank i, which is public: what padding with zeros leaves of the start.
    """
    privacy, population, noise = facts
    if not sent.start:
        raise StrategyError("expected a broadcast with a start, from which moves are clipped; got none. Begin with Strategy.begin.")
    kept = {name: _kept(a.rank, population.ranks) for name, a in sent.start.items()}
    totals = {name: {f: torch.zeros_like(t, memory_format=torch.contiguous_format) for f, t in _trained(a, sent, name).items()}
              for name, a in sent.start.items()}
    for c, moves in _clipped(updates, sent, privacy.clip):
        for name, parts in moves.items():
            for part, move in parts.items():
                totals[name][part][:len(move)].add_(move, alpha=c)
    out = {}
    for name, a in sent.start.items():
        for part, total in totals[name].items():
            noise.add_(total, f"{name}/{part}")
            total.div_(population.expected).add_(_trained(a, sent, name)[part] * kept[name][:, None])
        out[name] = _with(a, totals[name], sent, name)
    return out


def _kept(rank: int, ranks: Sequence[int]) -> Tensor:
    """The share of clients that have rank i, for every i."""
    return torch.tensor([sum(r > i for r in ranks) / len(ranks) for i in range(rank)], dtype=torch.float64)


def _clipped(updates: Sequence[Update], sent: Broadcast, clip: float) -> Iterator[tuple[float, dict[str, dict[str, Tensor]]]]:
    """The factor and the moves of each client, one at a time; of one whose numbers are not finite, none."""
    for update in updates:
        moves = _moves(update, sent)
        c = clip_factor([(float(move.norm()), 0.0) for parts in moves.values() for move in parts.values()], clip)
        if c:
            yield c, moves


def _with(a: Adapter, parts: Mapping[str, Tensor], sent: Broadcast, layer: str) -> Adapter:
    """The adapter with these in place of what trained, in its dtypes; what did not train is the very same tensor."""
    if "core" in parts:
        A = parts["core"].float() @ frame(a.shape, a.rank, sent.frame, layer)[0]
        return Adapter(A.to(a.A.dtype), a.B, a.scale)
    A, B = parts.get("A"), parts.get("B")
    return Adapter(a.A if A is None else A.to(a.A), a.B if B is None else B.T.contiguous().to(a.B), a.scale)


def _continue(following: Callable[[Adapters, Broadcast], Broadcast]) -> Callable[[Sequence[Update], Broadcast, Facts], Broadcast]:
    """A rule on factors: the release, then what this rule makes of it, which sees the release alone."""
    return lambda updates, sent, facts: following(_release_factors(updates, sent, facts), sent)


RULES: dict[str, Callable[[Sequence[Update], Broadcast, Facts], Broadcast]] = {
    "flora": _release_deltas,
    "fedit": _continue(lambda start, sent: Broadcast(start=start)),
    "zeropad": _continue(lambda start, sent: Broadcast(start=start)),
    "ffa": _continue(lambda start, sent: Broadcast(start=start, train="B")),
    "rolora": _continue(lambda start, sent: Broadcast(start=start, train=trained_in(sent.version + 1))),
    "fedsvd": _continue(lambda start, sent: Broadcast(start={name: refactored(a) for name, a in start.items()}, train="B")),
    "fedsb": _continue(lambda start, sent: Broadcast(start=start, train="core", frame=sent.frame)),
}
