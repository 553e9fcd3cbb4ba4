"""What a run's server made of saved adapters: exact where it is, not where it is not, and an error where a file was changed."""
import math

import pytest
import safetensors.torch
import torch
import yaml
from tiny import TARGETS, adapter, dense, save_model, write_rows

import flora
from flora.checkpoint import RunFolder
from flora.cli import main
from flora.client import LocalClient
from flora.config import parse
from flora.errors import RunError
from flora.formats import load_peft
from flora.messages import Broadcast, Update
from flora.report import Report
from flora.server import Server
from flora.strategies import STRATEGIES
from flora.verification import conclusion

SHAPES = {"model.one": (12, 8), "model.two": (9, 16)}
EXAMPLES = (30, 7, 5)
ROWS = [{"input_ids": [2, 3], "labels": [-100, 3]}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two rounds of flora, mixed ranks and alphas, and of fedit, on a tiny model."""
    place = tmp_path_factory.mktemp("verified")
    save_model(place / "model")
    write_rows(place / "rows.jsonl", 40)
    common = {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 2, "num_rounds": 2,
              "max_steps": 4, "learning_rate": 1e-2, "eval_rows_per_client": 2, "server_eval_rows": 6, "quiet": True,
              "target_modules": list(TARGETS), "device": "cpu", "keep_rounds": 2}
    changes = {"flora": {"lora_r": [8, 2], "lora_alpha": [16, 1]}, "fedit": {"lora_r": 4}, "standalone": {"lora_r": 4},
               "kept1": {"lora_r": 2, "keep_rounds": 1, "max_steps": 1}}
    return {name: flora.run({**common, "strategy": "flora" if name == "kept1" else name, "output_dir": str(place / name), **more})
            for name, more in changes.items()}


def simulated(folder, strategy, config=None, options=None, rounds=3, missing=()):
    """A run folder of a server's rounds, its clients' adapters drawn at random. missing: (round, client, layer) not trained."""
    settings = {"strategy": strategy, "num_clients": 3, "lora_r": 4, "keep_rounds": 9, "output_dir": str(folder), **(config or {})}
    config = parse(settings)
    run = RunFolder(folder)
    run.begin(yaml.safe_dump(config.model_dump(exclude={"overwrite"})), {})
    clients = [LocalClient(f"client {k}", ROWS, rank, 2.0 * rank) for k, rank in enumerate(config.ranks())]
    start = STRATEGIES[strategy].begin(SHAPES, config.ranks(), 0)
    server = Server(strategy, clients, start, weighting=config.weighting, options=options)
    report = Report(run.path)
    for number in range(rounds):
        updates = [Update({layer: adapter(c.rank, shape, seed=97 * number + 10 * k + j) for j, (layer, shape) in
                           enumerate(SHAPES.items()) if (number, k, j) not in missing}, EXAMPLES[k],
                          base_version=server.broadcast.version, client=c.name) for k, c in enumerate(clients)]
        server.close(updates)
        run.save_round(number, updates, server.broadcast, config.keep_rounds, "none")
        for u in updates:
            report.add({"kind": "client", "round": number, "client": u.client, "num_examples": u.num_examples})
    run.mark("finished", rounds)
    return run.path


def test_flora_is_exact_and_fedit_is_not(runs):
    exact, averaged = flora.verify(runs["flora"]), flora.verify(runs["fedit"])
    assert [row["round"] for row in exact] == [0, 1] and all(row["clients"] == 2 for row in exact)
    assert all(0 < row["error"] < 1e-6 and row["exact"] for row in exact)
    assert all(row["error"] > 1e-3 and not row["exact"] for row in averaged)
    assert conclusion(exact).startswith("exact: ") and conclusion(averaged).startswith("not exact: in 2 of them")


def test_the_error_is_the_one_worked_out_by_hand(runs):
    here = runs["fedit"] / "rounds" / "1"
    rows = [r for r in flora.report.read_metrics(runs["fedit"]) if r["kind"] == "client" and r["round"] == 1]
    clients = [load_peft(here / "clients" / r["client"]) for r in rows]
    made, total = load_peft(here / "aggregate"), sum(r["num_examples"] for r in rows)
    target = {n: sum(r["num_examples"] / total * dense(c[n]) for r, c in zip(rows, clients, strict=True)) for n in made}
    off = {n: float((dense(made[n]) - target[n]).norm()) for n in made}
    whole = math.sqrt(sum(float(t.norm()) ** 2 for t in target.values()))
    found = flora.verify(runs["fedit"])[1]
    worst = max(off, key=lambda n: off[n] / float(target[n].norm()))
    assert found["error"] == pytest.approx(math.sqrt(sum(e * e for e in off.values())) / whole)
    assert found["layer"] == worst and found["layer_error"] == pytest.approx(off[worst] / float(target[worst].norm()))


@pytest.mark.parametrize("what", ["client", "aggregate"])
def test_a_changed_file_changes_the_error(tmp_path, what):
    folder = simulated(tmp_path / "run", "flora")
    before = flora.verify(folder)
    here = folder / "rounds" / "1" / ("aggregate" if what == "aggregate" else "clients")
    file = next(here.rglob("adapter_model.safetensors"))
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.model.two.lora_B.weight"][3, 1] += 1e-3
    safetensors.torch.save_file(tensors, file)
    after = flora.verify(folder)
    assert [row["exact"] for row in before] == [True] * 3 and [row["exact"] for row in after] == [True, False, True]
    assert after[1]["error"] > 20 * before[1]["error"] and after[1]["layer"] == "model.two" and after[0] == before[0]


@pytest.mark.parametrize(("strategy", "config", "options"), [
    ("flora", {"lora_r": [8, 4, 2]}, {"start": "warm"}), ("flora", {"lora_r": [8, 4, 2]}, {"start": "shared"}), ("fedex", {}, {}),
    ("flora", {"weighting": "uniform"}, {}), ("flora", {"weighting": 0.25}, {"start": "warm"}),
    ("flora", {"server_learning_rate": 0.5}, {"start": "warm", "server_lr": 0.5}), ("fedex", {"weighting": 0.5}, {}),
    ("flora", {"absent": "renormalise"}, {"absent": "renormalise"})], ids=str)
def test_merge_and_start_together_are_exact(tmp_path, strategy, config, options):
    missing = [(1, 0, 0), (2, 1, 1)] if strategy == "flora" else []
    folder = simulated(tmp_path / "run", strategy, config, options, missing=missing)
    rows = flora.verify(folder)
    assert [row["exact"] for row in rows] == [True] * 3 and all(row["error"] < 1e-6 for row in rows)
    assert (folder / "rounds" / "2" / "start").is_dir() == (strategy == "fedex" or "start" in options)


@pytest.mark.parametrize(("config", "options"), [
    ({"weighting": "uniform"}, {"weights": "examples"}), ({"server_learning_rate": 0.5}, {"start": "warm"}),
    ({"absent": "renormalise"}, {}), ({"weighting": 0.25}, {"start": "warm", "weights": 0.3})], ids=str)
def test_a_server_that_weighs_otherwise_than_the_config_is_found_out(tmp_path, config, options):
    rows = flora.verify(simulated(tmp_path / "run", "flora", config, options, missing=[(0, 0, 0), (1, 1, 1)]))
    assert any(row["error"] > 1e-3 and not row["exact"] for row in rows)


def test_the_start_of_a_round_that_is_not_kept_is_said_to_be_missing(tmp_path):
    changes = {"keep_rounds": 2, "weighting": 0.25}
    rows = flora.verify(simulated(tmp_path / "run", "flora", changes, {"start": "warm"}))
    assert "not kept; keep_rounds (2 here)" in rows[0]["reason"] and rows[0]["error"] is None
    assert "the start of round 0 counts, which is not kept" in rows[1]["reason"] and rows[2]["exact"]
    assert conclusion(rows).endswith("1 of 3 rounds compared.")


def test_rounds_that_are_not_kept_are_named(runs, capsys):
    rows = flora.verify(runs["kept1"])
    assert [row["error"] is None for row in rows] == [True, False] and "keep_rounds (1 here)" in rows[0]["reason"]
    assert main(["verify", str(runs["kept1"])]) == 0
    said = capsys.readouterr().out
    assert "keep_rounds" in said and "exact: the aggregate is Σ p_k ΔW_k" in said and "1 of 2 rounds" in said


def test_what_cannot_be_compared_is_said_and_is_no_error(runs, tmp_path, capsys):
    assert main(["verify", str(runs["standalone"])]) == 0
    assert "nothing was compared: standalone: every adapter stays with its client" in capsys.readouterr().out
    fedsa = flora.verify(simulated(tmp_path / "fedsa", "fedsa"))
    assert all("fedsa: B stays with its client" in row["reason"] for row in fedsa)
    assert "one party trains on all rows" in flora.verify(simulated(tmp_path / "pooled", "centralized"))[0]["reason"]
    tokens = flora.verify(simulated(tmp_path / "tokens", "flora", {"weighting": "tokens"}, {"weights": "examples"}))
    assert "weighted by tokens" in tokens[0]["reason"]
    assert conclusion([]) == "nothing was compared: no round has trained."


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError):
            flora.verify(path)
    assert main(["verify", str(tmp_path / "none")]) == 1 and "expected the folder of a run" in capsys.readouterr().err
    assert main(["verify"]) == 2 and not (tmp_path / "none").exists()


def test_the_aggregate_is_merge_and_start_and_a_layer_of_one_of_them(tmp_path):
    one, two, three = (adapter(rank, (12, 8), seed) for seed, rank in enumerate((5, 2, 3)))
    run = RunFolder(tmp_path / "run")
    update = Update({"a": one}, 1, client="c")
    run.save_round(0, [update], Broadcast(merge={"a": one, "b": three}, start={"a": two, "c": three}), 1, "none")
    here = tmp_path / "run" / "rounds" / "0"
    made = load_peft(here / "aggregate")
    assert list(made) == ["a", "b", "c"] and [made[n].rank for n in made] == [7, 3, 3]
    assert torch.allclose(dense(made["a"]), dense(one) + dense(two), atol=1e-6)
    assert torch.equal(load_peft(here / "start")["a"].A, two.A) and list(load_peft(here / "start")) == ["a", "c"]
    run.save_round(1, [update], Broadcast(merge={"a": one}), 2, "none")
    after = tmp_path / "run" / "rounds" / "1"
    assert not (after / "start").exists() and torch.equal(load_peft(after / "aggregate")["a"].B, one.B)


@pytest.mark.parametrize(("name", "changes", "exact"), [
    ("warm", {"start": "warm"}, True), ("fedex", {"strategy": "fedex"}, True), ("ffa", {"strategy": "ffa"}, True),
    ("fedsb", {"strategy": "fedsb"}, True), ("factor", {"weighting": 0.2, "start": "warm", "server_learning_rate": 1.5}, True),
    ("auto", {"downlink": "auto"}, True), ("cut", {"downlink": "threshold", "downlink_tol": 0.3}, False),
    ("shared, dense", {"start": "shared", "downlink": "auto"}, True), ("warm, auto", {"start": "warm", "downlink": "auto"}, True),
    ("flexlora", {"strategy": "flexlora"}, False), ("tokens", {"weighting": "tokens"}, True)])
def test_whole_runs_of_other_methods(runs, name, changes, exact):
    settings = yaml.safe_load((runs["fedit"] / "config.yaml").read_text())
    folder = flora.run({**settings, "strategy": "flora", "lora_r": 4, **changes, "output_dir": str(runs["fedit"].parent / name)})
    rows = flora.verify(folder)
    assert len(rows) == 2 and all(row["exact"] is exact for row in rows), [row["error"] for row in rows]


def test_what_travelled_as_weights_cannot_be_compared_and_says_so(runs):
    settings = yaml.safe_load((runs["fedit"] / "config.yaml").read_text())
    for name, changes in (("dense", {}), ("dense, shared", {"start": "shared"})):
        folder = flora.run({**settings, "strategy": "flora", "downlink": "dense", **changes,
                            "output_dir": str(runs["fedit"].parent / name)})
        rows = flora.verify(folder)
        assert all(row["error"] is None and "travelled as new weights" in row["reason"] for row in rows)
    with pytest.raises(RunError, match="expected the folder of a run"):
        flora.verify(runs["fedit"].parent)
