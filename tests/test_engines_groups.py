"""Groups and a fleet in whole runs: real training, simulated time."""
import pytest
import torch
from test_engines import of, settings
from test_engines_options import stopped_and_resumed

import flora
from flora.config import parse
from flora.errors import ConfigError, StrategyError
from flora.formats import load_peft
from flora.report import read_metrics, summary

FAST = {"name": "fast", "count": 2, "seconds_per_layer_step": 1.0, "memory_mb": 100.0, "up_mbps": 1.0, "down_mbps": 1.0}
SLOW = {**FAST, "name": "slow", "seconds_per_layer_step": 10.0}
FLEET = [FAST, SLOW]


def one(place, name, strategy="flora", **changes):
    base = {"lora_r": 4, "lora_alpha": "2r", "num_rounds": 2, "max_steps": 2,
            "partition": {"dirichlet_alpha": 1.0, "label": "mood"}}
    return settings(place, name, strategy, **{**base, **changes})


def servers(folder):
    return of(read_metrics(folder), "server")


def test_groups_of_one_inner_round_are_flat_flora(place):
    flat = flora.run(one(place, "flat"))
    grouped = flora.run(one(place, "grouped", groups={"count": 2}))
    rows = of(read_metrics(grouped), "client")
    assert {row["client"] for row in rows} == {"group-0", "group-1"} and {row["members"] for row in rows} == {2}
    for number in "01":
        want, have = (load_peft(folder / "rounds" / number / "aggregate") for folder in (flat, grouped))
        for layer, a in want.items():
            exact = a.delta()
            assert float((have[layer].delta() - exact).norm()) < 1e-4 * float(exact.norm())
    assert abs(servers(grouped)[-1]["eval_loss"] - servers(flat)[-1]["eval_loss"]) < 1e-4


def test_inner_rounds_depth_and_rank_reach_the_groups(place):
    deep = flora.run(one(place, "deep", groups={"count": 2, "inner_rounds": 3, "depth": 1, "rank": 3, "by": "random"}))
    rows = of(read_metrics(deep), "client")
    assert all(row["inner_rounds"] == 3 and row["depth"] == 1 and row["steps"] == 2 * 3 * 2 for row in rows)
    assert all(0 < row["compress_error"] < 1 for row in rows)
    adapters = load_peft(deep / "rounds" / "1" / "clients" / "group-0")
    assert {a.rank for a in adapters.values()} == {3} and all(".1." in layer for layer in adapters)
    assert servers(deep)[-1]["eval_loss"] < servers(deep)[0]["eval_loss"]


def test_every_strategy_is_judged_by_one_clock(place):
    for strategy, up in (("flora", 4 * 4 * 2 * 96), ("fedit", 4 * 4 * 2 * 96), ("ffa", 4 * 4 * 2 * 40)):
        folder = flora.run(one(place, f"clock-{strategy}", strategy, fleet=FLEET))
        first = servers(folder)[1]
        down = max(row["bytes_down"] for row in of(read_metrics(folder), "client") if row["round"] == 0)
        assert first["simulated_seconds"] == pytest.approx(2 * 10.0 * 2 + 8e-6 * (up + down), rel=1e-6)      # a slow one's blocks
        assert summary(read_metrics(folder))[0].columns[-1].header == "simulated s"
        total = sum(row["simulated_seconds"] for row in servers(folder)[1:])
        assert servers(folder)[2]["simulated_total"] == pytest.approx(total)


def test_who_is_late_does_not_train_and_is_named(place):
    folder = flora.run(one(place, "late", fleet=FLEET, round_deadline=20.0))
    rows = read_metrics(folder)
    assert len(of(rows, "failure")) == 4 and {row["reason"] for row in of(rows, "failure")} == {"its device is late in this round"}
    assert len(of(rows, "client")) == 4 and [row["lost"] for row in servers(folder)[1:]] == [2, 2]
    gone = flora.run(one(place, "gone", num_rounds=4, fleet=[{**FAST, "count": 4, "availability": 0.4}]))
    reasons = {row["reason"] for row in of(read_metrics(gone), "failure")}
    assert "its device has vanished in this round" in reasons and len(servers(gone)) == 5


def test_memory_bounds_ranks_and_names_who_is_left_out(place, capsys):
    fleet = [{**FAST, "memory_mb": 16 * 2 * 96 * 2 / 1e6}, {**SLOW, "count": 1, "memory_mb": 1e-3},
             {**SLOW, "name": "wide", "count": 1}]
    folder = flora.run(one(place, "memory", fleet=fleet, quiet=False))
    rows = [row for row in of(read_metrics(folder), "client") if row["round"] == 0]
    assert sorted(row["rank"] for row in rows) == [2, 2, 4] and {row["alpha"] / row["rank"] for row in rows} == {2.0}
    assert "is left out of the run: device-" in capsys.readouterr().err


def test_ranks_that_memory_bounds_stay_as_they_are_after_a_resume(place, monkeypatch):
    config = one(place, "bound", keep_rounds=2, fleet=[{**FAST, "memory_mb": 16 * 2 * 96 * 2 / 1e6}, SLOW])
    folder = flora.run(config)
    again = stopped_and_resumed(config, place / "bound-2", monkeypatch, 1)
    ranks = [[(row["rank"], row["alpha"]) for row in of(read_metrics(path), "client")] for path in (folder, again)]
    assert ranks[0] == ranks[1] and sorted(set(ranks[0])) == [(2, 4), (4, 8)]
    for layer, a in load_peft(folder / "rounds" / "1" / "aggregate").items():
        assert torch.equal(load_peft(again / "rounds" / "1" / "aggregate")[layer].delta(), a.delta())


def test_members_take_the_broadcast_and_then_their_groups_stack(place):
    base = {"fleet": [{**FAST, "count": 4, "seconds_per_layer_step": 1e-6}], "groups": {"count": 2, "inner_rounds": 3}}
    for name, inner, rank in (("stacks", "flora", 8), ("averages", "flexlora", 4)):
        folder = flora.run(one(place, f"inner-{name}", **{**base, "groups": {**base["groups"], "inner": inner}}))
        received = max(row["bytes_down"] for row in of(read_metrics(folder), "client") if row["round"] == 1)
        up = 4 * 4 * 2 * 96
        expected = 8e-6 * (received + 2 * up * rank / 4 + 3 * up)
        assert servers(folder)[2]["simulated_seconds"] == pytest.approx(expected, rel=1e-3)


def test_the_chooser_counts_the_backhaul(place):
    config = one(place, "backhaul", num_rounds=3, fleet=FLEET, round_deadline=90.0, groups={"count": 2, "choose": True})
    free = flora.run(config)
    up = max(row["bytes_up"] for row in of(read_metrics(free), "client"))
    folder = flora.run({**config, "output_dir": str(place / "backhaul-2"), "backhaul_mbps": 8e-6 * up / 25})
    rows = read_metrics(folder)
    assert all(row["simulated_seconds"] <= 90 for row in servers(folder)[1:]) and not of(rows, "failure")
    inner = [[row["inner_rounds"] for row in of(read_metrics(path), "client")] for path in (free, folder)]
    assert sum(inner[1]) < sum(inner[0])


def test_the_chooser_keeps_the_deadline_and_resumes_as_it_was(place, monkeypatch):
    config = one(place, "choose", num_rounds=3, fleet=FLEET, round_deadline=90.0, groups={"count": 2, "choose": True})
    folder = flora.run(config)
    rows = of(read_metrics(folder), "client")
    assert all(row["simulated_seconds"] <= 90 for row in servers(folder)[1:]) and not of(read_metrics(folder), "failure")
    assert max(row["inner_rounds"] for row in rows) > 1
    again = stopped_and_resumed(config, place / "choose-2", monkeypatch, 2)
    drop = ("seconds", "tokens_per_second", "bytes_up")
    assert [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(again)] == \
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(folder)]
    for layer, a in load_peft(folder / "rounds" / "2" / "aggregate").items():
        assert torch.equal(load_peft(again / "rounds" / "2" / "aggregate")[layer].B, a.B)


def test_tokens_are_grouped_where_there_are_no_labels(place):
    folder = flora.run(one(place, "tokens", partition={"by": "who"}, groups={"count": 2, "inner_rounds": 2}))
    assert len(of(read_metrics(folder), "client")) == 4


@pytest.mark.parametrize(("changes", "says"), [
    ({"fleet": [FAST]}, "as many devices as num_clients"), ({"round_deadline": 3.0}, "give a fleet"),
    ({"groups": {"count": 9}}, "at most num_clients"), ({"groups": {"count": 2, "choose": True}}, "to choose within"),
    ({"groups": {"count": 0}}, "count"), ({"groups": {"number": 2}}, "no such key"),
    ({"fleet": [{**FAST, "count": 4, "ram": 3}]}, "ram"),
    ({"groups": {"count": 2, "choose": True, "bytes_mb": 5.0}}, "expected a fleet"),
    ({"groups": {"count": 2, "depth": 3}}, "depth of at most 2"),
    ({"fleet": [{**FAST, "count": 4}], "round_deadline": 0.1}, "deadline"),
    ({"fleet": [{**FAST, "count": 4, "memory_mb": 1e-3}]}, "memory for rank 1")])
def test_groups_and_fleets_that_cannot_be_are_refused(place, changes, says):
    with pytest.raises(ConfigError, match=says):
        flora.run(one(place, "refused-groups", **changes, overwrite=True))


@pytest.mark.parametrize("strategy", ["ffa", "rolora", "fedsb", "hetlora", "full", "fedit"])
def test_strategies_that_cannot_aggregate_groups_say_so(place, strategy):
    with pytest.raises(StrategyError, match="Aggregate groups by flora"):
        flora.run(one(place, "refused-strategy", strategy, groups={"count": 2}, overwrite=True))


def test_groups_and_fleet_are_keys_of_a_file():
    config = parse({"num_clients": 4, "fleet": FLEET, "groups": {"count": 2}})
    assert config.fleet[1].seconds_per_layer_step == 10.0 and parse(config.model_dump()) == config
