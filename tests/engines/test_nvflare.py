"""flora on NVFlare, without its processes: its real FedAvg, aggregator, persistor and client loop (nvflare_sites.py), against the
local engine; and one job of its simulator."""
import json
import shutil

import numpy as np
import pytest
from tiny import TARGETS, near

pytest.importorskip("nvflare", reason="nvflare is not installed, so not tested: the NVFlare engine. `make test-engines` tests it")

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare_sites import OneProcess, context
from runs import adapters, bits, check_first_round, failures

import flora
from flora import cohort
from flora.engines.nvflare import NVFlareConfig, flora_recipe, settings
from flora.engines.nvflare.settings import as_job, came_of, from_model, to_model
from flora.errors import ConfigError, MessageError, RunError
from flora.messages import decode, encode
from flora.report import read_metrics


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Sites whose disks are empty."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))


def keys(place, folder, **changes):
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 4, "num_rounds": 2,
            "lora_r": [8, 4, 2, 1], "lora_alpha": [16, 4, 8, 1], "max_steps": 3, "learning_rate": 1e-2, "eval_rows_per_client": 3,
            "server_eval_rows": 8, "target_modules": list(TARGETS), "quiet": True, "device": "cpu", "keep_rounds": 9,
            "output_dir": str(folder), **changes}


def on_nvflare(values, changed=None, **own):
    """A job; its controller."""
    job = OneProcess(values, changed, **own)
    job.start()
    return job


def locally(values, folder, **changes):
    run, _ = settings({**values, "output_dir": str(folder), **changes})
    return flora.run(run)


ONE_RANK = {"lora_r": 4, "lora_alpha": 8.0}


@pytest.mark.parametrize("changes", [
    {}, {"start": "warm", "adapter_dtype": "bfloat16"}, {"strategy": "ffa", **ONE_RANK}, {"strategy": "fedex", **ONE_RANK},
    {"strategy": "zeropad", "lora_alpha": "r"}, {"strategy": "hetlora", "lora_alpha": "r"}],
    ids=["flora", "warm-bf16", "ffa", "fedex", "zeropad", "hetlora"])
def test_the_bits_are_those_of_a_local_run_of_clients_one_by_one(place, tmp_path, monkeypatch, changes):
    values = keys(place, tmp_path / "nvflare", **changes)
    on_nvflare(values)
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local, seen = bits(locally(values, tmp_path / "local")), bits(tmp_path / "nvflare")
    assert seen.keys() == local.keys() and len(seen) >= 10
    assert seen == local


def test_a_batch_of_clients_gives_the_same_but_for_rounding(place, tmp_path):
    values = keys(place, tmp_path / "nvflare")
    on_nvflare(values)
    batched = locally(values, tmp_path / "local")
    check_first_round(batched, tmp_path / "nvflare", settings(values)[0], tmp_path / "exact")
    assert near(adapters(batched, 1), adapters(tmp_path / "nvflare", 1), 1e-4)
    assert bits(batched) != bits(tmp_path / "nvflare")


def test_half_of_the_clients_train_and_the_others_catch_up(place, tmp_path, monkeypatch):
    values = keys(place, tmp_path / "nvflare", fraction_train=0.5, num_rounds=3)
    job = on_nvflare(values)
    assert len(job.sent) == 6
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    locally(values, tmp_path / "local")
    names = [[r["client"] for r in read_metrics(tmp_path / kind) if r["kind"] == "client"] for kind in ("nvflare", "local")]
    assert names[0] == names[1] and len(set(names[0])) > 2
    for number in range(3):                                     # sums of another order, where merges were caught up
        assert near(adapters(tmp_path / "nvflare", number), adapters(tmp_path / "local", number), 1e-4)


def test_a_server_with_the_model_measures_what_the_local_engine_does(place, tmp_path, monkeypatch):
    values = keys(place, tmp_path / "nvflare", nvflare={"server_model": True})
    on_nvflare(values)
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = locally(values, tmp_path / "local")
    names = ("eval_loss", "eval_accuracy", "eval_loss_before", "eval_loss_after", "loss", "rank", "num_examples", "rounds_done")
    rows = [[[row.get(name, -1) for name in names] for row in read_metrics(folder)] for folder in (tmp_path / "nvflare", local)]
    assert len(rows[0]) == len(rows[1]) == 3 + 2 * 4 and rows[0][-1][0] < rows[0][0][0]
    assert all(one == pytest.approx(other, rel=1e-6) for one, other in zip(*rows, strict=True))      # clients in one batch there
    assert (tmp_path / "nvflare/model/model.safetensors").read_bytes() == (local / "model/model.safetensors").read_bytes()


def test_bytes_in_the_metrics_are_those_of_the_arrays_and_nvflare_adds_two_kilobytes(place, tmp_path):
    up = []

    def count(site, number, answer):
        up.append(answer.params["flora"].nbytes)
        return answer

    job = on_nvflare(keys(place, tmp_path / "nvflare"), count)
    rows = [row for row in read_metrics(tmp_path / "nvflare") if row["kind"] == "server"]
    assert sum(row["bytes_up"] for row in rows) == sum(up) > 0
    assert sum(row["bytes_down"] for row in rows) == sum(size for _, size, _, _ in job.sent) > 0
    for (_, size, down, sent_up), answer in zip(job.sent, up, strict=True):
        assert 0 < down - size < 2048 and 0 < sent_up - answer < 2048


def spoil(kind):
    """What a client may send that a round must not get, in the place of its answer."""
    def changed(answer):
        update = from_model(answer)
        if kind == "flipped":
            return to_model(bytes([*update[:-1], update[-1] ^ 1]), {"have": answer.meta["flora"]["have"]})
        if kind == "another's name":
            one = decode(update)
            return to_model(encode(flora.Update(one.adapters, 5, {}, one.base_version, "client-0")), {"have": 0})
        if kind == "a float array":
            return FLModel(params={"flora": np.zeros(9, np.float32)}, meta={"flora": {"have": 0}})
        if kind == "other arrays":
            return FLModel(params={"a": np.zeros(9), "b": np.zeros(9)}, meta={"flora": {"have": 0}})
        return FLModel(params={"flora": np.zeros(9, np.uint8)}, meta={"flora": "hello"} if kind == "no version" else {})
    return changed


@pytest.mark.parametrize(("kind", "reason"), [
    ("flipped", "SHA-256 digest; got another"), ("another's name", "expected an update of 'client-2', who sent it; got one of"),
    ("a float array", "got one of float32, shape"), ("other arrays", "got 2 arrays"),
    ("no version", "expected the version of its base; got None"), ("nothing told", "expected the version of its base; got None")])
def test_a_wrong_client_is_refused_alone_and_the_others_weigh_more(place, tmp_path, kind, reason):
    values = keys(place, tmp_path / "nvflare", num_rounds=1)
    on_nvflare(values, lambda site, number, answer: spoil(kind)(answer) if site == "site-3" else answer)
    found = failures(tmp_path / "nvflare")
    assert [*found] == [(0, "client-2")] and reason in found[0, "client-2"]
    rows = [row for row in read_metrics(tmp_path / "nvflare") if row["kind"] == "client"]
    assert [row["client"] for row in rows] == ["client-0", "client-1", "client-3"]
    total = sum(row["num_examples"] for row in rows)
    for layer, a in adapters(tmp_path / "nvflare", 0).items():
        own = [adapters(tmp_path / "nvflare", 0, f"clients/{row['client']}")[layer].delta() for row in rows]
        parts = [row["num_examples"] / total * delta for row, delta in zip(rows, own, strict=True)]
        assert a.rank == 13 and float((a.delta() - sum(parts)).norm()) < 1e-6 * float(sum(parts).norm())


def test_a_site_that_says_nothing_or_is_not_there_is_named(place, tmp_path):
    job = on_nvflare(keys(place, tmp_path / "nvflare", num_rounds=1), present=["site-1", "site-2", "site-3"],
                     changed=lambda site, number, answer: None if site == "site-1" else answer)
    assert [site for site, *_ in job.sent] == ["site-3", "site-2"]              # and site-4 was sent nothing
    assert failures(tmp_path / "nvflare") == {(0, "client-0"): "its site has sent no answer",
                                              (0, "client-3"): "its site site-4 does not take part in this job"}


def test_a_client_that_fails_says_why_and_the_next_round_is_tried(place, tmp_path, monkeypatch):
    from flora.engines.party import Party
    answer = Party.answer

    def failing(self, *given):
        if self.client.name == "client-1" and not hasattr(self, "failed"):
            self.failed = True
            raise ValueError("no space")
        return answer(self, *given)

    monkeypatch.setattr(Party, "answer", failing)
    on_nvflare(keys(place, tmp_path / "nvflare"))
    assert failures(tmp_path / "nvflare") == {(0, "client-1"): "ValueError: no space"}


def test_a_site_that_lost_its_disk_and_its_process_is_sent_what_it_missed_in_the_same_round(place, tmp_path):
    job = OneProcess(keys(place, tmp_path / "nvflare", num_rounds=3))

    def wipe(site, number, answer):
        if (site, number) == ("site-1", 1):                     # the last one of its round
            job.parties.clear()
            shutil.rmtree(tmp_path / "cache")
        return answer

    job.changed = wipe
    job.start()
    assert failures(tmp_path / "nvflare") == {} and [site for site, *_ in job.sent[8:]] == [
        "site-4", "site-4", "site-3", "site-2", "site-1"]       # what the first one is sent, the disk that they share has for all
    assert len([row for row in read_metrics(tmp_path / "nvflare") if row["kind"] == "client"]) == 12
    on_nvflare(keys(place, tmp_path / "whole", num_rounds=3))
    assert near(adapters(tmp_path / "nvflare", 2), adapters(tmp_path / "whole", 2), 1e-4)


def test_a_process_that_starts_again_replays_its_disk_and_asks_for_nothing(place, tmp_path):
    job = OneProcess(keys(place, tmp_path / "nvflare", num_rounds=3))
    job.changed = lambda site, number, answer: (job.parties.clear(), answer)[1]
    job.start()
    assert len(job.sent) == 12
    on_nvflare(keys(place, tmp_path / "whole", num_rounds=3))
    assert bits(tmp_path / "nvflare") == bits(tmp_path / "whole")


def test_a_job_is_resumed_where_it_stopped_with_the_same_bits(place, tmp_path):
    """Too few answers end the job with its reason; sites begin anew; no pickle lies in the folder."""
    values = keys(place, tmp_path / "nvflare", num_rounds=3, min_clients=2)
    with pytest.raises(RunError, match=r"round 1: expected answers of at least 2 .*got 1.*client-0: its site has sent no answer"):
        on_nvflare(values, lambda site, number, answer: None if number == 1 and site != "site-4" else answer)
    state = json.loads((tmp_path / "nvflare/run.json").read_text())
    assert state == {"state": "failed", "rounds_done": 1} and (tmp_path / "nvflare/checkpoint/1").exists()
    job = on_nvflare({**values, "nvflare": {"resume": True}})
    assert (job.start_round, job.num_rounds, len(job.sent)) == (1, 2, 8)
    on_nvflare(keys(place, tmp_path / "whole", num_rounds=3, min_clients=2))
    assert bits(tmp_path / "nvflare") == bits(tmp_path / "whole")
    files = [p for p in (tmp_path / "nvflare").rglob("*") if p.is_file() and p.parent.name != "tensorboard"]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl", ".yaml", ""}


def test_messages_are_made_for_each_client_and_the_shared_one_stays(place, tmp_path):
    job = OneProcess(keys(place, tmp_path / "nvflare", strategy="zeropad", lora_alpha="r", nvflare={"round_timeout": 7}))
    job.start()
    sizes = {site: size for site, size, _, _ in job.sent}
    assert sizes["site-1"] > sizes["site-2"] > sizes["site-3"] > sizes["site-4"] and job.limit == 7
    shared = FLModelUtils.to_shareable(FLModel(params={"flora": np.array([3])}, current_round=1))
    mine = job.filter.process(shared, context(job.engine, "site-1"))
    assert mine.get_header("current_round") == 1 and FLModelUtils.from_shareable(mine).params["flora"].dtype == np.uint8
    assert list(FLModelUtils.from_shareable(shared).params["flora"]) == [3]


def test_a_model_of_nvflare_gives_the_same_bytes():
    data = bytes(range(256))
    assert from_model(to_model(data, {})) == data
    assert came_of(to_model(data, {"have": 2, "metrics": {"seconds": 1.0, "name": "x"}})).metrics == {"seconds": 1.0}
    assert came_of(to_model(b"", {"have": 2, "behind": True})).update is None
    with pytest.raises(MessageError, match="its disk is full"):
        came_of(to_model(b"", {"error": "its disk is full"}))


def test_settings_say_what_was_expected(place, tmp_path):
    values = keys(place, tmp_path)
    config, own = settings({**values, "nvflare": {"sites": ["a", "b", "c", "d"], "round_timeout": 60}})
    assert own == NVFlareConfig(("a", "b", "c", "d"), round_timeout=60) and settings(as_job(config, own)) == (config, own)
    wrong = [({"sites": ["a", "a", "b", "c"]}, "none twice"), ({"sites": ["a"]}, "expected 4 names"), ({"min_sites": -1}, "got -1"),
             ({"round_timeout": True}, "or false; got True"), ({"site": []}, "nvflare.site: expected one of sites")]
    for given, reason in wrong:
        with pytest.raises(ConfigError, match=reason):
            settings({**values, "nvflare": given})
    with pytest.raises(ConfigError, match="groups: expected a setting that clients in processes of their own can have"):
        flora_recipe({**values, "groups": {"count": 2}})
