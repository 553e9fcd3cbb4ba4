"""Runs shared out over two processes by torchrun give what one process gives; what goes wrong in one ends all, with its message."""
import json
import time

import pytest
import torch
import yaml
from runs import adapters, check_first_round, one_by_one
from test_engines import of, settings
from test_engines_failures import same_numbers, state
from test_engines_groups import FLEET, one
from tiny import ROOT, TARGETS, llama, near, python, same, token_rows

import flora
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.config import parse
from flora.distributed import cost, framed, launched, shares, unframed
from flora.messages import Broadcast, decode
from flora.report import read_metrics

ALONE = {"max_tokens_per_batch": 1}                             # clients train one at a time: the same sums in any company
EQUAL = {
    "flora": ("flora", ALONE | {"lora_dropout": 0.3, "optimizer_state": "keep", "fraction_train": 0.75}),
    "standalone": ("standalone", ALONE), "full": ("full", ALONE | {"lora_alpha": "2r"}),
    "fedsb": ("fedsb", ALONE), "adapter": ("flora", ALONE | {"merge_into": "adapter"})}
GROUPED = {"groups": {"count": 2, "inner_rounds": 2}, "fleet": FLEET, "max_tokens_per_batch": 1}
PRIVATE = {"strategy": "ffa", "weighting": "uniform",
           "privacy": {"level": "example", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As torchrun's processes have it: sums on more threads have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(*arguments, timeout=240):
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments, timeout=timeout)


def weights(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def both(place):
    """One torchrun of all jobs: (what process 0 and process 1 say became of each, their output)."""
    jobs = {name: {"config": settings(place, f"two-{name}", strategy, **changes)} for name, (strategy, changes) in EQUAL.items()}
    jobs |= {"batched": {"config": settings(place, "two-batched")},
             "grouped": {"config": one(place, "two-grouped", **GROUPED)},
             "private": {"config": settings(place, "two-private", **PRIVATE)},
             **{fault: {"config": settings(place, f"two-{fault}", **ALONE), "fault": fault}
                for fault in ("client", "fit", "bug", "load", "leader")},
             "stop": {"config": settings(place, "two-stop", num_rounds=3, **ALONE), "fault": "stop"},
             "resume": {"resume": str(place / "two-stop")}, "taken": {"config": settings(place, "two-flora")},
             "shared": {"config": settings(place, "two-shared", device="cuda:0")}, "own": {}}
    (place / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(str(ROOT / "tests" / "several_processes.py"), str(place))
    assert done.returncode == 0, done.stderr[-3000:]
    return *(json.loads((place / f"process-{k}.json").read_text()) for k in range(2)), done.stdout + done.stderr


@pytest.mark.parametrize("name", EQUAL)
def test_clients_that_train_alone_come_out_to_the_bit(both, place, name):
    strategy, changes = EQUAL[name]
    alone = flora.run(settings(place, f"one-{name}", strategy, **changes))
    assert both[0][name] == both[1][name] == "done"
    first, second = weights(alone), weights(place / f"two-{name}")
    assert first == second and len(first) >= 1 and same_numbers(alone, place / f"two-{name}")
    assert all(type(row["steps"]) is int for row in of(read_metrics(place / f"two-{name}"), "client"))


def test_clients_that_train_together_come_out_but_for_rounding(both, place):
    config = parse(settings(place, "one-batched"))
    plain = one_by_one(config, place / "one-plain")
    check_first_round(place / "two-batched", plain, config, place / "one-exact")
    assert near(adapters(place / "two-batched", 1), adapters(plain, 1), 1e-4)


def test_groups_take_their_inner_rounds_together_to_the_bit(both, place):
    """Every inner round is an order of its own, with what the group has learnt as frozen ranks."""
    alone = flora.run(one(place, "one-grouped", **GROUPED))
    assert both[0]["grouped"] == "done" and weights(alone) == weights(place / "two-grouped")


def test_the_noise_of_private_examples_is_the_runs_own(both, place):
    assert both[0]["private"] == both[1]["private"] == "done"
    assert all("epsilon" in row for row in of(read_metrics(place / "two-private"), "server")[1:])


def test_a_client_that_fails_is_named_as_in_one_process(both, place):
    failures = of(read_metrics(place / "two-client"), "failure")
    assert [(row["round"], row["client"]) for row in failures] == [(0, "client-3"), (1, "client-3")]
    assert "its rows are another's" in failures[0]["reason"] and both[0]["client"] == "done"
    assert {row["client"] for row in of(read_metrics(place / "two-client"), "client")} == {"client-0", "client-1", "client-2"}


@pytest.mark.parametrize(("fault", "said"), [
    ("fit", "ConfigError: process 1 of 2: the second process has had enough"),
    ("bug", 'RunError: process 1 of 2: KeyError: "nothing of flora\'s"'),
    ("load", "RunError: process 1 of 2: OSError: no such disk"), ("leader", "RunError: the leader has had enough"),
    ("stop", "RunError: stopped here"), ("taken", "RunError: "), ("shared", "ConfigError: device: expected auto")])
def test_an_error_of_one_ends_the_run_of_all_with_its_message(both, place, fault, said):
    """And the next run of the same processes goes on as if nothing had been."""
    if fault == "bug":
        said = said.replace('"', "'").replace("flora's'", "flora's\"").replace("'nothing", '"nothing')
    assert both[0][fault].startswith(said), both[0][fault]
    assert both[1][fault] == ("done" if fault != "shared" else both[0][fault])
    if fault in ("fit", "bug", "leader"):
        assert state(place / f"two-{fault}") == {"state": "failed", "rounds_done": 0}
    assert fault != "bug" or "in instead" in both[2]                   # where a bug arose is to be seen


def test_a_run_is_resumed_by_several_to_the_bit(both, place):
    alone = flora.run(settings(place, "one-stop", num_rounds=3, **ALONE))
    assert both[0]["resume"] == both[1]["resume"] == "done"
    assert weights(alone) == weights(place / "two-stop") and same_numbers(alone, place / "two-stop")


def test_a_loop_of_ones_own_has_all_updates_in_every_process(both, place):
    assert both[0]["own"] == both[1]["own"] == "done"
    model, states = llama(), {}
    clients = [LocalClient(f"c{k}", token_rows(4 + k, k), 2 + k, 4.0) for k in range(3)]
    for version in range(2):
        cohort = Cohort(model, clients, TrainConfig(1e-2, max_steps=2), TARGETS, 1, optimizer_states=states)
        for update in cohort.fit(Broadcast(version=version)):
            for k in range(2):
                found = decode((place / f"own-{k}-{version}-{update.client}").read_bytes())
                assert same(found.adapters, update.adapters)


def test_the_verb_needs_nothing_but_torchrun(place):
    (place / "cli.yaml").write_text(yaml.safe_dump(settings(place, "cli", num_rounds=1)))
    done = torchrun("-m", "flora.cli", "run", str(place / "cli.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(place / "cli") and state(place / "cli")["state"] == "finished"
    refused = torchrun("-m", "flora.cli", "compare", str(place / "cli.yaml"), "--strategies", "flora,fedit")
    assert refused.returncode == 1 and "expected one process" in refused.stderr


def test_a_process_that_dies_ends_the_others_at_once(place):
    (place / "jobs.json").write_text(json.dumps({"dies": {"config": settings(place, "two-dies"), "fault": "dies"}}))
    began = time.perf_counter()
    done = torchrun(str(ROOT / "tests" / "several_processes.py"), str(place))
    assert done.returncode != 0 and time.perf_counter() - began < 120
    assert "exitcode: 7" in done.stderr.replace(" ", "").replace("exitcode:", "exitcode: ")


def test_shares_are_even_and_keep_the_order():
    assert shares([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert shares([1, 2], 3) == [[1], [0], []] and shares([], 2) == [[], []]
    rows = [{"input_ids": [1] * 10, "labels": [1] * 10}] * 8
    config = TrainConfig(max_steps=None, per_device_train_batch_size=4)
    assert cost(LocalClient("a", rows), config) == 80 and cost(LocalClient("a", rows, max_steps=3), config) == 120


def test_frames_hold_what_they_were_given_and_no_pickle():
    fields, parts = unframed(framed({"a": 1.1, "b": None}, [b"xyz", b""]))
    assert fields == {"a": 1.1, "b": None} and [bytes(part) for part in parts] == [b"xyz", b""]
    assert launched() == 1 and "pickle" not in "".join((ROOT / "flora" / "distributed.py").read_text().split('"""')[2:])
    assert torch.distributed.is_available() and not torch.distributed.is_initialized()
