"""A profile of a run: a Chrome trace of some passes, its operators, and the same adapters, bit by bit."""
import errno
import gzip
import json
import os

import pytest
import torch
from test_engines import folders_agree, settings
from test_engines_failures import same_numbers, state
from test_resume import stopped

import flora
from flora import profiling
from flora.engines.local import resume
from flora.profiling import PASSES, traced


def trace(folder):
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def names(folder):
    return [event.get("name") for event in trace(folder)]


def test_a_profile_changes_no_bit_and_is_a_trace_of_one_round(place, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(torch.profiler.profile, "start", lambda self, run=torch.profiler.profile.start: (seen.append(1), run(self)))
    plain = flora.run(settings(place, "plain"))
    assert not seen and not (plain / "profile").exists()
    folder = flora.run(settings(place, "profiled", profile=True, quiet=False))
    assert folders_agree(plain, folder, "model") and folders_agree(plain, folder, "rounds") and same_numbers(plain, folder)
    assert sorted(path.name for path in (folder / "profile").iterdir()) == ["top.txt", "trace.json.gz"] and len(seen) == 1
    assert "aten::mm" in names(folder) and any("Backward" in str(name) for name in names(folder))
    top = (folder / "profile" / "top.txt").read_text()
    assert "Self CPU" in top and "aten::" in top and len(top.splitlines()) < profiling.ROWS + 12
    assert f"profile: {folder}/profile/trace.json.gz" in capsys.readouterr().out.replace("\n", "")


def test_a_trace_holds_some_passes_however_many_a_round_has(tmp_path):
    model, said = torch.nn.Linear(4, 4), []

    def run(count, name):
        with traced(True, model, tmp_path / name / "profile", said.append):
            for _ in range(count):
                model(torch.ones(2, 4)).sum().backward()
        return sum(name == "aten::addmm" for name in names(tmp_path / name))

    assert [run(count, f"{count}") for count in (0, 2, PASSES, PASSES + 1, 50)] == [0, 2, PASSES, PASSES, PASSES]
    assert not said and not model._forward_pre_hooks


@pytest.mark.parametrize(("rounds", "number"), [(1, 0), (2, 1), (4, 1)])
def test_the_second_round_is_profiled_or_the_only_one(place, monkeypatch, rounds, number):
    seen = []
    monkeypatch.setattr(profiling, "staged", lambda folder, run=profiling.staged: (seen.append(folder), run(folder))[1])
    folder = place / f"rounds-{rounds}"
    stopped(monkeypatch, settings(place, folder.name, num_rounds=rounds, profile=True), number)
    assert not seen
    resume(folder)
    assert seen == [folder / "profile"]


def test_a_disk_that_takes_no_profile_ends_no_run(place, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    folder = flora.run(settings(place, "full", profile=True, num_rounds=1, quiet=False))
    said = capsys.readouterr()
    assert "no profile in" in said.err and "profile:" not in said.out
    assert state(folder)["state"] == "finished" and not (folder / "profile").exists()


def test_a_run_that_is_stopped_leaves_no_hook_and_no_half_of_a_trace(tmp_path):
    model = torch.nn.Linear(4, 4)
    with pytest.raises(KeyboardInterrupt), traced(True, model, tmp_path / "profile", print):
        model(torch.ones(2, 4))
        raise KeyboardInterrupt
    assert not model._forward_pre_hooks and not list(tmp_path.iterdir())
    with traced(True, model, tmp_path / "profile", print):      # another can begin
        model(torch.ones(2, 4))
    assert (tmp_path / "profile" / "top.txt").exists()
