"""What a run's settings ask of its server beside the strategy: whom it lets in, how it judges them, what it hides or blurs."""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flora import accountant, per_example
from flora.client import LocalClient, TrainConfig
from flora.config import RunConfig
from flora.errors import ConfigError
from flora.inbox import Trust
from flora.keystream import KEY_BYTES
from flora.messages import Broadcast, Update
from flora.privacy import ClientPrivacy, Population, poisson_sample, private_broadcast
from flora.proven import refuse_unproven
from flora.secure import SecureConfig, SecureSum, agree, secure_round
from flora.strategies import strategy_named
from flora.strategies.robust import Robust

Shapes = Mapping[str, tuple[int, int]]
NO_KEY = bytes(KEY_BYTES)


@dataclass
class Masked:
    """Combines a round under secure aggregation: the server sees the sum alone. last: of the round before."""
    settings: SecureConfig
    shapes: Shapes
    uniform: bool
    last: SecureSum | None = None

    def __call__(self, updates: Sequence[Update], sent: Broadcast) -> Broadcast:
        equal = [replace(u, num_examples=1) for u in updates] if self.uniform else updates
        self.last = secure_round(equal, self.shapes, self.settings, sent.run, sent.version)
        return Broadcast(merge=self.last.adapters, version=sent.version + 1)


@dataclass
class Private:
    """Combines a round under differential privacy of clients, and draws who takes part in one."""
    settings: ClientPrivacy
    strategy: str
    population: Population
    key: bytes = field(repr=False)

    def __call__(self, updates: Sequence[Update], sent: Broadcast) -> Broadcast:
        return private_broadcast(updates, self.strategy, sent, self.settings, self.population, self.key)

    def sample(self, names: Sequence[str], number: int) -> list[str]:
        return poisson_sample(names, self.population.fraction, self.key, number)


def trust_of(config: RunConfig) -> Trust:
    """What the server of this run takes from its clients, without what needs their shapes and a key."""
    robust = Robust(config.robust, config.robust_share, config.robust_bound) if config.robust else None
    least = max(config.min_clients, 2) if config.secure_aggregation else config.min_clients      # a sum of one hides nothing
    limits = config.limits.limits() if config.limits else None
    return Trust(least, robust, config.staleness_weight if config.late == "next" else None, limits)


def guarded(config: RunConfig, shapes: Shapes, clients: Sequence[LocalClient], key: bytes = NO_KEY) -> Trust:
    """The same with how this run combines a round. key: 32 secret bytes of the run, for its noise."""
    trust, own = trust_of(config), config.privacy
    if config.secure_aggregation is not None:
        settings = SecureConfig(**config.secure_aggregation.model_dump())
        return replace(trust, combine=Masked(settings, shapes, config.weighting == "uniform"))
    if own is None or own.level == "example":
        return trust
    noise = own.noise_multiplier or accountant.noise_for(own.epsilon, own.delta, config.num_rounds, config.fraction_train)
    settings = ClientPrivacy(own.clip, noise, own.delta, own.rank)
    private = Private(settings, config.strategy, Population(shapes, [c.rank for c in clients], config.fraction_train), key)
    return replace(trust, min_clients=0, combine=private, sample=private.sample)


def example_private(config: RunConfig, train: TrainConfig, clients: Sequence[LocalClient], key: bytes | None) -> TrainConfig:
    """How clients train under differential privacy of their examples; as it is without. key: as in guarded."""
    own = config.privacy
    if own is None or own.level != "example":
        return train
    uses = config.num_rounds * _uses(train, clients)
    return replace(train, example_clip=own.clip, example_key=key,
                   example_noise=own.noise_multiplier or accountant.noise_for(own.epsilon, own.delta, uses))


def _uses(train: TrainConfig, clients: Sequence[LocalClient]) -> int:
    return max(per_example.uses_in_a_round(len(c.rows), train, c.max_steps) for c in clients)


def row(config: RunConfig, train: TrainConfig, clients: Sequence[LocalClient], trust: Trust, rounds: int) -> dict[str, float]:
    """What a row of the report says: the ε of so many rounds; the error of the last sum under masks, and its seconds."""
    own, found = config.privacy, {}
    if isinstance(trust.combine, Masked) and trust.combine.last is not None:
        last = trust.combine.last
        found |= {"secure_error": last.error, "secure_seconds": sum(last.seconds.values())}
    if isinstance(trust.combine, Private):
        found |= {"epsilon": accountant.epsilon(trust.combine.settings.noise_multiplier, own.delta, rounds, config.fraction_train)}
    elif own is not None:
        found |= {"epsilon": per_example.epsilon(train, own.delta, rounds * _uses(train, clients))}
    return found


def sent_up(trust: Trust, counted: Mapping[str, int]) -> Mapping[str, int]:
    """Bytes that each client has sent in the round: those of its masked sums, or as counted."""
    return trust.combine.last.bytes_up if isinstance(trust.combine, Masked) and trust.combine.last and counted else counted


def masked_bytes(config: RunConfig, shapes: Shapes, clients: Sequence[LocalClient]) -> int:
    """Bytes of the masked sums that all these clients send of these layers in a round, without the keys."""
    own = config.secure_aggregation
    width = own.width or sum(client.rank for client in clients)
    agreed = agree([client.name for client in clients], shapes, SecureConfig(**{**own.model_dump(), "width": width}))
    return 8 * agreed.session.count * len(clients)


def check(config: RunConfig) -> None:
    """Raises ConfigError or StrategyError for settings with which privacy or secure aggregation would not be what they say."""
    if config.privacy is not None:
        refuse_unproven(config.strategy, config.weighting, [*_features(config)], config.privacy.level)
        scales = {alpha / rank for rank, alpha in zip(config.ranks(), config.alphas(), strict=True)}
        if config.privacy.level == "client" and config.strategy != "flora" and len(scales) > 1:
            raise ConfigError(f"privacy: expected one alpha / rank for all clients with {config.strategy}, whose factors move by "
                              f"different amounts else; got {sorted(scales)}. Set lora_alpha: 2r.")
    if config.secure_aggregation is None:
        return
    if config.strategy != "flora" or config.start not in (None, "fresh"):
        raise ConfigError(f"secure_aggregation: expected strategy flora with a fresh start, which needs the sum of ΔW alone; got "
                          f"{config.strategy}, start {config.start}. Leave one out; check what {config.strategy} needs.")
    given = [name for name, here in (("robust", config.robust), ("privacy.level client", config.privacy),
                                     ("late: next", config.late == "next"), ("server_learning_rate", config.server_learning_rate),
                                     ("absent: renormalise", config.absent == "renormalise")) if here]
    if given:
        raise ConfigError(f"secure_aggregation: expected no {given[0]}, which needs to see single updates, or another sum; got it. "
                          "Leave one of them out.")
    if config.weighting not in ("examples", "uniform"):
        raise ConfigError(f"secure_aggregation: expected weighting examples or uniform; got {config.weighting}. Tokens travel in "
                          "the open.")


def _features(config: RunConfig) -> Iterator[str]:
    """The names that proven.py knows of what this run uses."""
    used: dict[str, Any] = {
        "groups": config.groups, "adalora": config.adalora, "rank_decay": strategy_named(config.strategy).prunes,
        "filter": config.robust, "late": config.late == "next", "start": config.start not in (None, "fresh"),
        "server_learning_rate": config.server_learning_rate, "absent": config.absent == "renormalise",
        "mixed_alpha": config.mixed_alpha == "fold", "over_sampling": config.over_sampling > 1,
        "min_clients": config.min_clients > 1, "round_deadline": config.round_deadline}
    if config.privacy.level == "example":
        used = {name: used[name] for name in ("groups", "adalora", "rank_decay")}
    return (name for name, here in used.items() if here)
