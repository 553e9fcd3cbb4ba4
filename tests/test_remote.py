"""Clients in processes of their own, without what carries the bytes: a RemoteRun and its parties, against the local engine."""
from dataclasses import replace

import pytest
import torch
from tiny import TARGETS, adapter, same

import flora
from flora import cohort
from flora.checkpoint import RunFolder
from flora.engines.merge_log import MergeLog
from flora.engines.party import Base, Own, Party
from flora.engines.remote import Came, Hello, RemoteRun
from flora.errors import MessageError, RunError, StrategyError
from flora.messages import Broadcast, Update, encode
from flora.nn import target_shapes


def config(place, folder, **changes):
    return flora.config.parse({
        "model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 3, "num_rounds": 3,
        "lora_r": [8, 4, 1], "max_steps": 2, "learning_rate": 1e-2, "eval_rows_per_client": 3, "server_eval_rows": 8,
        "target_modules": list(TARGETS), "quiet": True, "device": "cpu", "keep_rounds": 9, "output_dir": str(folder), **changes})


def parties(run, place, disk):
    """A process each."""
    return [Party(run, k, Base(run, disk / str(k))) for k in range(run.num_clients)]


def opened(run, clients, **options):
    remote = RemoteRun(run, **options)
    remote.open([Hello(p.client.name, k, p.client.rank, p.client.alpha, len(p.client.rows)) for k, p in enumerate(clients)])
    return remote


def one_round(remote, clients, skip=()):
    """A round without Flower; clients that are behind are sent what they lack, once."""
    by_name, answers = {p.client.name: p for p in clients}, {}
    for name in reversed(remote.sampled()):
        if name in skip:
            continue
        have = None
        for _ in range(2):
            answer = by_name[name].answer(remote.message(name, have), remote.server.changed, remote.rank(name))
            have = answer.have
            if answer.update is not None:
                break
        answers[name] = Came(answer.have, answer.update, answer.metrics)
    return remote.close(answers, dict.fromkeys(skip, "was not asked"))


def bits(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted((folder / "rounds").rglob("*.safetensors"))}


def test_processes_of_their_own_give_the_bits_of_a_local_run(place, tmp_path, monkeypatch):
    run = config(place, tmp_path / "remote")
    clients = parties(run, place, tmp_path / "disk")
    remote = opened(run, clients)
    while not remote.done:
        row = one_round(remote, clients)
    remote.finish()
    assert row["clients"] == 3 and row["bytes_up"] > 0
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = bits(flora.run(config(place, tmp_path / "local")))
    assert len(local) == 12 and bits(tmp_path / "remote") == local


def test_a_client_that_missed_rounds_gets_their_merges_as_one(place, tmp_path):
    run = config(place, tmp_path / "remote")
    clients = parties(run, place, tmp_path / "disk")
    remote = opened(run, clients)
    for _ in range(2):
        one_round(remote, clients, skip=["client-2"])
    one_round(remote, clients)
    bases = [p.base.model.state_dict() for p in clients]
    assert [p.base.at(remote.server.broadcast.run) for p in clients] == [2, 2, 2]
    for name, weight in bases[0].items():
        assert torch.equal(weight, bases[1][name]) and torch.allclose(weight, bases[2][name], rtol=0, atol=1e-6)
    assert not torch.equal(bases[0]["model.layers.0.self_attn.q_proj.weight"],
                           Base(run, tmp_path / "x").model.state_dict()["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("wiped", [False, True])
def test_a_process_that_begins_again_is_at_the_version_of_its_disk(place, tmp_path, wiped):
    run = config(place, tmp_path / "remote")
    clients = parties(run, place, tmp_path / "disk")
    remote = opened(run, clients)
    for _ in range(2):
        one_round(remote, clients)
    before = clients[0].base.model.state_dict()
    again = Party(run, 0, Base(run, tmp_path / ("none" if wiped else "disk/0")))
    name = remote.server.broadcast.run
    assert again.base.at(name) == (0 if wiped else 1)
    assert wiped or all(torch.equal(weight, before[key]) for key, weight in again.base.model.state_dict().items())
    one_round(remote, [again, *clients[1:]])
    assert again.base.at(name) == 2


def test_a_resumed_server_knows_what_was_merged_before_it(place, tmp_path):
    """It sends all of it to a client that begins anew."""
    run = config(place, tmp_path / "remote")
    clients = parties(run, place, tmp_path / "disk")
    remote = opened(run, clients)
    for _ in range(2):
        one_round(remote, clients)
    with pytest.raises(RunError, match=r"at least 1 clients \(min_clients\); got 0. client-0: was not asked"):
        one_round(remote, clients, skip=["client-0", "client-1", "client-2"])
    remote.leave()
    fresh = parties(run, place, tmp_path / "new-disks")
    again = opened(run, fresh, resume=True)
    assert again.number == 2 and RunFolder(tmp_path / "remote", resume=True).state()["state"] == "running"
    one_round(again, fresh)
    whole = config(place, tmp_path / "whole")
    clients = parties(whole, place, tmp_path / "disks")
    remote = opened(whole, clients)
    while not remote.done:
        one_round(remote, clients)
    one, other = (flora.formats.load_peft(tmp_path / kind / "rounds/2/aggregate") for kind in ("remote", "whole"))
    assert all(torch.allclose(one[n].A, other[n].A, atol=1e-4) and torch.allclose(one[n].B, other[n].B, atol=1e-4) for n in other)


def broadcasts(run, count, name="one"):
    shapes = target_shapes(Base(run, run.output_dir).model, run.target_modules)
    return [Broadcast({n: adapter(2, shape, seed) for n, shape in shapes.items()}, version=seed, run=name)
            for seed in range(1, count + 1)]


def test_a_base_refuses_gaps_merges_nothing_twice_and_begins_anew_for_another_run(place, tmp_path):
    run = config(place, tmp_path / "run")
    base = Base(run, tmp_path / "disk")
    original = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    one, two, three = broadcasts(run, 3)
    assert not base.reach(two, 2) and base.at("one") == 0
    assert not base.reach(replace(one, merge=None), 1)          # it would train on a base that lacks version 1
    assert base.reach(one, 1) and base.reach(one, 1) and base.reach(two, 2) and not base.reach(replace(three, version=4), 4)
    merged = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    assert base.reach(replace(two, since=0), 2) and base.reach(replace(two, merge=None), 2)
    assert all(torch.equal(weight, merged[name]) for name, weight in base.model.state_dict().items())
    assert base.at("another") == 0 and all(torch.equal(w, original[n]) for n, w in base.model.state_dict().items())
    assert base.at("one") == 2 and all(torch.equal(w, merged[n]) for n, w in base.model.state_dict().items())
    assert base.reach(one, 1) is True and base.at("one") == 1   # a server that went back: what came after is forgotten
    assert [change.version for change in MergeLog(tmp_path / "disk", "one").read()] == [1]


def test_a_log_ends_before_what_is_not_whole(place, tmp_path):
    run = config(place, tmp_path / "run")
    log = MergeLog(tmp_path, "r/1")
    for change in [*broadcasts(run, 3, "r/1"), Broadcast(version=4, run="r/1")]:
        log.add(change)
    assert [change.version for change in log.read()] == [1, 2, 3] and [c.version for c in log.read(1, 2)] == [2]
    assert same(next(log.read()).merge, broadcasts(run, 1)[0].merge)
    file = log.folder / "000002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert [change.version for change in log.read()] == [1]
    log.clear()
    assert list(log.read()) == []


def test_a_party_takes_broadcasts_of_its_model_alone(place, tmp_path):
    run = config(place, tmp_path / "run")
    party = Party(run, 1, Base(run, tmp_path / "disk"), Own(rank=2))
    assert (party.client.name, party.client.rank, party.client.alpha) == ("client-1", 2, 4.0)
    for data, says in ((encode(Update({}, 1)), "expected a broadcast"), (b"x" * 50, "header|bytes"),
                       (encode(Broadcast({"lm_head": adapter(2, (4, 4))}, version=1)), "layers of this model")):
        with pytest.raises(MessageError, match=says):
            party.answer(data, 0, 2)


def test_a_server_that_holds_no_merge_says_so(place, tmp_path):
    run = config(place, tmp_path / "remote")
    clients = parties(run, place, tmp_path / "disk")
    remote = opened(run, clients)
    for _ in range(2):
        one_round(remote, clients)
    del remote.server._merges[1]
    remote.sampled()
    with pytest.raises(StrategyError, match="expected the merges of versions 1 to 2"):
        remote.message("client-0", 0)
