"""Rows in TensorBoard and in wandb: what a run writes there, what a resumed one does, and that neither can end a run."""
import errno
import importlib.util
import json
import os
import sys
import types

import pytest
from events import read
from test_engines import folders_agree, of, settings
from test_engines_failures import same_numbers, state
from test_resume import stopped

import flora
from flora import tracking
from flora.config import parse
from flora.engines.local import resume
from flora.errors import ConfigError, RunError
from flora.report import Report, read_metrics
from flora.tracking import TensorBoard, Tracked, scalars, trackers

SERVER = {"kind": "server", "rounds_done": 2, "eval_loss": 1.5, "eval_perplexity": 4.5, "eval_accuracy": 0.25, "bytes_up": 10,
          "bytes_down": 20, "tokens_per_second": 7.0, "seconds": {"forward": 0.5, "merge": 0.25}, "epsilon": 3.0}
CLIENT = {"kind": "client", "round": 1, "client": "ann/b", "rank": 4, "loss": 2.5, "eval_loss_before": 3.0, "eval_loss_after": None,
          "eval_accuracy_after": float("nan"), "seconds": {"train": 1.0}}


def points(rows):
    """What the event files of these rows hold."""
    found = {}
    for row in rows:
        step, values = scalars(row)
        for tag, value in values.items():
            found.setdefault(tag, []).append((step, pytest.approx(value, rel=1e-6)))
    return found


def test_a_row_is_numbers_by_rounds_done():
    assert scalars(SERVER) == (2, {
        "global/loss": 1.5, "global/perplexity": 4.5, "global/accuracy": 0.25, "bytes/up": 10.0, "bytes/down": 20.0,
        "speed/tokens_per_second": 7.0, "seconds/forward": 0.5, "seconds/merge": 0.25, "run/epsilon": 3.0})
    assert scalars(CLIENT) == (2, {"client_loss/ann/b": 2.5, "client_loss_before/ann/b": 3.0})
    assert scalars({"kind": "failure", "round": 1, "client": "x", "reason": "late"}) == (2, {})


def test_every_run_has_event_files_that_say_what_its_rows_say(place):
    folder = flora.run(settings(place, "always"))
    found, rows = read(folder), read_metrics(folder)
    assert found == points(rows) and [step for step, _ in found["global/loss"]] == [0, 1, 2]
    assert {"global/accuracy", "global/perplexity", "bytes/up", "bytes/down", "speed/tokens_per_second", "seconds/forward",
            "seconds/merge", "client_loss/client-0", "client_loss_before/client-0", "client_loss_after/client-0"} <= set(found)
    assert [step for step, _ in found["client_loss/client-0"]] == [1, 2]


def test_tensorboard_itself_reads_them(place):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here, so not tested: its own reader")
    folder = flora.run(settings(place, "itself", overwrite=True))
    theirs = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {tag: [(e.step, e.value) for e in theirs.Scalars(tag)] for tag in theirs.Tags()["scalars"]} == read(folder)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_says_no_step_twice(place, monkeypatch, every):
    config = {"num_rounds": 4, "checkpoint_every": every}
    whole = read(flora.run(settings(place, f"whole-{every}", **config)))
    folder = place / f"stopped-{every}"
    stopped(monkeypatch, settings(place, folder.name, **config), 3)
    assert [step for step, _ in read(folder)["global/loss"]] == [0, 1, 2, 3]
    resume(folder)
    found = read(folder)
    assert len(list((folder / "tensorboard").iterdir())) == 2 and found == points(read_metrics(folder))
    assert [step for step, _ in found["global/loss"]] == [0, 1, 2, 3, 4] and found["global/loss"] == whole["global/loss"]


def test_a_run_without_a_checkpoint_begins_its_events_again(tmp_path):
    first = TensorBoard(tmp_path)
    first.add(SERVER)
    first.close()
    again = TensorBoard(tmp_path)
    again.add({**SERVER, "rounds_done": 0})
    again.close()
    assert [step for step, _ in read(tmp_path)["global/loss"]] == [0]


def test_a_round_is_on_the_disk_when_its_server_row_is(tmp_path):
    board = TensorBoard(tmp_path)
    board.add(CLIENT)
    assert read(tmp_path) == {}
    board.add(SERVER)
    assert read(tmp_path) == points([CLIENT, SERVER])
    [path] = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5])                    # a crash
    assert read(tmp_path) == points([CLIENT])
    board.close()
    TensorBoard(tmp_path, 2).close()
    assert read(tmp_path) == points([CLIENT])


@pytest.mark.parametrize("when", ["open", "round 0", "round 1"])
def test_a_disk_that_takes_no_events_ends_no_run(place, monkeypatch, capsys, when):
    whole, made = flora.run(settings(place, "whole", overwrite=True)), []

    def fail(self, *_):
        made.append(1)
        if len(made) > {"open": 0, "round 0": 5, "round 1": 11}[when]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *_)

    from tensorboardX.record_writer import RecordWriter
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", fail)
    folder = flora.run(settings(place, "short", quiet=False, overwrite=True))
    assert folders_agree(whole, folder, "model") and same_numbers(whole, folder) and state(folder)["state"] == "finished"
    said = capsys.readouterr().err
    assert said.count("TensorBoard") == 1 and "No space left on device" in said
    assert ("no event files for TensorBoard" if when == "open" else "gets no more rows") in said


def test_without_the_package_a_run_says_so(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    folder = flora.run(settings(place, "lacks", num_rounds=1, quiet=False))
    assert "pip install tensorboardX" in capsys.readouterr().err and not (folder / "tensorboard").exists()


def test_none_writes_none(place):
    folder = flora.run(settings(place, "none", num_rounds=1, report_to="none"))
    assert not (folder / "tensorboard").exists() and state(folder)["state"] == "finished"


def test_report_to_is_one_word_or_several():
    assert parse({"report_to": "wandb"}).report_to == ["wandb"] and parse({}).report_to == ["tensorboard"]
    assert parse({"report_to": ["wandb", "tensorboard"]}).report_to == ["wandb", "tensorboard"]
    for bad, says in ((["none", "wandb"], "none alone; got none, wandb"), ([], "report_to"), ("comet", "report_to.*comet")):
        with pytest.raises(ConfigError, match=says):
            parse({"report_to": bad})


class FakeWandB(types.ModuleType):
    """As much of wandb as a run needs; it remembers what it was told."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.runs, self.fails = [], fails

    def Settings(self, **given):
        return given

    def init(self, **given):
        if self.fails == "init":
            raise ValueError("no key")
        self.runs.append(types.SimpleNamespace(given=given, logged=[], finished=None, log=self.log, finish=self.finish))
        return self.runs[-1]

    def log(self, values, step):
        if self.fails == "log":
            raise ConnectionError("no net")
        self.runs[-1].logged.append((step, values))

    def finish(self, exit_code):
        self.runs[-1].finished = exit_code


def test_wandb_gets_the_rows_and_a_resumed_run_is_the_same_one(place, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = place / "wandb"
    stopped(monkeypatch, settings(place, "wandb", num_rounds=3, report_to=["tensorboard", "wandb"]), 2)
    resume(folder)
    first, second = fake.runs
    assert first.given["id"] == second.given["id"] == (folder / "wandb-id").read_text().strip()
    assert second.given["resume"] == "allow" and first.given["project"] == "flora" and first.given["name"] == "wandb"
    assert first.given["config"]["num_rounds"] == 3 and first.given["dir"] == str(folder)
    assert [step for step, _ in first.logged] == [0, 1, 2] and [step for step, _ in second.logged] == [3]
    assert (first.finished, second.finished) == (1, 0)
    values = {step: values for run in fake.runs for step, values in run.logged}
    assert {tag: [(s, v[tag]) for s, v in values.items() if tag in v] for tag in {t for v in values.values() for t in v}} \
        == points(read_metrics(folder)) and read(folder) == points(read_metrics(folder))


def test_wandb_that_fails_in_a_run_is_left_and_the_run_goes_on(place, monkeypatch, capsys):
    fake = FakeWandB("log")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = flora.run(settings(place, "no-net", quiet=False, report_to="wandb"))
    assert capsys.readouterr().err.count("wandb gets no more rows: no net") == 1 and fake.runs[0].finished == 1
    assert len(of(read_metrics(folder), "server")) == 3 and not (folder / "tensorboard").exists()


def test_wandb_that_cannot_begin_or_is_not_there_is_an_error_before_anybody_trains(place, monkeypatch):
    monkeypatch.setattr(Report, "train", lambda *_: pytest.fail("it trained"))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB("init"))
    with pytest.raises(RunError, match="does not begin: no key.*wandb login.*WANDB_MODE=offline"):
        flora.run(settings(place, "no-key", report_to="wandb"))
    monkeypatch.delitem(sys.modules, "wandb")
    find = importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ConfigError, match="pip install wandb"):
        flora.run(settings(place, "lacks-wandb", report_to=["wandb"]))
    assert not (place / "lacks-wandb").exists()


def test_one_tracker_that_fails_takes_nothing_from_another(tmp_path):
    said, whole = [], TensorBoard(tmp_path)

    class Broken:
        name = "broken"

        def add(self, row):
            raise ValueError("why")

        def close(self, failed=False):
            raise ValueError("closed badly")

    both = Tracked([Broken(), whole], said.append)
    both.add(SERVER)
    both.add({**SERVER, "rounds_done": 3})
    both.close()
    assert said == ["broken gets no more rows: why. metrics.jsonl has all of them."]
    assert read(tmp_path) == points([SERVER, {**SERVER, "rounds_done": 3}])
    assert json.loads(json.dumps(scalars(SERVER)[1])) and trackers([], tmp_path, 0, {}, said.append).close() is None
