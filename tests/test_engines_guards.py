"""Whole runs under secure aggregation and differential privacy."""
import stat

import pytest
from test_engines import folders_agree, of, settings
from test_engines_options import stopped_and_resumed

import flora
from flora.cohort import Cohort
from flora.config import parse
from flora.engines.local import resume
from flora.engines.plan import plan
from flora.errors import ConfigError, RunError, StrategyError
from flora.formats import load_peft
from flora.report import read_metrics, summary

CLIENT = {"privacy": {"clip": 0.5, "noise_multiplier": 0.5}, "weighting": "uniform"}
EXAMPLE = {"privacy": {"level": "example", "clip": 0.5, "noise_multiplier": 1.0}, "weighting": "uniform"}


def servers(folder):
    return of(read_metrics(folder), "server")


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_round_under_masks_is_the_round_without(place, weighting):
    base = {"weighting": weighting, "num_rounds": 1, "partition": {"dirichlet_alpha": 1.0, "label": "mood"}}
    masked = flora.run(settings(place, f"masked-{weighting}", secure_aggregation={}, **base))
    plain = flora.run(settings(place, f"plain-{weighting}", **base))
    assert len({row["num_examples"] for row in of(read_metrics(plain), "client")}) > 1
    one, other = (load_peft(folder / "rounds" / "0" / "aggregate") for folder in (masked, plain))
    for layer, a in other.items():
        exact = a.delta()
        assert float((one[layer].delta() - exact).norm()) <= 1e-4 * float(exact.norm())
    row = servers(masked)[1]
    assert row["secure_error"] < 1e-4 and row["secure_seconds"] > 0
    sizes = {row["bytes_up"] for row in of(read_metrics(masked), "client")}
    assert len(sizes) == 1 and min(sizes) > max(row["bytes_up"] for row in of(read_metrics(plain), "client"))
    assert row["bytes_up"] == 4 * sizes.pop()


def test_a_sum_of_one_is_not_taken(place, monkeypatch):
    fit = Cohort.fit
    monkeypatch.setattr(Cohort, "fit", lambda self, *rest, **options: fit(self, *rest, **options)[:1])
    folder = flora.run(settings(place, "alone", secure_aggregation={}, num_rounds=1))
    before, after = (row["eval_loss"] for row in servers(folder))
    assert before == after and [row["client"] for row in of(read_metrics(folder), "failure")] == ["the round"]


def test_numbers_that_do_not_fit_the_ring_drop_their_client_out(place, monkeypatch):
    fit = Cohort.fit

    def huge(self, *rest, **options):
        updates = fit(self, *rest, **options)
        for a in updates[1].adapters.values():
            a.A.mul_(1e8), a.B.fill_(1e4)
        return updates

    monkeypatch.setattr(Cohort, "fit", huge)
    folder = flora.run(settings(place, "huge", secure_aggregation={}, num_rounds=1))
    before, after = (row["eval_loss"] for row in servers(folder))
    assert after < before + 0.5 and servers(folder)[1]["secure_error"] < 1e-4


def test_a_dry_run_counts_the_words_of_masked_sums(place):
    config = parse(settings(place, "dry", secure_aggregation={}, num_rounds=1))
    found, real = plan(config), servers(flora.run(config))[1]["bytes_up"]
    assert 0.7 * real < found.up[0] < real                      # keys and shares are not in it, and weigh for a model this small
    private = plan(parse(settings(place, "dry", **CLIENT)))
    assert private.up[0] < 1.2 * plan(parse(settings(place, "dry"))).up[0]


@pytest.mark.parametrize("strategy", ["flora", "fedit", "ffa", "zeropad"])
def test_every_row_says_what_privacy_has_cost(place, strategy):
    folder = flora.run(settings(place, f"private-{strategy}", strategy, **{**CLIENT, "lora_alpha": "2r"}))
    costs = [row.get("epsilon") for row in servers(folder)]
    assert costs[0] is None and 0 < costs[1] < costs[2]
    assert summary(read_metrics(folder))[0].columns[-1].header == "ε"
    plain = flora.run(settings(place, f"public-{strategy}", strategy, weighting="uniform", lora_alpha="2r"))
    assert servers(plain)[1]["eval_loss"] != servers(folder)[1]["eval_loss"] and "epsilon" not in servers(plain)[1]


def test_epsilon_for_the_whole_run_is_kept(place):
    for number, (strategy, more) in enumerate((("flora", {"fraction_train": 0.5}), ("ffa", {"level": "example"}))):
        private = {"clip": 0.5, "epsilon": 9.0, "level": more.pop("level", "client")}
        folder = flora.run(settings(place, f"whole-{number}", strategy, **{**CLIENT, "privacy": private, "num_rounds": 3, **more}))
        assert 8.5 < servers(folder)[-1]["epsilon"] <= 9.0


@pytest.mark.parametrize(("strategy", "how"), [("flora", CLIENT), ("ffa", EXAMPLE)])
def test_a_resumed_run_repeats_its_noise_and_another_has_its_own(place, monkeypatch, strategy, how):
    config = settings(place, f"noisy-{strategy}", strategy, num_rounds=3, fraction_train=0.75, **how)
    first = flora.run(config)
    key = first / "privacy.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    other = flora.run({**config, "output_dir": str(place / f"other-{strategy}")})
    assert not folders_agree(first, other, "model")
    again = place / f"again-{strategy}"
    # the run's name is part of the noise: both need the same
    monkeypatch.setattr("secrets.token_hex", lambda count: "ab" * count)
    whole = flora.run({**config, "output_dir": str(place / f"fixed-{strategy}")})
    with monkeypatch.context() as patch:
        stopped_and_resumed(config, again, patch, 1)
    assert folders_agree(whole, again, "model")


def test_a_run_that_lost_its_key_does_not_go_on(place, monkeypatch):
    folder = place / "lost"
    monkeypatch.setattr("flora.engines.local.resume", lambda folder: folder)
    with monkeypatch.context() as patch:
        patch.setattr("test_engines_options.resume", lambda folder: folder)
        stopped_and_resumed(settings(place, "lost", num_rounds=3, **CLIENT), folder, patch, 1)
    (folder / "privacy.key").unlink()
    with pytest.raises(RunError, match=r"the key of this run's noise in .*privacy\.key; got none"):
        resume(folder)


def test_a_round_that_drew_nobody_is_released_as_noise(place):
    """The draw is by a secret key, so the odds of anybody are made small."""
    folder = flora.run(settings(place, "nobody", fraction_train=1e-6, num_rounds=2, **CLIENT))
    assert not of(read_metrics(folder), "client") and not of(read_metrics(folder), "failure")
    losses = [row["eval_loss"] for row in servers(folder)]
    assert len(set(losses)) == 3


def test_what_would_break_a_promise_is_refused(place):
    alone = {"secure_aggregation": {}}
    for changes, kind, says in (
            ({**CLIENT, "weighting": "examples"}, StrategyError, 'expected weighting "uniform"'),
            ({**CLIENT, "robust": "clip"}, StrategyError, "without filter"),
            ({**CLIENT, "min_clients": 2}, StrategyError, "min_clients"),
            ({**CLIENT, "start": "warm"}, StrategyError, "without start"),
            ({**CLIENT, "groups": {"count": 2}}, StrategyError, "groups"),
            ({**CLIENT, "adalora": True}, StrategyError, "adalora"),
            ({**EXAMPLE}, StrategyError, "B alone trains"),
            ({**CLIENT, "strategy": "flexlora"}, StrategyError, "got flexlora"),
            ({**CLIENT, "strategy": "zeropad", "lora_alpha": 16}, ConfigError, "one alpha / rank"),
            ({**alone, "strategy": "fedit", "lora_r": 4}, ConfigError, "strategy flora"),
            ({**alone, "robust": "clip"}, ConfigError, "no robust"),
            ({**alone, **CLIENT}, ConfigError, "no privacy"),
            ({**alone, "weighting": "tokens"}, ConfigError, "in the open"),
            ({**alone, "start": "warm"}, ConfigError, "fresh start"),
            ({**alone, "server_learning_rate": 0.5}, ConfigError, "server_learning_rate"),
            ({**CLIENT, "communication_budget_mb": 5.0}, StrategyError, "communication_budget"),
            ({**CLIENT, "strategy": "ffa", "privacy": {"clip": 1.0, "epsilon": 1.0, "rank": 2}}, ConfigError, "privacy.rank"),
            ({**alone, "fraction_train": 0.25}, ConfigError, "rounds of at least 2"),
            ({"secure_aggregation": {"threshold": 2}}, StrategyError, "threshold"),
            ({"secure_aggregation": {"threshold": 9}}, ConfigError, "rounds of at least 9"),
            ({"secure_aggregation": {"bits": 63}}, (ConfigError, StrategyError), "bits"),
            ({"robust": "krum", "robust_share": 0.45}, ConfigError, "rounds of at least 5"),
            ({"strategy": "centralized", "min_clients": 4}, ConfigError, "rounds of at least 4"),
            ({"staleness_weight": 0.3}, ConfigError, "late: next"),
            ({"privacy": {"clip": 1.0}}, ConfigError, "noise_multiplier or epsilon"),
            ({"privacy": {"clip": 0, "epsilon": 1}}, ConfigError, "clip"),
            ({"secure_aggregation": {"bits": 0}}, ConfigError, "bits"),
            ({"limits": {"max_rank": 0}}, ConfigError, "max_rank")):
        with pytest.raises(kind, match=says):
            flora.run(settings(place, "refused", **changes))
    assert not (place / "refused").exists()


def test_limits_of_messages_are_settings_of_a_run(place):
    from flora.engines.guards import trust_of

    limits = trust_of(parse(settings(place, "limits", limits={"max_rank": 7, "max_message_mb": 2}))).limits
    assert limits.max_rank == 7 and limits.max_bytes == 2_000_000 and trust_of(parse(settings(place, "limits"))).limits is None
