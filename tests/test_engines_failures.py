"""Runs that are stopped, fail or fill the disk: what was written stays whole, and resume ends where the run would have."""
import errno
import json
import math
import pkgutil
from dataclasses import replace

import pytest
from safetensors import SafetensorError
from test_engines import folders_agree, of, settings
from tiny import python

import flora
from flora.checkpoint import RunFolder
from flora.cohort import Cohort
from flora.engines.local import resume
from flora.errors import ConfigError, RunError
from flora.formats import load_peft
from flora.report import Report, read_metrics


def state(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def whole(place):
    """Uninterrupted runs of three rounds."""
    return {strategy: flora.run(settings(place, f"whole-{strategy}", strategy, num_rounds=3, keep_rounds=3, fraction_train=0.75))
            for strategy in ("flora", "fedit", "standalone")}


def stop_at(monkeypatch, number, error=KeyboardInterrupt):
    """Raises at the second step of a round, when some clients have done it and others not."""
    seen, step_before = {"rounds": 0, "last": 0, "second": 0}, Report.on_step

    def on_step(self, client, step, steps, loss, *rate):
        seen["rounds"] += step == 1 and seen["last"] != 1
        seen["last"] = step
        seen["second"] += seen["rounds"] == number + 1 and step == 2
        if seen["second"] == 2:
            raise error
        step_before(self, client, step, steps, loss, *rate)

    monkeypatch.setattr(Report, "on_step", on_step)


def same_numbers(one, other):
    """The same rows, but for what a clock says: a message carries its client's seconds, so bytes_up varies by their digits."""
    def numbers(folder):
        drop = ("seconds", "tokens_per_second", "bytes_up")
        return [{key: value for key, value in row.items() if key not in drop} for row in read_metrics(folder)]
    return numbers(one) == numbers(other)


@pytest.mark.parametrize("strategy", ["flora", "fedit", "standalone"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_ctrl_c_leaves_a_readable_folder_and_resume_ends_at_the_same_bits(place, whole, monkeypatch, strategy, number):
    config = settings(place, f"stopped-{strategy}-{number}", strategy, num_rounds=3, keep_rounds=3, fraction_train=0.75)
    folder = place / f"stopped-{strategy}-{number}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, number)
        flora.run(config)
    assert state(folder) == {"state": "interrupted", "rounds_done": number}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["rounds_done"] for row in of(rows, "server")] == list(range(number + 1))
    assert not [row for row in of(rows, "client") if row["round"] >= number] and not (folder / "model").exists()
    assert [p.name for p in folder.rglob(".*")] == []
    with pytest.raises(RunError, match="interrupted.*flora resume"):
        flora.run(config)

    assert resume(folder) == folder and state(folder) == {"state": "finished", "rounds_done": 3}
    assert folders_agree(whole[strategy], folder, "model") and folders_agree(whole[strategy], folder, "rounds")
    assert same_numbers(whole[strategy], folder) and not (folder / "checkpoint").exists()


def test_a_run_stopped_twice_and_killed_mid_row_goes_on(place, whole, monkeypatch):
    folder = place / "twice"
    config = settings(place, "twice", num_rounds=3, keep_rounds=3, fraction_train=0.75)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)
        flora.run(config)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "client", "round": 1, "client": "client-0", "ra')           # a crash cut this short
    (folder / "rounds" / ".1-left").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)                                       # counted from the resumed round on: its last but one
        resume(folder)
    assert state(folder)["rounds_done"] == 2
    resume(folder)
    assert folders_agree(whole["flora"], folder, "model") and same_numbers(whole["flora"], folder)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(read_metrics(folder))


@pytest.mark.parametrize("strategy", ["flora", "fedit"])
def test_stopped_while_the_model_is_written(place, whole, monkeypatch, strategy):
    folder = place / f"late-{strategy}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        flora.run(settings(place, folder.name, strategy, num_rounds=3, keep_rounds=3, fraction_train=0.75))
    assert state(folder) == {"state": "interrupted", "rounds_done": 3}
    resume(folder)
    assert folders_agree(whole[strategy], folder, "model") and same_numbers(whole[strategy], folder)


def test_resume_refuses_what_is_no_unfinished_run(place, whole, tmp_path):
    with pytest.raises(RunError, match=r"finished \(3 rounds\)"):
        resume(whole["flora"])
    with pytest.raises(ConfigError, match="config.yaml"):
        resume(tmp_path)
    (tmp_path / "config.yaml").write_text("num_clients: 2\n")
    with pytest.raises(RunError, match="without run.json"):
        resume(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="empty config.yaml"):
        resume(tmp_path)


FULL = OSError(errno.ENOSPC, "No space left on device")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("where", "error", "calls"), [
    ("flora.checkpoint.save_peft", FULL, 6), ("flora.checkpoint.save_peft", RUST, 6), ("flora.snapshot.encode", FULL, 1),
    ("flora.snapshot.save_pretrained", RUST, 1), ("flora.checkpoint.write_text", FULL, 4), ("pathlib.Path.open", FULL, 8)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_a_full_disk_loses_the_write_at_hand_and_nothing_else(place, monkeypatch, where, error, calls):
    """The disk fills up in round 1, at one place after the other."""
    folder, config = place / "full", settings(place, "full", overwrite=True)
    real, seen = pkgutil.resolve_name(where), []

    def write(*arguments, **options):
        counts = where != "pathlib.Path.open" or "a" in arguments
        seen.extend([1] * counts)
        if counts and len(seen) > calls:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, write)
        with pytest.raises(RunError, match="disk is full.*flora resume"):
            flora.run(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["rounds_done"] for row in of(rows, "server")][:2] == [0, 1] and not (folder / "model").exists()
    assert state(folder)["state"] in ("failed", "running")      # "running" where the disk had no room for that word either
    assert [len(load_peft(p)) for p in sorted((folder / "rounds" / "0" / "clients").iterdir())] == [6] * 4
    assert len(load_peft(folder / "rounds" / "0" / "aggregate")) == 6 and not list(folder.glob("*/.*"))
    resume(folder)
    plain = flora.run(settings(place, "full-plain", overwrite=True))
    assert folders_agree(plain, folder, "model") and same_numbers(plain, folder)


LIMITED = """
import resource, sys
import flora
from flora.report import Report
step = Report.on_step
def on_step(self, client, number, steps, loss, *rate):
    if len(self.rows) > 5:                                      # round 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    step(self, client, number, steps, loss, *rate)
Report.on_step = on_step
from flora.cli import main
sys.exit(main(["run", sys.argv[1]]))
"""


def test_a_write_that_the_system_really_refuses(place):
    """A limit on the size of files stands for the full disk: no mock between the writer and the system."""
    folder = place / "limited"
    (place / "limited.yaml").write_text(json.dumps(settings(place, "limited")))
    done = python("-c", LIMITED, str(place / "limited.yaml"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write to" in done.stderr and "flora resume" in done.stderr
    assert len(load_peft(folder / "rounds" / "0" / "aggregate")) == 6 and not list(folder.glob("*/.*"))
    resume(folder)
    assert folders_agree(flora.run(settings(place, "unlimited")), folder, "model")


@pytest.mark.parametrize("strategy", ["flora", "fedit", "zeropad", "standalone"])
def test_a_client_whose_loss_is_nan_is_left_out_and_the_run_goes_on(place, monkeypatch, strategy):
    fit = Cohort.fit

    def sick(self, *arguments, **options):
        self.clients = [replace(c, learning_rate=1e39) if c.name == "client-1" else c for c in self.clients]
        return fit(self, *arguments, **options)

    monkeypatch.setattr(Cohort, "fit", sick)
    folder = flora.run(settings(place, f"nan-{strategy}", strategy))
    rows = read_metrics(folder)
    assert [(row["client"], row["round"]) for row in of(rows, "failure")] == [("client-1", 0), ("client-1", 1)]
    assert all("finite" in row["reason"] for row in of(rows, "failure"))
    assert {row["client"] for row in of(rows, "client")} == {"client-0", "client-2", "client-3"}
    assert state(folder)["state"] == "finished"
    losses = [row["eval_loss"] for row in of(rows, "server")]
    assert losses[0] > losses[1] > losses[2] and math.isfinite(losses[2])
    assert sorted(p.name for p in (folder / "rounds" / "1" / "clients").iterdir()) == ["client-0", "client-2", "client-3"]
    assert flora.report.summary(rows)[1].caption == "left out: client-1 in round 0; client-1 in round 1"


@pytest.mark.parametrize("strategy", ["flora", "fedit"])
def test_a_round_in_which_everybody_fails_changes_nothing(place, strategy):
    folder = flora.run(settings(place, f"none-{strategy}", strategy, learning_rate=1e39))
    rows = read_metrics(folder)
    assert len(of(rows, "failure")) == 8 and not of(rows, "client")
    assert len({row["eval_loss"] for row in of(rows, "server")}) == 1 and state(folder)["state"] == "finished"
    assert not (folder / "rounds").exists()                     # an earlier stack must not pass for this round's


def test_an_error_marks_the_run_failed(place, monkeypatch):
    stop_at(monkeypatch, 1, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        flora.run(settings(place, "bug"))
    assert state(place / "bug") == {"state": "failed", "rounds_done": 1}
