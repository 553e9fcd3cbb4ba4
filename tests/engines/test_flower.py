"""flora on Flower, without its processes: its real Strategy and ClientApp in one (flower_grid.py), against the local engine."""
import json

import pytest
import torch
from tiny import TARGETS, near

pytest.importorskip("flwr", reason="flwr is not installed, so not tested: the Flower engine. `make test-engines` tests it")

from flower_grid import OneProcess
from flwr.app import Message

import flora
from flora import cohort
from flora.engines import flower
from flora.engines.flower.records import from_arrays, settings, to_arrays
from flora.errors import ConfigError, RunError, StrategyError
from flora.formats import load_peft
from flora.messages import decode, encode
from flora.report import read_metrics

NODES = {900 + 7 * k % 5: {"partition-id": k, "num-partitions": 4} for k in (2, 0, 3, 1)}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Nodes whose processes begin and whose disks are empty."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    restart()
    yield
    restart()


def restart():
    flower._bases.clear()
    flower._parties.clear()


def keys(place, folder, **changes):
    """The config of an app: a run's, as TOML can hold it."""
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 4, "num_rounds": 2,
            "lora_r": "8,4,2,1", "lora_alpha": "16,4,8,1", "max_steps": 3, "learning_rate": 1e-2, "eval_rows_per_client": 3,
            "server_eval_rows": 8, "target_modules": ",".join(TARGETS), "quiet": True, "device": "cpu", "keep_rounds": 9,
            "output_dir": str(folder), "flower.wait_seconds": 0.0, **changes}


def on_flower(values, nodes=None, changed=None, states=None):
    """A run on Flower; its strategy and its grid."""
    grid = OneProcess(flower.client_app, nodes or NODES, values, changed)
    grid.states.update(states or {})
    strategy = flower.FloraStrategy(*settings(values))
    strategy.grid = grid
    strategy.run(grid)
    return strategy, grid


def locally(values, folder, **changes):
    run, _ = settings({**values, "output_dir": str(folder), **changes})
    return flora.run(run)


def adapters(folder, number, what="aggregate"):
    return load_peft(folder / "rounds" / str(number) / what)


def bits(folder):
    files = sorted(p.relative_to(folder) for p in (folder / "rounds").rglob("*.safetensors"))
    return {str(file): (folder / file).read_bytes() for file in files}


def said(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


def failures(folder):
    return {(row["round"], row["client"]): row["reason"] for row in read_metrics(folder) if row["kind"] == "failure"}


def reply_with(message, data, **config):
    """A reply of a node with these bytes in the place of its update."""
    message.content["arrays"] = to_arrays(data)
    for name, value in config.items():
        message.content["flora"][name] = value
    return message


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
    locally(values, tmp_path / "local")
    for number in range(2):
        for k in range(4):
            one, other = (adapters(tmp_path / kind, number, f"clients/client-{k}") for kind in ("flower", "local"))
            assert near(one, other, 1e-4)


def test_a_server_with_the_model_measures_what_the_local_engine_does(place, tmp_path, monkeypatch):
    values = keys(place, tmp_path / "flower", **{"flower.server_model": True})
    on_flower(values)
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = locally(values, tmp_path / "local")
    names = ("eval_loss", "eval_accuracy", "eval_loss_before", "eval_loss_after", "loss", "rank", "num_examples", "client")
    rows = [[{name: row[name] for name in names if row.get(name) is not None} for row in read_metrics(folder)]
            for folder in (tmp_path / "flower", local)]
    assert len(rows[0]) == len(rows[1]) == 11 and rows[0][-1]["eval_loss"] < rows[0][0]["eval_loss"]
    assert all(one == pytest.approx(other, rel=1e-6) for one, other in zip(*rows, strict=True))     # clients evaluate in a batch
    assert (tmp_path / "flower/model/model.safetensors").read_bytes() == (local / "model/model.safetensors").read_bytes()


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


def change(update, **fields):
    from dataclasses import replace
    return replace(update, **fields)


def hostile(case, update, given):
    """What a client sends in the place of an honest update."""
    layer = next(iter(update.adapters))
    a = update.adapters[layer]
    whole = encode(update)
    cases = {
        "key": lambda: encode(change(update, adapters={"lm_head.q_proj": a})),
        "shape": lambda: encode(change(update, adapters={**update.adapters, layer: flora.Adapter(a.A[:, 1:], a.B, a.scale)})),
        "dtype": lambda: whole.replace(b'"F32"', b'"I32"'),
        "version": lambda: encode(change(update, base_version=update.base_version + 1)),
        "rank": lambda: encode(change(update, adapters={**update.adapters, layer: flora.pad(a, 9)})),
        "nan": lambda: encode(change(update, adapters={**update.adapters, layer: flora.Adapter(a.A * float("nan"), a.B, a.scale)})),
        "other": lambda: encode(change(update, client="client-1")),
        "oversized": lambda: whole + b"\0" * (20 << 20),
        "truncated": lambda: whole[:-100], "empty": lambda: b"", "text": lambda: b"hello, world"}
    return cases[case]()


SAYS = {"key": "layers of this model", "shape": "shape|A is|expected", "dtype": "digest|floating|spelling|header|dtype",
        "version": "trained on version 0", "rank": "rank", "nan": "finite", "other": "who sent it", "oversized": "bytes",
        "truncated": "digest|bytes|read", "empty": "bytes", "text": "header|read|bytes"}


@pytest.mark.parametrize("case", SAYS)
def test_what_one_client_sends_wrong_is_refused_and_the_others_go_on(place, tmp_path, case):
    def lie(node, message, reply):
        if message.metadata.message_type != "train" or NODES[node]["partition-id"] != 2 or message.content["flora"]["round"]:
            return reply
        given = decode(from_arrays(message.content))
        return reply_with(reply, hostile(case, decode(from_arrays(reply.content), given=given), given))

    on_flower(keys(place, tmp_path / "flower"), changed=lie)
    found = failures(tmp_path / "flower")
    assert list(found) == [(0, "client-2")]
    import re
    assert re.search(SAYS[case], found[0, "client-2"]), found
    parts = {k: adapters(tmp_path / "flower", 0, f"clients/client-{k}") for k in (0, 1, 3)}
    rows = {row["client"]: row["num_examples"] for row in read_metrics(tmp_path / "flower")
            if row["kind"] == "client" and not row["round"]}
    for layer, a in adapters(tmp_path / "flower", 0).items():
        exact = sum(rows[f"client-{k}"] / sum(rows.values()) * parts[k][layer].delta() for k in parts)
        assert a.rank == 13 and float((a.delta() - exact).norm()) < 1e-6 * float(exact.norm())


def raw(reply):
    from flwr.app import Array, ArrayRecord
    reply.content["arrays"] = ArrayRecord({"flora": Array("float32", (1,), "numpy.ndarray", b"\0\0\0\0")})
    return reply


@pytest.mark.parametrize(("bad", "says"), [
    (lambda reply: raw(reply), "one array flora of uint8"), (lambda reply: (reply.content.pop("arrays"), reply)[1], "got none"),
    (lambda reply: (reply.content.pop("flora"), reply)[1], "version of its base"), (lambda reply: None, "not answered"),
    (lambda reply: reply_with(reply, b"", have=7, behind=True), "got 7, which this server never sent")],
    ids=["array", "no-array", "no-config", "dies", "ahead"])
def test_a_reply_that_is_no_answer_is_left_out(place, tmp_path, bad, says):
    def spoil(node, message, reply):
        first = message.metadata.message_type == "train" and not message.content["flora"]["round"]
        return bad(reply) if first and NODES[node]["partition-id"] == 1 else reply

    on_flower(keys(place, tmp_path / "flower"), changed=spoil)
    found = failures(tmp_path / "flower")
    assert list(found) == [(0, "client-1")] and says in found[0, "client-1"]


def test_a_client_that_cannot_train_says_why(place, tmp_path, monkeypatch):
    from flora.engines.party import Party
    from flora.errors import TrainingError
    train = Party.answer

    def fails(self, *told):
        if self.client.name == "client-0":
            raise TrainingError("expected a finite loss; got NaN")
        if self.client.name == "client-3":
            raise ZeroDivisionError("a bug of its own")
        return train(self, *told)

    monkeypatch.setattr(Party, "answer", fails)
    on_flower(keys(place, tmp_path / "flower", num_rounds=1))
    found = failures(tmp_path / "flower")
    assert "expected a finite loss" in found[0, "client-0"] and "a bug of its own" in found[0, "client-3"] and len(found) == 2


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


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"strategy": "centralized"}, ConfigError, "centralized.*flora run"), ({"strategy": "fedsa"}, ConfigError, "fedsa"),
    ({"optimizer_state": "keep"}, ConfigError, "optimizer_state"), ({"checkpoint_every": 2}, ConfigError, "checkpoint_every"),
    ({"strategy": "fedit"}, StrategyError, "flora")])
def test_what_a_run_of_processes_cannot_have_is_refused(place, tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        on_flower(keys(place, tmp_path / "refused", **changes))


def test_the_strategy_runs_in_an_app_of_ones_own(place, tmp_path):
    """Flower's own `start`, called by somebody else's ServerApp."""
    from flwr.app import ArrayRecord
    values = keys(place, tmp_path / "flower")
    strategy = flower.FloraStrategy(*settings(values))
    grid = OneProcess(flower.client_app, NODES, values)
    result = strategy.start(grid, ArrayRecord(), num_rounds=2)
    assert {n: m["clients"] for n, m in result.train_metrics_clientapp.items()} == {1: 4.0, 2: 4.0}
    assert strategy.round.done and isinstance(Message, type) and torch.isfinite(next(iter(adapters(
        tmp_path / "flower", 1).values())).A).all()
