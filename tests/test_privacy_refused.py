"""What differential privacy is refused for, each with its reason: rules, settings, updates."""
import math
from dataclasses import replace

import pytest
from rounds import LAYERS
from test_privacy import KEY, QUIET, released, round_of
from tiny import adapter

from flora import Broadcast
from flora.adapter import fresh_adapters, pad
from flora.errors import ConfigError, StrategyError
from flora.privacy import RULES, ClientPrivacy, Population, private_broadcast
from flora.proven import FEATURES, PROVEN, refuse_unproven
from flora.proven import RULES as UNPROVEN
from flora.strategies import STRATEGIES


def test_every_rule_is_proven_or_refused_with_a_reason():
    assert set(RULES) == set(PROVEN) and set(PROVEN).isdisjoint(UNPROVEN) and {*PROVEN, *UNPROVEN} == set(STRATEGIES)
    for name in PROVEN:
        refuse_unproven(name)
    for name, why in UNPROVEN.items():
        with pytest.raises(StrategyError, match=f"got {name}: {why[:30]}"):
            refuse_unproven(name)
        with pytest.raises(StrategyError, match=f"got {name}: "):
            private_broadcast([], name, Broadcast(), QUIET, Population(LAYERS, [1]), KEY)


@pytest.mark.parametrize("feature", [*FEATURES, "something new"])
def test_every_feature_without_a_proof_is_refused(feature):
    with pytest.raises(StrategyError, match=f"expected a run without {feature}: "):
        refuse_unproven("flora", features=[feature])


@pytest.mark.parametrize("weighting", ["examples", "tokens", 0.5])
def test_weights_that_are_not_equal_are_refused(weighting):
    for level in ("client", "example"):
        with pytest.raises(StrategyError, match='expected weighting "uniform"'):
            refuse_unproven("ffa", weighting, level=level)


def test_what_is_refused_of_examples():
    for name in STRATEGIES:
        if name in ("ffa", "fedsvd"):
            refuse_unproven(name, features=["filter", "server_learning_rate", "late"], level="example")
            continue
        with pytest.raises(StrategyError, match="B alone trains"):
            refuse_unproven(name, level="example")
    for feature in ("adalora", "rank_decay", "groups", "unheard of"):
        with pytest.raises(StrategyError, match=f"without {feature}"):
            refuse_unproven("ffa", features=[feature], level="example")


def test_updates_that_would_break_the_guarantee_are_refused():
    sent, updates = round_of("ffa")
    _, fresh = round_of("flora")
    a = next(iter(updates[0].adapters.values()))
    for name, some, given, message in (
            ("ffa", [updates[0], updates[0]], sent, r"several of \['c0'\]"),
            ("ffa", [replace(updates[0], base_version=3)], sent, "got version 3.*Leave late updates out"),
            ("ffa", [replace(updates[0], adapters={"other": a})], sent, "a layer of this run's shapes"),
            ("ffa", [replace(updates[0], adapters={"blocks.0.v": adapter(3, (13, 7))})], sent, "a layer of this run's shapes"),
            ("ffa", [replace(updates[0], adapters={n: a * 2.0 for n, a in updates[0].adapters.items()})], sent, "at its scale"),
            ("ffa", [replace(updates[0], adapters={n: pad(a, 9) for n, a in updates[0].adapters.items()})], sent, "no higher rank"),
            ("ffa", updates, replace(sent, start=None), "a broadcast with a start"),
            ("flora", fresh, Broadcast(start=fresh_adapters(LAYERS, 2, 4.0, 0)), '"warm" or "shared"')):
        with pytest.raises(StrategyError, match=message):
            released(name, some, given)
    with pytest.raises(StrategyError, match="clients of one rank"):
        private_broadcast(updates, "ffa", sent, QUIET, Population(LAYERS, [3, 2]), KEY)


@pytest.mark.parametrize("setting", [{"clip": 0.0}, {"clip": math.inf}, {"noise_multiplier": -1.0}, {"delta": 0.0}, {"rank": 0}])
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: expected"):
        ClientPrivacy(**{"clip": 1.0, "noise_multiplier": 1.0, **setting})


def test_the_config_section():
    from pydantic import ValidationError

    from flora.sections import PrivacyConfig

    assert PrivacyConfig(clip=1.0, epsilon=8.0).level == "client"
    for bad, message in (({"epsilon": None}, "got neither"), ({"noise_multiplier": 1.0}, "got both"),
                         ({"clip": 0.0}, "greater than 0"), ({"delta": 1.0}, "less than 1"),
                         ({"level": "example", "rank": 3}, "rank is of level client"),
                         ({"sigma": 1.0}, "Extra inputs"), ({"clip": math.inf}, "finite")):
        with pytest.raises(ValidationError, match=message):
            PrivacyConfig(**{"clip": 1.0, "epsilon": 1.0, **bad})
