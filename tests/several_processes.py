"""What every process of a torchrun does in test_distributed.py: runs one after another, some with a fault put in, in one process of
them. Writes what became of each to FOLDER/process-NUMBER.json. Called as: several_processes.py FOLDER, which holds jobs.json."""
import faulthandler
import json
import os
import sys
from pathlib import Path

import tiny

from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.distributed import Team, first
from flora.engines import local, processes
from flora.errors import ConfigError, RunError
from flora.loop import Loop
from flora.messages import Broadcast, encode
from flora.report import Report


def own_loop(folder):
    """Two rounds of a loop of one's own: every process calls fit with the same clients, and has all updates."""
    model, team = tiny.llama(), Team("cpu")
    clients = [LocalClient(f"c{k}", tiny.token_rows(4 + k, k), 2 + k, 4.0) for k in range(3)]
    states = {}
    for version in range(2):
        cohort = Cohort(model, clients, TrainConfig(1e-2, max_steps=2), tiny.TARGETS, 1, optimizer_states=states)
        cohort.team = team
        seen = set()
        updates = cohort.fit(Broadcast(version=version), None, lambda name, *_, seen=seen: seen.add(name))
        assert [u.client for u in updates] == ["c0", "c1", "c2"] and seen == {"c0", "c1", "c2"}
        for u in updates:
            (folder / f"own-{team.number}-{version}-{u.client}").write_bytes(encode(u.__class__(u.adapters, u.num_examples)))
    assert set(states) == {"c0", "c1", "c2"}
    assert len(team.gather(b"")) == team.count


def put(fault):
    """Puts a fault in where this process is to have it; gives what takes it out again."""
    kept = (Cohort.fit_here, Loop.__init__, processes.prepare, Report.start, Report.say)

    def raising(error):
        def instead(*_, **__):
            raise error
        return instead

    def failing(self, model, packed, members, *rest):
        for member in (m for m in members if m.client.name == "client-3"):
            member.failed = "its rows are another's"
        kept[1](self, model, packed, members, *rest)

    def stop(self, what, *rest):
        if what == "round 1: train":
            raise RunError("stopped here")
        kept[3](self, what, *rest)

    if fault == "client":
        Loop.__init__ = failing
    elif fault == "fit" and not first():
        Cohort.fit_here = raising(ConfigError("the second process has had enough"))
    elif fault == "bug" and not first():
        Cohort.fit_here = raising(KeyError("nothing of flora's"))
    elif fault == "load" and not first():
        processes.prepare = raising(OSError("no such disk"))
    elif fault == "leader" and first():
        Cohort.fit_here = raising(RunError("the leader has had enough"))
    elif fault == "stop" and first():
        Report.start = stop
    elif fault == "dies" and not first():
        Cohort.fit_here = lambda *_, **__: os._exit(7)

    def out():
        Cohort.fit_here, Loop.__init__, processes.prepare, Report.start, Report.say = kept
    return out


def main(folder):
    found = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        take_out = put(job.get("fault"))
        try:
            if job.get("resume"):
                local.resume(job["resume"])
            elif "config" in job:
                local.run(job["config"])
            else:
                own_loop(folder)
            found[name] = "done"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        finally:
            take_out()
    (folder / f"process-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)            # a hang says where
    main(Path(sys.argv[1]))
