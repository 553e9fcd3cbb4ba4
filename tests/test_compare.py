"""Strategies compared over seeds: what runs, what is kept and gone on with, and the numbers, against ones worked out here."""
import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from tiny import TARGETS, save_model, write_rows

import flora
from flora import comparison, timing
from flora.cli import main
from flora.comparison import choice, planned, split_entries, variant
from flora.errors import ConfigError, RunError, StrategyError
from flora.report import Report, read_metrics
from flora.spread import over_seeds, paired, spread, t_quantile
from flora.tables import against, clock, final


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", 40)
    return folder


def settings(place, name, **changes):
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 2, "num_rounds": 2,
            "lora_r": 4, "max_steps": 2, "learning_rate": 1e-2, "eval_rows_per_client": 2, "server_eval_rows": 6,
            "target_modules": list(TARGETS), "device": "cpu", "output_dir": str(place / name), **changes}


@pytest.fixture(scope="module")
def compared(place):
    return flora.compare(settings(place, "two"), ["flora", "fedit"], [0, 1])


def losses(folder):
    return {row["rounds_done"]: row["eval_loss"] for row in read_metrics(folder) if row["kind"] == "server"}


def test_every_entry_runs_with_every_seed_and_the_numbers_are_those_of_the_runs(compared):
    found = json.loads((compared / "compare.json").read_text())
    assert [entry["name"] for entry in found["entries"]] == ["flora", "fedit"]
    last = {name: [losses(compared / name / f"seed-{seed}")[2] for seed in (0, 1)] for name in ("flora", "fedit")}
    for entry in found["entries"]:
        one, two = last[entry["name"]]
        assert entry["final"]["eval_loss"] == {"mean": pytest.approx((one + two) / 2), "count": 2,
                                               "sd": pytest.approx(abs(one - two) / math.sqrt(2))}
        runs = [losses(compared / entry["name"] / f"seed-{seed}") for seed in (0, 1)]
        means = {str(n): pytest.approx((runs[0][n] + runs[1][n]) / 2) for n in range(3)}
        assert {n: number["mean"] for n, number in entry["by_round"]["eval_loss"].items()} == means
        rows = [row for row in read_metrics(compared / entry["name"] / "seed-0") if row["kind"] == "server"]
        assert entry["runs"]["0"]["bytes_up"] == sum(row["bytes_up"] for row in rows) > 0
        assert "eval_perplexity" not in entry["final"] and entry["best"]["eval_loss"] <= entry["final"]["eval_loss"]["mean"] + 1e-12
    first = [losses(compared / name / f"seed-{seed}")[0] for name in ("flora", "fedit") for seed in (0, 1)]
    assert first[:2] == pytest.approx(first[2:]) and abs(first[0] - first[1]) > 1e-3    # held-out rows are the seed's
    less = [fedit - flora_ for fedit, flora_ in zip(last["fedit"], last["flora"], strict=True)]
    assert found["entries"][1]["against_first"]["eval_loss"]["mean"] == pytest.approx(sum(less) / 2)


def test_the_tables_in_markdown(compared):
    text = (compared / "compare.md").read_text()
    assert text.count("\n## ") == 3 and "| fedit | " in text and " ± " in text
    assert ("compare.svg" in text) == (compared / "compare.svg").exists()


def test_the_lines_in_svg(compared):
    pytest.importorskip("matplotlib", reason="the plot of a comparison is not tested: pip install 'flora[plot]'")
    picture = (compared / "compare.svg").read_text()
    assert all(f">{word}<" in picture for word in ("flora", "fedit", "held-out loss", "rounds done"))
    assert not list(compared.glob(".*"))


def test_a_comparison_that_was_interrupted_goes_on_where_it_stopped(place, compared, monkeypatch, capsys):
    config = settings(place, "stopped")
    steps = []

    def stop(self, client, *_):
        steps.append(client)
        if len(steps) == 4 * 2 + 4 + 1:                         # 2 rounds x 2 clients x 2 steps of flora, one round of fedit
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Report, "on_step", stop)
        with pytest.raises(KeyboardInterrupt):
            flora.compare(config, ["flora", "fedit"], [0, 1])
    where = place / "stopped"
    assert json.loads((where / "fedit/seed-0/run.json").read_text()) == {"state": "interrupted", "rounds_done": 1}
    assert not (where / "compare.json").exists() and not (where / "flora" / "seed-1").exists()
    kept = (where / "flora/seed-0/metrics.jsonl").read_bytes()
    capsys.readouterr()
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Report, "on_step", lambda self, client, *_: steps.append(client))
        flora.compare(config, ["flora", "fedit"], [0, 1])
    assert len(steps) == 4 + 2 * 8                              # the round of fedit that was missing, and both of seed 1
    said = capsys.readouterr()
    assert "flora, seed 0 (1 of 4): finished before" in said.err and "fedit, seed 0 (2 of 4): goes on" in said.err
    assert "flora, seed 1 (3 of 4)\n" in said.err and "global model" not in said.out
    assert (where / "flora/seed-0/metrics.jsonl").read_bytes() == kept
    for name in ("flora", "fedit"):
        for seed in (0, 1):
            assert losses(where / name / f"seed-{seed}") == losses(compared / name / f"seed-{seed}")


def test_a_finished_run_of_another_config_is_refused_before_anything_runs(place, compared, monkeypatch):
    config = settings(place, "two", max_steps=1)
    monkeypatch.setattr(comparison, "_run", lambda *_: pytest.fail("it ran"))
    says = r"flora/seed-0.*max_steps \(2 there, 1 now\).*--output_dir.*--overwrite"
    with pytest.raises(RunError, match=says):
        flora.compare(config, ["zeropad", "flora"], [0])
    flora.compare(settings(place, "two"), ["fedit", "flora"], [1, 0])           # the same runs: nothing runs
    with pytest.raises(pytest.fail.Exception, match="it ran"):
        flora.compare({**config, "overwrite": True}, ["flora"], [0])


def test_the_folder_of_one_run_is_not_that_of_a_comparison(place, compared):
    with pytest.raises(RunError, match="which holds one"):
        flora.compare(settings(place, "two/flora/seed-0"), ["flora"])


def test_variants_learning_rates_and_the_command_line(place, monkeypatch, capsys):
    (place / "config.yaml").write_text(yaml.safe_dump(settings(place, "grid", num_rounds=1)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)        # as if it were not installed
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["compare", str(place / "config.yaml"), "--strategies", "flora:lora_r=[8,2]+max_steps=1,fedit", "--seeds", "3",
                 "--lr-grid", "1e-2,1e-6", "--eval_rows_per_client", "1"]) == 0
    said = capsys.readouterr().out
    assert "flora:lora_r=[8,2]+max_steps=1 at 0.01" in said and "one seed: no spread known" in said
    assert "0.01, an edge of the grid" in said and "pip install 'flora[plot]'" in said
    found = json.loads((place / "grid" / "compare.json").read_text())
    assert found["entries"][0]["learning_rate"] == 0.01 and len(found["variants"]) == 4 and found["learning_rates"][0]["edge"]
    rows = read_metrics(found["variants"][0]["runs"]["3"]["folder"])
    assert [(r["rank"], r["steps"]) for r in rows if r["kind"] == "client"] == [(8, 1), (2, 1)]
    resolved = yaml.safe_load((Path(found["variants"][3]["runs"]["3"]["folder"]) / "config.yaml").read_text())
    assert (resolved["strategy"], resolved["learning_rate"], resolved["seed"]) == ("fedit", 1e-6, 3)
    assert resolved["eval_rows_per_client"] == 1


@pytest.mark.parametrize(("entries", "error", "says"), [
    (["flor"], StrategyError, "Did you mean 'flora'"), (["flora", "flora"], ConfigError, "each once"), ([], ConfigError, "none"),
    (["flora:lora_rr=4"], ConfigError, "flora:lora_rr=4: lora_rr: no such key; did you mean lora_r"),
    (["flora:warm"], ConfigError, "key=value"), (["flora:seed=1"], ConfigError, "'seed=1'"),
    (["flora:lora_r=0"], ConfigError, "lora_r: .*greater than 0"), (["flora:lora_r=[8"], ConfigError, "YAML value for lora_r"),
    (["fedit:start=warm"], ConfigError, "start: expected strategy flora with it; got fedit"),
    (["fedit:lora_r=[8,4]"], StrategyError, "fedit:lora_r=.*one rank")], ids=str)
def test_a_bad_entry_is_refused_before_anything_runs(place, monkeypatch, entries, error, says):
    monkeypatch.setattr(comparison, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(error, match=says):
        flora.compare(settings(place, "bad"), entries if len(entries) != 1 else ["zeropad", *entries], [0])
    assert not (place / "bad").exists()


@pytest.mark.parametrize(("arguments", "code", "says"), [
    ([], 2, "required: --strategies"), (["--strategies", "flora", "--seeds", "a"], 2, "expected numbers"),
    (["--strategies", "flora", "--seeds", "0,0"], 1, "each once"), (["none.yaml", "--strategies", "flora"], 1, "none.yaml"),
    (["--strategies", "flora:learning_rate=1", "--lr-grid", "1,2"], 1, "without learning_rate")], ids=str)
def test_wrong_words_on_the_command_line(tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == code and says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_entries_are_split_and_parsed():
    assert split_entries("flora, flora:lora_r=[8,4]+start=warm,fedit") == ["flora", "flora:lora_r=[8,4]+start=warm", "fedit"]
    base = flora.config.parse({"num_clients": 2, "partition": {"dirichlet_alpha": 1.0, "label": "topic"}})
    one = variant(base, "flora:start=warm+learning_rate=1e-3+partition.dirichlet_alpha=1e+1").config
    assert (one.start, one.learning_rate, one.partition.dirichlet_alpha, one.partition.label) == ("warm", 1e-3, 10.0, "topic")
    names = [each.name for each in planned(base, ["fedit", "flora:start=warm"], [1e-3, 0.01])]
    assert names == ["fedit:learning_rate=0.001", "fedit:learning_rate=0.01", "flora:start=warm+learning_rate=0.001",
                     "flora:start=warm+learning_rate=0.01"]


def test_a_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, bound 4.303 / √3 = 2.484; 3, 4, 5: mean 4."""
    first = {0: 10.0, 1: 20.0, 2: 30.0}
    near, far = paired({0: 11.0, 1: 22.0, 2: 33.0}, first), paired({0: 13.0, 1: 24.0, 2: 35.0}, first)
    assert (near["mean"], near["sd"], near["bound"]) == (2.0, 1.0, pytest.approx(4.303 / math.sqrt(3)))
    assert near["says"] == "within the spread" and far["mean"] == 4.0 and far["says"] == "higher"
    assert paired(first, {seed: value + 1 for seed, value in first.items()})["says"] == "lower"
    assert paired(first, first)["says"] == "within the spread"
    assert paired({0: 1.0}, first)["says"] == "one seed: no spread known"
    assert paired({0: 1.0, 1: math.nan}, first)["says"] == "a seed diverged"
    assert paired({7: 1.0}, first)["says"] == "no seed in common"


def test_quantiles_of_t_are_those_of_the_books():
    for degrees, book in ((1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (20, 2.086), (60, 2.000), (1000, 1.962)):
        assert t_quantile(degrees) == pytest.approx(book, rel=1e-3)
    assert spread([1.0, math.inf]) == {"mean": None, "sd": None, "count": 2} and spread([3.0])["sd"] is None


def made(losses_by_seed, rate=1.0, extra=None):
    """An entry from losses by round, rounds that were not evaluated left out."""
    runs = {seed: {"rounds": {n: {"eval_loss": loss, **(extra or {})} for n, loss in found.items()}, "bytes_up": 2e6,
                   "bytes_down": 4e6, "seconds": 9.0} for seed, found in losses_by_seed.items()}
    return {"name": f"made at {rate:g}", "entry": "made", "learning_rate": rate, "seeds": list(runs), "runs": runs,
            **over_seeds(runs)}


def test_rounds_without_an_evaluation_and_runs_that_ended_early():
    entry = made({0: {0: 4.0, 2: 2.0, 4: 3.0}, 1: {0: 4.0, 2: 1.0}}, extra={"eval_label_accuracy": 0.5})
    assert entry["final"]["eval_loss"]["mean"] == 2.0 and entry["best"] == {"rounds_done": 2, "eval_loss": 1.5}
    assert {n: f["count"] for n, f in entry["by_round"]["eval_loss"].items()} == {0: 2, 2: 2, 4: 1}
    page = final([entry])
    assert page.columns[3] == "label accuracy, %" and page.rows[0][3] == "50.0 ± 0.0" and page.rows[0][-3:] == ["2.0", "4.0", "9"]
    other = {**made({0: {2: 9.0}, 1: {2: 9.0}}), "name": "[other]", "against_first": {"eval_loss": paired({0: 9.0}, {0: 2.0})}}
    assert against([entry, other]).rows == [["[other]", "loss", "+7.0000", "one seed: no spread known"]]
    assert against([entry, other]).rich().columns[0]._cells == ["\\[other]"]


def test_the_best_learning_rate_and_the_edge_of_the_grid():
    plan = [comparison.Variant(f"made at {rate:g}", "made", None) for rate in (1.0, 2.0, 3.0)]

    def chosen(*last):
        results = {one.name: made({0: {1: loss}}, rate) for one, rate, loss in zip(plan, (1.0, 2.0, 3.0), last, strict=True)}
        found = choice("made", plan, results)
        return found["best"], found["edge"]

    assert chosen(3.0, 1.0, 2.0) == (2.0, False) and chosen(3.0, 2.0, 1.0) == (3.0, True)
    assert chosen(math.nan, 2.0, math.inf) == (2.0, False)


@pytest.mark.parametrize(("changes", "entries"), [
    ({"start": "warm"}, ["flora", "fedit"]), ({"rank_decay": 0.9}, ["hetlora", "flora"]), ({}, ["flora", "fedit:rank_decay=0.9"]),
    ({"downlink": "compressed"}, ["flora", "fedit"]), ({"num_clients": 2, "lora_alpha": [1, 2]}, ["flora", "fedit"]),
    ({"adalora": True}, ["flora", "ffa"]), ({"weighting": "uniform"}, ["flora", "hetlora"])])
def test_an_entry_that_the_strategy_would_refuse_is_refused_before_any_runs(changes, entries):
    from flora.comparison import planned
    from flora.errors import FloraError
    with pytest.raises(FloraError, match=entries[1].partition(":")[0]):
        planned(flora.config.parse({"lora_r": 4, **changes}), entries)


def runs_of(simulated, losses, accuracies):
    """A run by seed 0, evaluated after every round."""
    rounds = {n: {"eval_loss": loss, "eval_accuracy": hit} for n, (loss, hit) in enumerate(zip(losses, accuracies, strict=True))}
    run = {"rounds": rounds, "simulated": dict(enumerate(simulated)), "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
    return {"runs": {0: run}, **over_seeds({0: run})}


def test_runs_on_one_clock():
    slow = runs_of([0, 10, 20, 30], [4.0, 3.0, 2.5, 2.0], [0.1, 0.2, 0.5, 0.4])
    quick = runs_of([0, 4, 8, 12, 16], [4.0, 3.5, 1.9, 2.1, 1.8], [0.1, 0.2, 0.3, 0.3, 0.35])
    first, second = timing.by_clock([slow, quick])
    assert first["at"] == {0: 16} and second["less"]["eval_loss"]["mean"] == pytest.approx(1.8 - 3.0)
    assert [one["reached"]["eval_loss"]["mean"] for one in (first, second)] == [3.0, 1.8]
    assert first["seconds"]["eval_loss"]["mean"] == 30 and first["times"]["eval_loss"]["mean"] == 1
    assert second["seconds"]["eval_loss"]["mean"] == 8 and second["times"]["eval_loss"]["mean"] == pytest.approx(30 / 8)
    assert first["seconds"]["eval_accuracy"]["mean"] == 20       # it had 0.4 before it ended with it
    assert second["seconds"]["eval_accuracy"]["count"] == 0 and second["times"]["eval_accuracy"]["mean"] is None
    for one, name, found in ((slow, "slow", first), (quick, "quick", second)):
        one.update(name=name, seeds=[0], clock=found)
    equal, times = clock([slow, quick])
    assert equal.title == "at equal simulated time: after 16 s, when the quickest is done"
    assert equal.rows[1] == ["quick", "1.8000", "one seed: no spread known", "35.0", "one seed: no spread known"]
    assert times.rows == [["slow", "30", "1.00", "20", "1.00"], ["quick", "8", "3.75", "– (0 of 1 seeds)", "–"]]


def test_a_comparison_with_a_fleet_is_shown_by_its_clock(place):
    fleet = [{"name": "one", "count": 2, "seconds_per_layer_step": 1.0, "memory_mb": 100.0, "up_mbps": 1.0, "down_mbps": 1.0}]
    where = flora.compare(settings(place, "clock", fleet=fleet, num_rounds=1), ["flora", "fedit"])
    text = (where / "compare.md").read_text()
    assert "## at equal simulated time" in text and "## simulated seconds to what flora ends with" in text
    pytest.importorskip("matplotlib", reason="the axis of simulated time is not tested: pip install 'flora[plot]'")
    assert "simulated seconds" in (where / "compare.svg").read_text()
