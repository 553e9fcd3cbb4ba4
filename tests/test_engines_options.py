"""Keys of a run that choose how a method works: they reach server and clients, or are refused at the start."""
import pytest
import torch
from test_engines import of, settings

import flora
from flora.engines import local
from flora.engines.local import resume
from flora.errors import ConfigError, StrategyError
from flora.formats import load_peft
from flora.report import read_metrics, summary

NUMBERS = 16 + 16, 16 + 8, 24 + 16                              # in + out of q_proj, v_proj, down_proj of the tiny model
LAYERS = 2


def one(place, name, strategy, **changes):
    return settings(place, name, strategy, **{"lora_r": 4, "lora_alpha": "2r", "num_rounds": 2, "max_steps": 2, **changes})


def server_rows(folder):
    return of(read_metrics(folder), "server")


def stopped_and_resumed(config, folder, monkeypatch, version):
    """The same run in another folder, interrupted before it aggregates what was trained on this version, and resumed."""
    real = local.Server.close

    def interrupted(self, updates, weights=None):
        if self.broadcast.version == version:
            raise KeyboardInterrupt
        return real(self, updates, weights)

    monkeypatch.setattr(local.Server, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flora.run({**config, "output_dir": str(folder)})
    monkeypatch.setattr(local.Server, "close", real)
    return resume(folder)


def kilobytes(numbers):
    return 4 * LAYERS * numbers


@pytest.mark.parametrize(("strategy", "up", "down"), [
    ("fedit", 4 * sum(NUMBERS), 4 * sum(NUMBERS)),
    ("ffa", 4 * (16 + 8 + 16), 4 * (16 + 8 + 16)),              # B alone, A is known
    ("fedsa", 4 * (16 + 16 + 24), 4 * (16 + 16 + 24)),          # A alone, B stays at home
    ("fedsb", 3 * 16, 3 * 16),                                  # the core
    ("fedsvd", 4 * (16 + 8 + 16), 4 * sum(NUMBERS)),
    ("flora", 4 * sum(NUMBERS), 16 * sum(NUMBERS)),
    ("fedex", 4 * sum(NUMBERS), (16 + 4 + 4) * sum(NUMBERS)),
    ("full", 16 * 16 + 16 * 8 + 24 * 16, 16 * 16 + 16 * 8 + 24 * 16)])
def test_bytes_are_those_of_the_published_table(place, strategy, up, down):
    folder = flora.run(one(place, f"bytes-{strategy}", strategy))
    row, clients = server_rows(folder)[-1], of(read_metrics(folder), "client")
    head = 6_000                                                # JSON and scales of six layers
    assert kilobytes(up) <= row["bytes_up"] / 4 <= kilobytes(up) + head
    assert kilobytes(down) <= row["bytes_down"] / 4 <= kilobytes(down) + head
    assert sum(c["bytes_up"] for c in clients if c["round"] == 1) == row["bytes_up"]
    assert sum(c["bytes_down"] for c in clients if c["round"] == 1) == server_rows(folder)[1]["bytes_down"]


def test_who_is_not_sampled_follows_the_base_but_needs_no_start(place):
    rows = {name: server_rows(flora.run(one(place, f"sampled-{name}", name, fraction_train=0.5)))[1] for name in ("flora", "fedit")}
    assert kilobytes(8 * sum(NUMBERS)) * 4 <= rows["flora"]["bytes_down"]                # two clients' stack, to all four
    assert rows["fedit"]["bytes_down"] < 2 * kilobytes(4 * sum(NUMBERS)) + 12_000          # the average, to the next two


def test_a_start_travels_cut_to_the_rank_of_who_gets_it(place):
    folder = flora.run(one(place, "cut", "zeropad", lora_r=[8, 4, 2, 1]))
    down = {c["client"]: c["bytes_down"] for c in of(read_metrics(folder), "client") if c["round"] == 1}
    for k, rank in enumerate((8, 4, 2, 1)):
        assert kilobytes(rank * sum(NUMBERS)) <= down[f"client-{k}"] <= kilobytes(rank * sum(NUMBERS)) + 6_000


def test_no_round_begins_that_would_go_beyond_the_budget(place):
    free = server_rows(flora.run(one(place, "free", "flora", num_rounds=4)))
    each = free[1]["bytes_up"] + free[1]["bytes_down"]
    budget = (free[0]["bytes_down"] + 2.5 * each) / 1e6
    assert server_rows(flora.run(one(place, "nothing", "flora", communication_budget_mb=0.01)))[-1]["rounds_done"] == 0
    folder = flora.run(one(place, "budget", "flora", num_rounds=4, communication_budget_mb=budget))
    rows = server_rows(folder)
    assert [row["rounds_done"] for row in rows] == [0, 1, 2] and (folder / "model").exists()
    assert sum(row["bytes_up"] + row["bytes_down"] for row in rows) <= 1e6 * budget
    assert '"rounds_done": 2' in (folder / "run.json").read_text()


def test_what_is_not_evaluated_costs_nothing_and_the_last_round_always_is(place):
    every = flora.run(one(place, "every-1", "flora", num_rounds=5))
    some = flora.run(one(place, "every-2", "flora", num_rounds=5, eval_every=2))
    rows = server_rows(some)
    assert [row["rounds_done"] for row in rows if "eval_loss" in row] == [0, 2, 4, 5] and len(rows) == 6
    assert rows[-1]["eval_loss"] == server_rows(every)[-1]["eval_loss"]
    assert len(summary(read_metrics(some))) == 2


def test_starts_and_weights_reach_the_server(place, monkeypatch):
    seen = []
    real = local.Server.close

    def close(self, updates, weights=None):
        seen.append((self.options, self.weighting, real(self, updates, weights)))
        return seen[-1][2]

    monkeypatch.setattr(local.Server, "close", close)
    flora.run(one(place, "warm", "flora", start="warm", weighting=0.5, server_learning_rate=0.7, absent="renormalise"))
    options, weighting, sent = seen[0]
    assert options == {"start": "warm", "server_lr": 0.7, "absent": "renormalise"} and weighting == 0.5
    assert sent.start is not None and {a.rank for a in sent.start.values()} == {4}
    seen.clear()
    flora.run(one(place, "shared", "flora", start="shared", num_rounds=1))
    assert not any(bool(a.B.any()) for a in seen[0][2].start.values())
    seen.clear()
    flora.run(one(place, "cut-florist", "florist", threshold=0.2, num_rounds=1))
    assert max(a.rank for a in seen[0][2].start.values()) < 8


@pytest.mark.parametrize("how", ["compressed", "threshold", "dense", "auto"])
def test_every_downlink_ends_at_the_model_that_it_says(place, how):
    tol = {"downlink_tol": 0.05} if how == "threshold" else {}
    folder = flora.run(one(place, f"down-{how}", "flora", downlink=how, **tol))
    plain = flora.run(one(place, "down-stack", "flora", overwrite=True))
    rows, compared = server_rows(folder), server_rows(plain)
    assert abs(rows[-1]["eval_loss"] - compared[-1]["eval_loss"]) < (1e-4 if not tol else 0.05)
    assert rows[-1]["downlink_error"] <= (0.05 if tol else 1e-6) and "downlink_error" not in compared[-1]
    if how == "auto":
        assert rows[-1]["bytes_down"] < compared[-1]["bytes_down"]


def test_hetlora_prunes_its_ranks_for_good_and_resume_remembers(place, monkeypatch):
    config = one(place, "het", "hetlora", lora_r=8, num_rounds=5, max_steps=8, rank_decay=0.5, rank_penalty=1.0,
                 learning_rate=3e-3)
    folder = flora.run(config)
    ranks = [[c["rank"] for c in of(read_metrics(folder), "client") if c["round"] == number] for number in range(5)]
    assert ranks[0] == ranks[1] == [8] * 4 and ranks[3] == [4] * 4 and ranks[4] == [2] * 4     # B = 0 at first: nothing can shrink
    again = stopped_and_resumed(config, place / "het-2", monkeypatch, 3)
    assert [c["rank"] for c in of(read_metrics(again), "client")] == [rank for some in ranks for rank in some]
    assert server_rows(again)[-1]["eval_loss"] == server_rows(folder)[-1]["eval_loss"]


def test_moments_that_are_kept_survive_an_interruption(place, monkeypatch):
    config = one(place, "kept", "fedit", num_rounds=3, optimizer_state="keep", keep_rounds=3)
    kept, reset = flora.run(config), flora.run({**config, "output_dir": str(place / "reset"), "optimizer_state": "reset"})
    assert server_rows(kept)[1]["eval_loss"] == server_rows(reset)[1]["eval_loss"]
    assert server_rows(kept)[2]["eval_loss"] != server_rows(reset)[2]["eval_loss"]
    again = stopped_and_resumed(config, place / "kept-2", monkeypatch, 1)
    for name, a in load_peft(kept / "rounds" / "2" / "aggregate").items():
        assert torch.equal(load_peft(again / "rounds" / "2" / "aggregate")[name].B, a.B)


@pytest.mark.parametrize("strategy", ["flora", "zeropad", "flexlora", "florist", "raflora"])
def test_adalora_prunes_by_layer_under_every_method_that_can_take_it(place, strategy):
    folder = flora.run(one(place, f"ada-{strategy}", strategy, lora_r=8, adalora=True, adalora_keep=0.5, max_steps=8))
    rows = of(read_metrics(folder), "client")
    assert {row["ranks"] for row in rows} == {8 * 6 // 2} and not of(read_metrics(folder), "failure")
    ranks = {a.rank for a in load_peft(folder / "rounds" / "1" / "clients" / "client-0").values()}
    assert len(ranks) > 1 and server_rows(folder)[-1]["eval_loss"] < server_rows(folder)[0]["eval_loss"]


@pytest.mark.parametrize(("strategy", "changes", "error", "says"), [
    ("fedit", {"start": "warm"}, ConfigError, "start: expected strategy flora with it; got fedit"),
    ("flora", {"threshold": 0.5}, ConfigError, "threshold: expected strategy florist"),
    ("hetlora", {"weighting": "uniform"}, ConfigError, "weighting: expected strategy flora or"),
    ("flora", {"rank_decay": 0.5}, ConfigError, "rank_decay: expected strategy hetlora"),
    ("fedit", {"adalora": True}, ConfigError, "adalora: expected strategy flora or zeropad"),
    ("full", {"adalora": True}, ConfigError, "adalora: expected"),
    ("fedit", {"downlink": "auto"}, StrategyError, "downlink auto: expected a strategy that sends an update"),
    ("fedit", {"lora_r": [4, 4, 4, 2]}, StrategyError, "mixed ranks|one rank"),
    ("fedit", {"lora_alpha": [8, 8, 8, 4]}, StrategyError, "one scale"),
    ("ffa", {"lora_alpha": [8, 8, 8, 4]}, StrategyError, "one scale"),
    ("fedsa", {"lora_alpha": [8, 8, 8, 4]}, StrategyError, "one scale"),
    ("fedex", {"lora_alpha": [8, 8, 8, 4]}, StrategyError, "one scale"),
    ("full", {"weighting": 0.5}, ConfigError, "weighting: expected a strategy of adapters"),
    ("full", {"merge_into": "adapter"}, ConfigError, "merge_into: expected a strategy of adapters"),
    ("full", {"downlink": "auto"}, ConfigError, "downlink: expected a strategy of adapters"),
    ("fedsb", {"adapter_dtype": "bfloat16"}, ConfigError, "adapter_dtype: expected float32 with fedsb"),
    ("nosuch", {}, StrategyError, "nosuch")])
def test_what_the_strategy_would_refuse_is_refused_before_anybody_trains(place, monkeypatch, strategy, changes, error, says):
    def never(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(local.Cohort, "fit", never)
    with pytest.raises(error, match=says):
        flora.run(one(place, "refused", strategy, **changes, overwrite=True))


def test_mixed_alpha_is_folded_where_that_is_asked(place):
    folder = flora.run(one(place, "folded", "fedit", lora_alpha=[8, 8, 8, 4], mixed_alpha="fold"))
    assert len(server_rows(folder)) == 3


@pytest.mark.parametrize("bad", [{"downlink_tol": 0.1}, {"downlink": "threshold"}, {"evaluate": ["nothing"]}, {"weighting": -1.0},
                                 {"weighting": "size"}, {"eval_every": 0}, {"communication_budget_mb": 0}, {"proximal_mu": -1},
                                 {"adalora_keep": 0.5},
                                 {"downlink": "dense", "merge_into": "adapter"}, {"downlink": "auto", "merge_residual": True},
                                 {"downlink": "dense", "merge_rounding": "stochastic"}])
def test_keys_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError):
        flora.config.parse(bad)


def test_a_single_evaluation_may_stand_without_a_list():
    assert flora.config.parse({"evaluate": "labels"}).evaluate == ["labels"] and flora.config.parse({}).evaluate == "auto"


def test_a_run_that_its_budget_stops_is_evaluated_where_it_stops(place):
    free = server_rows(flora.run(one(place, "free-2", "flora", num_rounds=4)))
    each = free[1]["bytes_up"] + free[1]["bytes_down"]
    folder = flora.run(one(place, "stopped", "flora", num_rounds=4, eval_every=2,
                           communication_budget_mb=(free[0]["bytes_down"] + 1.5 * each) / 1e6))
    rows = server_rows(folder)
    assert [(row["rounds_done"], "eval_loss" in row) for row in rows] == [(0, True), (1, False), (1, True)]
    assert rows[-1]["eval_loss"] == free[1]["eval_loss"] and rows[-1]["bytes_down"] == 0


def test_a_round_in_which_all_fail_sends_nothing_again(place, monkeypatch):
    real = local.Cohort.fit

    def fit(self, sent, **options):
        updates = real(self, sent, **options)
        fit.count += 1
        return [] if fit.count == 2 else updates

    fit.count = 0
    monkeypatch.setattr(local.Cohort, "fit", fit)
    for strategy in ("flora", "fedit"):
        fit.count = 0
        rows = server_rows(flora.run(one(place, f"fail-{strategy}", strategy, num_rounds=3)))
        assert rows[2]["bytes_up"] == rows[2]["bytes_down"] == 0 and rows[3]["bytes_down"] > 0


@pytest.mark.parametrize("strategy", ["fedsb", "rolora", "full", "fedsvd"])
def test_an_interrupted_run_of_any_method_ends_with_the_same_rows(place, monkeypatch, strategy):
    config = one(place, f"whole-{strategy}", strategy, num_rounds=3)
    folder = flora.run(config)
    again = stopped_and_resumed(config, place / f"again-{strategy}", monkeypatch, 2)
    drop = ("seconds", "tokens_per_second")
    assert [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(again)] == \
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(folder)]
