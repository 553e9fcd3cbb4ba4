"""Σ n_k ΔW_k / Σ n_k of adapters of mixed ranks, exactly, by a server that sees no client's update and no n_k.

Sketches of ΔW_k (sketch.py) times n_k, and n_k itself, become words (ring.py), go up under masks that cancel (masking.py), and what
is left of the sum (unmasking.py) are the sketches of the aggregate, from which it is recovered as an adapter of low rank. Every
client sends all layers, of those that it lacks zeros. What is protected and what is not: masking.py.

`agree`, `contribution` and `recovered` are the parts that an engine with a wire of its own needs; `secure_round` is all of a round
in one process.
"""
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from flora.adapter import Adapter
from flora.errors import AdapterError, ConfigError, StrategyError
from flora.masking import MASKED, Party, Session
from flora.messages import Update
from flora.ring import Ring, to_numbers, to_words
from flora.sketch import Plan, Quality, plan, recover, sketch
from flora.unmasking import Tally

STEPS = ("keys", "shares", "masked", "reveal")                  # a client's messages, in their order
COUNT = ""                                                      # where the number of examples goes among the layers' words


@dataclass(frozen=True)
class SecureConfig:
    """How a sum is taken, public and the same for all.

    width: the rank that the sum may have (None: Σ r_k, which is always enough); threshold: how many clients must stay to the end
    (None: more than two thirds); bits, unit: steps of unit · 2^-bits (ring.py); tolerance: the estimated relative error of a
    layer above which the round raises (None: it is reported only).
    """
    width: int | None = None
    threshold: int | None = None
    bits: int = 30
    unit: float = 1.0
    tolerance: float | None = 1e-3


@dataclass(frozen=True)
class Agreement:
    """What all parties of a round compute alike: the session of the masks, the ring, and a plan for every layer."""
    session: Session
    ring: Ring
    plans: Mapping[str, Plan]


@dataclass(frozen=True)
class SecureSum:
    """adapters: Σ n_k ΔW_k / Σ n_k over the clients counted; num_examples: Σ n_k; layers: how good each is; error: the worst of
    their estimated relative errors; bytes_up, bytes_down: by client, without the broadcast of the result; dropped: who did not
    stay, and the message that it failed to send (without "reveal" it counts nonetheless); seconds: by phase, all together."""
    adapters: dict[str, Adapter]
    num_examples: int
    counted: list[str]
    layers: dict[str, Quality]
    error: float
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    dropped: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)


def agree(names: Sequence[str], shapes: Mapping[str, tuple[int, int]], config: SecureConfig, run: str = "",
          number: int = 0) -> Agreement:
    """The agreement for round `number` of a run. config.width must be a number here. Raises StrategyError, ConfigError and
    AdapterError for settings that no round can have."""
    if not shapes or COUNT in shapes:
        raise AdapterError(f"expected shapes (out, in) of at least one layer, all with a name; got {list(shapes)}")
    if config.tolerance is not None and not config.tolerance > 0:
        raise ConfigError(f"expected a positive tolerance, or None; got {config.tolerance!r}")
    plans = {layer: plan(shape, config.width, run, number, layer) for layer, shape in shapes.items()}
    ring = Ring(max(1, len(names)), config.bits, config.unit)
    threshold = 2 * len(names) // 3 + 1 if config.threshold is None else config.threshold
    label = f"{run}/{number}/{config.width}/{config.bits}/{float(config.unit).hex()}"
    sizes = {COUNT: 1, **{layer: of_layer.size for layer, of_layer in plans.items()}}
    return Agreement(Session(label, tuple(names), threshold, sizes), ring, plans)


def contribution(update: Update, agreement: Agreement) -> np.ndarray:
    """What a client puts under its masks: n_k, then n_k times the sketches of every layer, uint64 (session.count,).

    Raises AdapterError for layers or shapes that are not the agreement's, NaN, and numbers out of the ring's range.
    """
    who, extra = f"client {update.client}", set(update.adapters) - set(agreement.plans)
    if extra:
        raise AdapterError(f"{who}: expected adapters for the {len(agreement.plans)} layers agreed on; got {sorted(extra)[:3]} too")
    if type(update.num_examples) is not int or update.num_examples < 1:
        raise AdapterError(f"{who}: expected num_examples of at least 1; got {update.num_examples!r}")
    out = np.zeros(agreement.session.count, np.uint64)
    out[:1] = to_words(torch.tensor([update.num_examples]), _whole(agreement.ring), f"{who}, num_examples")
    at = 1
    for layer, of_layer in agreement.plans.items():
        if layer in update.adapters:
            try:
                values = sketch(update.adapters[layer], of_layer)
            except AdapterError as error:
                raise AdapterError(f"{who}, {layer}: {error}") from error
            out[at:at + of_layer.size] = to_words(values.mul_(update.num_examples), agreement.ring, f"{who}, {layer}")
        at += of_layer.size
    return out


def _whole(ring: Ring) -> Ring:
    """The ring for whole numbers."""
    return replace(ring, bits=0, unit=1.0)


def recovered(totals: Mapping[str, np.ndarray], agreement: Agreement,
              counted: int) -> tuple[dict[str, Adapter], dict[str, Quality], int]:
    """The aggregate's adapters, how good each is, and Σ n_k, of the summed words (totals, by layer) of `counted` clients."""
    examples = int(to_numbers(totals[COUNT], _whole(agreement.ring))[0])
    if examples < counted:
        raise StrategyError(f"expected a sum of at least {counted} examples of {counted} clients; got {examples}. A client's words "
                            "are not what was agreed: the round is void.")
    noise = agreement.ring.step * (counted / 12) ** 0.5 / examples          # each rounding is uniform in ± half a step
    found = {layer: recover(to_numbers(totals[layer], agreement.ring) / examples, of_layer, noise)
             for layer, of_layer in agreement.plans.items()}
    return {layer: a for layer, (a, _) in found.items()}, {layer: q for layer, (_, q) in found.items()}, examples


def check_error(layers: Mapping[str, Quality], tolerance: float | None) -> float:
    """The largest estimated relative error. Raises StrategyError where it is above tolerance, saying which setting is the cause."""
    worst = max(layers, key=lambda layer: layers[layer].error)
    found = layers[worst]
    if tolerance is not None and found.error > tolerance:
        cause = ("the steps are too coarse for numbers this small: raise bits or lower unit" if found.error < 4 * found.rounding
                 else "the sum's rank is above the width: raise width (Σ r_k is always enough)")
        raise StrategyError(f"{worst}: expected a relative error of at most {tolerance:g}; got about {found.error:.2g} at rank "
                            f"{found.rank}, as {cause}, or give tolerance=None to take the approximation.")
    return found.error


def secure_round(updates: Sequence[Update], shapes: Mapping[str, tuple[int, int]], config: SecureConfig | None = None,
                 run: str = "", number: int = 0, dropped: Mapping[str, str] | None = None) -> SecureSum:
    """A whole round in one process: the clients' steps and the server's, everything between them as bytes.

    shapes: (out, in) of all layers; dropped: the first of STEPS that a client does not take, by its name. Raises StrategyError (a
    client alone or twice, fewer than the threshold left, the error above the tolerance), AdapterError (adapters that do not fit,
    NaN, overflow), ConfigError.
    """
    config, dropped = config or SecureConfig(), dict(dropped or {})
    names = [u.client for u in updates]
    unknown = {name: step for name, step in dropped.items() if name not in names or step not in STEPS}
    if unknown:
        raise ConfigError(f"expected clients of {names} and steps of {', '.join(STEPS)} as dropped; got {unknown}")
    if config.width is None:
        config = replace(config, width=max(1, sum(max((a.rank for a in u.adapters.values()), default=0) for u in updates)))
    traffic = _Traffic(updates, agree(names, shapes, config, run, number), dropped)
    adapters, layers, examples = traffic.round()
    return SecureSum(adapters, examples, traffic.tally.names(MASKED), layers, check_error(layers, config.tolerance), traffic.up,
                     traffic.down, dropped, traffic.seconds)


class _Traffic:
    """The messages of one round, counted and timed."""

    def __init__(self, updates: Sequence[Update], agreement: Agreement, dropped: Mapping[str, str]):
        self.updates, self.agreement, self.dropped = {u.client: u for u in updates}, agreement, dropped
        self.tally = Tally(agreement.session)
        self.parties = {name: Party(agreement.session, name) for name in self.updates}
        self.up, self.down = (dict.fromkeys(self.updates, 0) for _ in range(2))
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def _taking(self, step: str) -> list[Party]:
        """The clients that send the message of this step."""
        left = STEPS[:STEPS.index(step) + 1]
        return [party for name, party in self.parties.items() if self.dropped.get(name) not in left]

    def _sent(self, party: Party, message: bytes, received: bytes = b"") -> bytes:
        name = self.agreement.session.names[party.me]
        self.up[name] += len(message)
        self.down[name] += len(received)
        return message

    def round(self) -> tuple[dict[str, Adapter], dict[str, Quality], int]:
        tally = self.tally
        for party in self._taking("keys"):
            with self._timed("keys"):
                tally.take_keys(self._sent(party, party.keys()))
        roster = tally.roster()
        for party in self._taking("shares"):
            with self._timed("shares"):
                tally.take_shares(self._sent(party, party.shares(roster), roster))
        for party in self._taking("masked"):
            self._masked(party)
        request = tally.request()
        for party in self._taking("reveal"):
            with self._timed("reveal"):
                tally.take_reveal(self._sent(party, party.reveal(request), request))
        with self._timed("unmask"):
            totals = tally.total()
        with self._timed("recover"):
            return recovered(totals, self.agreement, len(tally.names(MASKED)))

    def _masked(self, party: Party) -> None:
        name = self.agreement.session.names[party.me]
        with self._timed("sketch"):
            values = contribution(self.updates[name], self.agreement)
        delivery = self.tally.delivery(name)
        with self._timed("mask"):
            message = self._sent(party, party.masked(delivery, values), delivery)
        with self._timed("add"):
            self.tally.take_masked(message)
