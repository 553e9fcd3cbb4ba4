"""flora on Flower, without its processes: its real Strategy and ClientApp in one (flower_grid.py), against the local engine."""
import json

import pytest
import torch
from tiny import near

pytest.importorskip("flwr", reason="flwr is not installed, so not tested: the Flower engine. `make test-engines` tests it")

from flower_grid import OneProcess
from flower_runs import NODES, keys, locally, on_flower, restart, said
from flwr.app import ArrayRecord
from runs import adapters, bits, check_first_round, failures

from flora import cohort
from flora.engines import flower
from flora.engines.flower.records import settings
from flora.errors import ConfigError, RunError
from flora.formats import load_peft
from flora.report import read_metrics

ONE_RANK = {"lora_r": 4, "lora_alpha": 8.0}


@pytest.mark.parametrize("changes", [
    {}, {"start": "warm", "adapter_dtype": "bfloat16"}, {"strategy": "ffa", **ONE_RANK}, {"fraction_train": 0.5, "num_rounds": 3},
    {"strategy": "fedex", **ONE_RANK}, {"strategy": "zeropad", "lora_alpha": "r"}, {"strategy": "fedsb", **ONE_RANK},
    {"strategy": "hetlora", "lora_alpha": "r"}], ids=["flora", "warm-bf16", "ffa", "half", "fedex", "zeropad", "fedsb", "hetlora"])
def test_the_bits_are_those_of_a_local_run_of_clients_one_by_one(place, tmp_path, monkeypatch, changes):
    values = keys(place, tmp_path / "flower", **changes)
    on_flower(values)
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = bits(locally(values, tmp_path / "local"))
    seen = bits(tmp_path / "flower")
    assert seen.keys() == local.keys() and len(seen) >= 6
    if "fraction_train" in changes or changes.get("strategy") == "fedsb":
        # merges that were missed are summed before they are written; a core that travelled is multiplied with its frame again
        for name in seen:
            one, other = (load_peft((tmp_path / kind / name).parent) for kind in ("flower", "local"))
            assert near(one, other, 1e-4), name
    else:
        assert seen == local


def test_a_batch_of_clients_gives_the_same_but_for_rounding(place, tmp_path):
    values = keys(place, tmp_path / "flower")
    on_flower(values)
    batched = locally(values, tmp_path / "local")
    check_first_round(batched, tmp_path / "flower", settings(values)[0], tmp_path / "exact")
    assert near(adapters(batched, 1), adapters(tmp_path / "flower", 1), 1e-4)
    assert bits(batched) != bits(tmp_path / "flower")


def test_a_server_with_the_model_measures_what_the_local_engine_does(place, tmp_path, monkeypatch):
    values = keys(place, tmp_path / "flower", **{"flower.server_model": True})
    on_flower(values)
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = locally(values, tmp_path / "local")
    names = ("eval_loss", "eval_accuracy", "eval_loss_before", "eval_loss_after", "loss", "rank", "num_examples", "client")
    rows = [[{name: row[name] for name in names if row.get(name) is not None} for row in read_metrics(folder)]
            for folder in (tmp_path / "flower", local)]
    assert len(rows[0]) == len(rows[1]) == 11 and rows[0][-1]["eval_loss"] < rows[0][0]["eval_loss"]
    for one, other in zip(*rows, strict=True):                  # equal, but that a local run evaluates its clients in a batch
        assert one.pop("client", "") == other.pop("client", "") and one == pytest.approx(other, rel=1e-6)
    assert (tmp_path / "flower/model/model.safetensors").read_bytes() == (local / "model/model.safetensors").read_bytes()


def test_full_fine_tuning_sends_weights_and_ends_with_the_same_ones(place, tmp_path, monkeypatch):
    values = keys(place, tmp_path / "flower", strategy="full", lora_alpha="2r", **{"flower.server_model": True})
    _, grid = on_flower(values)
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = locally(values, tmp_path / "local")
    assert (tmp_path / "flower/model/model.safetensors").read_bytes() == (local / "model/model.safetensors").read_bytes()
    assert failures(tmp_path / "flower") == {} and len([kind for _, kind, _ in grid.sent if kind == "train"]) == 8


def test_a_server_without_a_model_gives_the_sum_of_all_updates(place, tmp_path):
    on_flower(keys(place, tmp_path / "flower"))
    total = load_peft(tmp_path / "flower/adapter")
    for layer, a in total.items():
        parts = [adapters(tmp_path / "flower", number)[layer].delta() for number in range(2)]
        assert a.rank == 30 and float((a.delta() - sum(parts)).norm()) < 1e-6 * float(sum(parts).norm())
    assert json.loads((tmp_path / "flower/run.json").read_text()) == {"state": "finished", "rounds_done": 2}


def test_bytes_in_the_metrics_are_those_that_travelled(place, tmp_path):
    up = []

    def count(node, message, reply):
        up.extend(len(a.data) for r in reply.content.array_records.values() for a in r.values())
        return reply

    _, grid = on_flower(keys(place, tmp_path / "flower"), changed=count)
    rows = read_metrics(tmp_path / "flower")
    assert sum(row["bytes_up"] for row in rows if row["kind"] == "server") == sum(up) > 0
    assert sum(row["bytes_up"] for row in rows if row["kind"] == "client") == sum(up)
    down = sum(size for _, kind, size in grid.sent if kind == "train")
    assert sum(row["bytes_down"] for row in rows if row["kind"] == "server") == down > 0


def test_a_client_that_lost_its_disk_and_its_process_is_sent_what_it_missed(place, tmp_path):
    """It says that it is at version 0; within the same round it gets both merges at once and trains."""
    values = keys(place, tmp_path / "flower", num_rounds=3)
    lost = []

    def wipe(node, message, reply):
        trained = message.metadata.message_type == "train" and message.content["flora"]["round"] == 1
        if trained and message.content["flora"]["version"] == 1 and not lost and NODES[node]["partition-id"] == 3:
            lost.append(node)
            restart()
            import shutil
            shutil.rmtree(tmp_path / "cache")
        return reply

    _, grid = on_flower(values, changed=wipe)
    assert lost and failures(tmp_path / "flower") == {}
    trains = [entry for entry in grid.sent if entry[1] == "train"]
    assert len(trains) == 3 * 4 + 4                             # all live in that process, and all say that they are at 0
    assert min(size for *_, size in trains[-4:]) > 1.8 * min(size for *_, size in trains[-8:-4])
    rows = [row for row in read_metrics(tmp_path / "flower") if row["kind"] == "client" and row["round"] == 2]
    assert len(rows) == 4
    on_flower(keys(place, tmp_path / "whole", num_rounds=3))
    assert near(adapters(tmp_path / "flower", 2), adapters(tmp_path / "whole", 2), 1e-4)


def test_a_process_that_starts_again_replays_its_disk_and_asks_for_nothing(place, tmp_path):
    values = keys(place, tmp_path / "flower", num_rounds=3)

    def forget(node, message, reply):
        restart()
        return reply

    _, grid = on_flower(values, changed=forget)
    assert len([entry for entry in grid.sent if entry[1] == "train"]) == 12
    on_flower(keys(place, tmp_path / "whole", num_rounds=3))
    assert bits(tmp_path / "flower") == bits(tmp_path / "whole")


def test_a_run_is_resumed_where_it_stopped_with_the_same_bits(place, tmp_path):
    """With other node ids, and nodes that begin anew."""
    def vanish(node, message, reply):
        gone = message.metadata.message_type == "train" and message.content["flora"]["round"] == 1
        return None if gone and message.content["flora"]["rank"] > 1 else reply

    values = keys(place, tmp_path / "flower", num_rounds=3, min_clients=2)
    with pytest.raises(RunError, match=r"round 1: expected answers of at least 2 .*got 1.*client-0: its node has not answered"):
        on_flower(values, changed=vanish)
    state = json.loads((tmp_path / "flower/run.json").read_text())
    assert state == {"state": "failed", "rounds_done": 1} and (tmp_path / "flower/checkpoint/1").exists()
    restart()
    nodes = {node + 5000: config for node, config in NODES.items()}
    on_flower({**values, "flower.resume": True}, nodes)
    on_flower(keys(place, tmp_path / "whole", num_rounds=3, min_clients=2))
    assert bits(tmp_path / "flower") == bits(tmp_path / "whole")
    assert [row["rounds_done"] for row in read_metrics(tmp_path / "flower") if row["kind"] == "server"] == [1, 2, 3]


def test_nodes_choose_their_rank_their_rows_and_their_name(place, tmp_path):
    nodes = {5: {"partition-id": 0, "lora-rank": 3}, 6: {"partition-id": 1, "lora-rank": 5, "lora-alpha": 7.0},
             7: {"partition-id": 2, "dataset": str(place / "rows.jsonl"), "name": "clinic"}}
    values = keys(place, tmp_path / "flower", num_clients=3, lora_r=2, lora_alpha="2r", num_rounds=1)
    on_flower(values, nodes)
    rows = {row["client"]: row for row in read_metrics(tmp_path / "flower") if row["kind"] == "client"}
    assert {name: (row["rank"], row["alpha"]) for name, row in rows.items()} == {
        "client-0": (3, 6.0), "client-1": (5, 7.0), "clinic": (2, 4.0)}
    assert rows["clinic"]["num_examples"] == 60 - 3 - 1         # all rows of its file but those that are held out
    assert {a.rank for a in adapters(tmp_path / "flower", 0).values()} == {10}


def test_two_nodes_cannot_be_one_client_and_a_place_must_exist(place, tmp_path, caplog):
    values = keys(place, tmp_path / "flower", num_rounds=1)
    on_flower(values, {**NODES, 9001: {"partition-id": 1}, 9002: {"partition-id": 4}, 9003: {}})
    rows = [row["client"] for row in read_metrics(tmp_path / "flower") if row["kind"] == "client"]
    assert rows == [f"client-{k}" for k in range(4)]
    assert all(text in said(caplog) for text in ("another one that says it is 'client-1'", "expected 0 to 3", "from 0 in the"))


def test_too_few_nodes_are_an_error_and_fewer_than_planned_are_not(place, tmp_path):
    two = dict(list(NODES.items())[:2])
    with pytest.raises(RunError, match="at least 3 clients.*got 2"):
        on_flower(keys(place, tmp_path / "few", min_clients=3), two)
    on_flower(keys(place, tmp_path / "two", min_clients=2, num_rounds=1), two)
    assert len([row for row in read_metrics(tmp_path / "two") if row["kind"] == "client"]) == 2


def test_a_run_config_of_flower_becomes_one_of_flora():
    run, own = settings({"lora_r": "64,16", "num_clients": 2, "target_modules": "q_proj,v_proj", "partition.by": "who",
                         "max_steps": 3, "flower.resume": True, "flower.round_timeout": 60})
    assert run.lora_r == [64, 16] and run.target_modules == ["q_proj", "v_proj"] and run.partition.by == "who"
    assert own == flower.FlowerConfig(resume=True, round_timeout=60.0)
    for values, says in (({"flower.resume": "yes"}, "flower.resume"), ({"flower.retry": 1}, "flower.retry"),
                         ({"lora": 4}, "lora_r")):
        with pytest.raises(ConfigError, match=says):
            settings(values)


def test_the_strategy_runs_in_an_app_of_ones_own(place, tmp_path):
    """Flower's own `start`, called by somebody else's ServerApp."""
    values = keys(place, tmp_path / "flower")
    strategy = flower.FloraStrategy(*settings(values))
    grid = OneProcess(flower.client_app, NODES, values)
    result = strategy.start(grid, ArrayRecord(), num_rounds=2)
    assert {n: m["clients"] for n, m in result.train_metrics_clientapp.items()} == {1: 4.0, 2: 4.0}
    assert strategy.round.done and torch.isfinite(next(iter(adapters(
        tmp_path / "flower", 1).values())).A).all()
