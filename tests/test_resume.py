"""What a resumed run knows of the rounds before it: the budget of tokens, the errors of its rows, what its server remembers."""
import json
import shutil

import pytest
import torch
from test_engines import folders_agree, of, settings
from test_engines_failures import same_numbers, state
from tiny import adapter, llama, same

import flora
from flora import budget
from flora.budget import Budget
from flora.checkpoint import RunFolder
from flora.cohort import Cohort
from flora.downlink import Downlink
from flora.engines import local
from flora.engines.local import resume
from flora.errors import RunError
from flora.loop import Loop
from flora.messages import Broadcast, Update
from flora.report import Report, read_metrics
from flora.server import Server
from flora.snapshot import Carried


def stopped(monkeypatch, config, number):
    """Runs it up to the training of this round."""
    begin = Report.start

    def start(self, what, *rest):
        if what == f"round {number}: train":
            raise KeyboardInterrupt
        begin(self, what, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Report, "start", start)
        flora.run(config)


def test_a_budget_that_was_halved_stays_so_in_the_run_and_when_it_is_resumed(place, monkeypatch):
    """The memory was short once, in the first round: passes are smaller from then on, and sums have other bits."""
    monkeypatch.setattr(budget, "FASTEST", {"cpu": 64})
    config = {"num_rounds": 3, "keep_rounds": 3, "num_clients": 2, "lora_r": 4, "lora_alpha": 8}
    ample = flora.run(settings(place, "ample", **config))
    gradients, calls, seen = Loop._gradients, [], []

    def short(self, parts, *rest):
        calls.append(1)
        seen.append(self.budget.tokens)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return gradients(self, parts, *rest)

    monkeypatch.setattr(Loop, "_gradients", short)
    whole = flora.run(settings(place, "short", **config))
    assert seen[0] == 64 and set(seen[2:]) == {32} and not folders_agree(ample, whole, "model")
    calls.clear()
    folder = place / "short-stopped"
    stopped(monkeypatch, settings(place, "short-stopped", **config), 2)
    assert json.loads((folder / "checkpoint" / "2" / "state.json").read_text())["budget"]["tokens"] == 32
    seen.clear()
    resume(folder)                                              # nothing is short now
    assert set(seen) == {32}
    assert folders_agree(whole, folder, "model") and folders_agree(whole, folder, "rounds") and same_numbers(whole, folder)


def test_a_budget_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(budget, "available", lambda device: 1e9)
    first = Budget(llama(), "auto")
    assert first.room() == 1e9 and first.state() == {"tokens": budget.FASTEST["cpu"], "open": True, "room": 1e9}
    first.measure(lambda: torch.zeros(1), 10, False)
    first.halve(7, RuntimeError("out of memory"))
    second = Budget(llama(), "auto", json.loads(json.dumps(first.state())))
    second.measure(lambda: 1 // 0, 10, False)                   # it is known
    assert second.tokens == budget.FASTEST["cpu"] // 2 and second.state() == first.state()
    monkeypatch.setattr(budget, "available", lambda device: float("inf"))
    assert second.room() == 1e9 and Budget(llama(), 5).state() == {"tokens": 5, "open": False, "room": None}
    assert Budget(llama(), 5, Budget(llama(), 5).state()).room() == float("inf")
    assert Cohort(llama(), [], flora.TrainConfig(), max_tokens_per_batch=second)._budget is second


@pytest.mark.parametrize(("changes", "key"), [({"merge_into": "adapter", "merge_rank": 3}, "merge_error"),
                                              ({"downlink": "threshold", "downlink_tol": 0.3}, "downlink_error")])
def test_rows_of_rounds_in_which_everybody_fails_repeat_the_errors_that_are_in_force(place, monkeypatch, changes, key):
    fit = Cohort.fit

    def sick(self, broadcast, *rest, **options):
        updates = fit(self, broadcast, *rest, **options)
        self.failures |= {u.client: "lost" for u in updates} if broadcast.version else {}
        return [] if broadcast.version else updates

    monkeypatch.setattr(Cohort, "fit", sick)
    whole = flora.run(settings(place, f"sick-{key}", num_rounds=3, **changes))
    last = of(read_metrics(whole), "server")[-1]
    assert last[key] > 0 and len(of(read_metrics(whole), "failure")) == 8
    folder = place / f"sick-{key}-stopped"
    stopped(monkeypatch, settings(place, folder.name, num_rounds=3, **changes), 2)
    resume(folder)
    assert same_numbers(whole, folder) and folders_agree(whole, folder, "adapter" if "merge_into" in changes else "model")


def test_a_server_remembers_what_clients_missed(tmp_path):
    """Merges and the layers that ever changed; a merge is written once, and later checkpoints link to it."""
    shapes = {"a": (24, 16), "b": (24, 16)}

    def update(number, layers):
        return Update({layer: adapter(2, shapes[layer], seed=number) for layer in layers}, 3, base_version=number, client="c")

    client = flora.LocalClient("c", [{"input_ids": [1], "labels": [1]}], 2)
    server = Server("flora", [client], Broadcast(run="r"), downlink=Downlink("stack"))
    folder = RunFolder(tmp_path / "run")
    folder.begin("{}", {})
    for number, layers in enumerate(("ab", "a", "b", "a")):
        server.close([update(number, layers)])
        if number != 1:
            folder.save_checkpoint(llama(), number + 1, server, Carried())
    found = folder.load_checkpoint()
    assert found.number == 4 and sorted(found.layers) == ["a", "b"] and sorted(found.merges) == [1, 2, 3, 4]
    again = Server("flora", [client], found.broadcast, downlink=Downlink("stack"))
    with pytest.raises(flora.errors.StrategyError, match="merges of versions"):
        again.catch_up(1)
    found.remind(again)
    for version in range(5):
        ours, theirs = again.catch_up(version), server.catch_up(version)
        assert same(ours.merge, theirs.merge) and ours.since == theirs.since and ours.version == theirs.version
    here = tmp_path / "run" / "checkpoint" / "4"
    names = {path.name: path.stat().st_nlink for path in here.glob("*.safetensors")}
    assert names == {"broadcast.safetensors": 2, **{f"merge-{v:09}.safetensors": 2 if v == 4 else 1 for v in (1, 2, 3, 4)}}
    assert (here / "merge-000000004.safetensors").samefile(here / "broadcast.safetensors")


def test_a_checkpoint_that_the_disk_has_lost_is_refused_by_name(place, monkeypatch):
    folder = place / "lost"
    stopped(monkeypatch, settings(place, "lost"), 1)
    whole = place / "kept"
    shutil.copytree(folder / "checkpoint", whole)
    for name in ("broadcast.safetensors", "state.json"):
        file = folder / "checkpoint" / "1" / name
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(RunError, match="expected a whole checkpoint at .*checkpoint/1.*--overwrite"):
            resume(folder)
        shutil.copyfile(whole / "1" / name, file)
    resume(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_a_finished_run_stays_finished_whatever_happens_to_its_table(place, monkeypatch, error):
    monkeypatch.setattr(Report, "table", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        flora.run(settings(place, "table", num_rounds=1, overwrite=True, quiet=False))
    assert state(place / "table") == {"state": "finished", "rounds_done": 1}


def test_two_runs_on_a_new_folder_do_not_write_over_each_other(place, monkeypatch):
    """Both find it free; the second to begin is refused, and the first one's files are its own."""
    config, prepare = settings(place, "both", num_rounds=1), local.prepare

    def slow(*arguments):
        monkeypatch.setattr(local, "prepare", prepare)
        flora.run(config)                                       # another process, meanwhile
        return prepare(*arguments)

    monkeypatch.setattr(local, "prepare", slow)
    with pytest.raises(RunError, match="holds a run already"):
        flora.run(config)
    assert state(place / "both") == {"state": "finished", "rounds_done": 1} and (place / "both" / "model").exists()
