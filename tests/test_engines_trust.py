"""Whole runs that guard their rounds: too few answers, late ones, liars."""
import pytest
from test_engines import folders_agree, of
from test_engines_groups import FLEET, one
from test_engines_options import stopped_and_resumed

import flora
from flora.cohort import Cohort
from flora.config import parse
from flora.errors import ConfigError, StrategyError
from flora.report import read_metrics


def reasons(folder):
    return [(row["round"], row["client"], row["reason"]) for row in of(read_metrics(folder), "failure")]


def losses(folder):
    return [row["eval_loss"] for row in of(read_metrics(folder), "server")]


def test_a_round_of_too_few_answers_changes_nothing(place, monkeypatch):
    fit = Cohort.fit

    def broken(self, broadcast, *rest, **options):
        self.failures = {}
        return fit(self, broadcast, *rest, **options)[:2 if broadcast.version == 0 else 4]

    monkeypatch.setattr(Cohort, "fit", broken)
    folder = flora.run(one(place, "few", min_clients=3, num_rounds=2))
    before, after, *_ = losses(folder)
    assert before == after == losses(folder)[2]                 # version 0 again, and two answers again
    assert [(number, client) for number, client, _ in reasons(folder)] == [(0, "the round"), (1, "the round")]
    assert "at least 3 clients (min_clients); got 2" in reasons(folder)[0][2]


def test_a_liar_is_left_out_and_named(place, monkeypatch):
    fit = Cohort.fit

    def lying(self, *rest, **options):
        updates = fit(self, *rest, **options)
        for a in updates[2].adapters.values():
            a.B.mul_(-1e3)
        return updates

    monkeypatch.setattr(Cohort, "fit", lying)
    partition = {"iid": True}
    plain, guarded = (flora.run(one(place, name, num_clients=5, max_steps=8, num_rounds=1, partition=partition, **more))
                      for name, more in (("lied", {}), ("guarded", {"robust": "trim"})))
    assert losses(guarded)[1] < losses(guarded)[0] < losses(plain)[1]
    assert [(client, "points against" in why) for _, client, why in reasons(guarded)] == [("client-2", True)]


def test_a_bad_update_is_left_out_and_the_round_goes_on(place, monkeypatch):
    fit = Cohort.fit

    def broken(self, *rest, **options):
        updates = fit(self, *rest, **options)
        next(iter(updates[1].adapters.values())).B[0, 0] = float("inf")
        return updates

    monkeypatch.setattr(Cohort, "fit", broken)
    folder = flora.run(one(place, "infinite", num_rounds=1))
    [(_, client, why)] = reasons(folder)
    assert client == "client-1" and "expected finite numbers" in why and losses(folder)[1] < losses(folder)[0]


def test_over_sampling_ends_a_round_with_the_first(place):
    folder = flora.run(one(place, "over", fleet=FLEET, fraction_train=0.5, over_sampling=2.0, num_rounds=2))
    rows = read_metrics(folder)
    for number in range(2):
        answered = {row["client"] for row in of(rows, "client") if row["round"] == number}
        late = {row["client"] for row in of(rows, "failure") if row["round"] == number}
        assert len(answered) == 2 == len(late) and not answered & late
    assert all(row["simulated_seconds"] < 10 for row in of(rows, "server") if row["rounds_done"])        # no slow one is waited for
    whole = flora.run(one(place, "all", fleet=FLEET, num_rounds=1))
    assert of(read_metrics(whole), "server")[1]["simulated_seconds"] > 20


def test_late_updates_count_in_the_next_round_if_they_may(place):
    """Two fast devices and two slow ones: under late: next the slow ones' updates go into round 1, in which they sit out."""
    base = {"fleet": FLEET, "round_deadline": 15.0, "num_rounds": 3}
    drop, late = (flora.run(one(place, name, late=name, **base)) for name in ("drop", "next"))
    rows = of(read_metrics(late), "client")
    fast, everybody = ({row["client"] for row in some} for some in (of(read_metrics(drop), "client"), rows))
    assert len(fast) == 2 and len(everybody) == 4
    slow = everybody - fast
    assert [{row["client"] for row in rows if row["round"] == n} & slow for n in range(3)] == [slow, set(), slow]
    assert {client for number, client, why in reasons(late) if number == 0 and "in the next one" in why} == slow
    assert losses(late)[1] == losses(drop)[1] and losses(late)[2] != losses(drop)[2]


def test_late_updates_survive_a_resume(place, monkeypatch):
    """Stopped in the round that takes them."""
    config = one(place, "steady", fleet=FLEET, round_deadline=15.0, num_rounds=3, late="next")
    whole = flora.run(config)
    again = stopped_and_resumed(config, place / "again", monkeypatch, 1)
    assert losses(whole) == losses(again) and folders_agree(whole, again, "model")


def test_settings_that_do_not_go_together_are_refused(place):
    late = {"late": "next", "fleet": FLEET, "round_deadline": 15.0}
    for settings, says in (
            ({"over_sampling": 1.5}, "give a fleet"), ({"late": "next"}, "expected round_deadline or over_sampling"),
            ({**late, "groups": {"count": 2}}, "no groups"), ({"min_clients": 5}, "min_clients: expected at most"),
            ({"min_clients": 3, "fraction_train": 0.5}, "at most"), ({"robust_bound": 1.0}, "are of robust"),
            ({"robust": "median"}, "robust"), ({"robust_share": 0.7}, "robust_share")):
        with pytest.raises(ConfigError, match=says):
            parse(one(place, "bad", **settings))
    for strategy in ("fedsa", "centralized", "standalone", "full"):
        with pytest.raises(StrategyError, match="robust clip: expected a strategy whose clients send whole adapters"):
            flora.run(one(place, "bad", strategy, robust="clip"))
    with pytest.raises(StrategyError, match="trains both factors"):
        flora.run(one(place, "bad", "ffa", **late))
